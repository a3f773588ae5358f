"""What runs inside the pods: the command lines as rendered, and the scripts that the chart mounts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import httpx
import pytest

from optimizers.cli import optimize
from server.cli import serve
from server.settings import read_settings
from tests import models
from tests.artifacts import write_plain
from tests.deploy.chart import CHART, RENDERINGS, Helm, all_of, environment_of, find, server_of
from tests.deploy.schemas import NEWEST
from tests.end_to_end.process import Server

FILES = CHART / "files"
URL = "http://rel-slipstream.serving.svc:8000"


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the chart with nothing of the project on its path."""
    command = [sys.executable, FILES / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """mlp, two_inputs and strings (text in, text out)."""
    root, files = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("files")
    write_plain(root, "mlp", "1", models.save_mlp(files / "mlp.onnx"))
    write_plain(root, "two_inputs", "3", models.save_two_inputs(files / "two_inputs.onnx"))
    write_plain(root, "strings", "1", models.save_strings(files / "strings.onnx"))
    with Server(root) as running:
        yield running


@pytest.mark.parametrize("values", RENDERINGS, ids=lambda path: path.stem)
def test_server_understands_its_command_line_and_its_variables(helm: Helm, tmp_path: Path, values: Path) -> None:
    manifests = helm.template("--values", values, "--kube-version", NEWEST)
    (command, *arguments) = server_of(manifests)["args"]
    assert command == "serve"
    context = serve.make_context("serve", arguments)
    settings = read_settings({"repository": context.params["repository"]}, environment_of(manifests))
    (mounted,) = (m for m in server_of(manifests)["volumeMounts"] if m["mountPath"] == str(settings.repository))
    assert mounted["readOnly"] is True
    assert settings.port == server_of(manifests)["ports"][0]["containerPort"]


def test_optimizer_understands_its_command_line(helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "classifier").mkdir()
    for name in ("classifier/model.onnx", "classifier/calibration.npz", "encoder.onnx"):
        (tmp_path / name).touch()
    jobs = [
        job
        for job in all_of(helm.template("--values", CHART / "ci" / "jobs-values.yaml"), "Job")
        if "-optimize-" in job["metadata"]["name"]
    ]
    names = set()
    for job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        (command, *arguments) = [text.replace("/source", str(tmp_path)) for text in container["args"]]
        assert command == "optimize"
        params = optimize.make_context("optimize", arguments).params
        assert params["repository"] == Path("/models")
        names.add(params["name"])
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts == {"/source": True, "/models": False, "/tmp": False}
    assert names == {"classifier", "encoder"}


def test_probe_asks_every_model(server: Server) -> None:
    outcome = python("probe.py", server.url)
    assert outcome.returncode == 0, outcome.stderr
    assert [line.split(":")[0] for line in outcome.stdout.splitlines()] == [
        "mlp version 1",
        "strings version 1",
        "two_inputs version 3",
    ]
    assert server.metric("slipstream_requests_total", model="strings", code="ok") >= 1


def test_probe_asks_the_models_that_are_named(server: Server, helm: Helm) -> None:
    manifests = helm.template("--set", "test.models={two_inputs}")
    (container,) = find(manifests, "Pod")["spec"]["containers"]
    (interpreter, script, address) = container["command"]
    assert (interpreter, script, address) == ("python", "/scripts/probe.py", URL)
    outcome = python(Path(script).name, server.url, *container["args"])
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("two_inputs version 3")
    assert len(outcome.stdout.splitlines()) == 1


def test_probe_fails_where_the_model_is_missing(server: Server) -> None:
    outcome = python("probe.py", server.url, "nobody")
    assert outcome.returncode == 1
    assert "answered 404" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_probe_fails_where_nothing_is_served(tmp_path: Path) -> None:
    write_plain(tmp_path, "mlp", "1", models.save_mlp(tmp_path / "mlp.onnx"))
    with Server(tmp_path, "--watch-interval-s", "0") as server:
        assert httpx.post(f"{server.url}/v2/repository/models/mlp/unload").status_code == 200
        outcome = python("probe.py", server.url)
        assert outcome.returncode == 1
        assert "serves no model" in outcome.stderr
    gone = python("probe.py", server.url)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr


def test_scripts_are_mounted_where_they_are_used(helm: Helm) -> None:
    manifests = helm.template("--values", CHART / "ci" / "stateful-fetch-values.yaml", "--set", "loadTest.enabled=true")
    scripts = find(manifests, "ConfigMap", "-scripts")["data"]
    assert scripts.keys() == {"probe.py", "fetch_models.py", "locustfile.py"}
    for name, text in scripts.items():
        assert text == (FILES / name).read_text()
    assert find(helm.template(), "ConfigMap", "-scripts")["data"].keys() == {"probe.py"}


def fetch(uri: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python("fetch_models.py", uri, folder)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Two versions of one model, one of another, a file beside the versions, and what an optimizer caches."""
    root = tmp_path / "storage"
    for name in ("a/1/manifest.json", "a/1/fp32/model.onnx", "a/2/model.onnx", "b/1/model.onnx", ".cache/x/y"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "b" / "config.pbtxt").write_text("old")
    return root


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetch_copies_the_repository(storage: Path, tmp_path: Path) -> None:
    outcome = fetch(f"file://{storage}", tmp_path / "models")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "3 versions copied, 0 were there\n"
    assert tree(tmp_path / "models") == tree(storage) - {".cache/x/y"}
    assert (tmp_path / "models" / "a/1/fp32/model.onnx").read_text() == "a/1/fp32/model.onnx"


def test_fetch_keeps_versions_and_renews_what_lies_beside_them(storage: Path, tmp_path: Path) -> None:
    fetch(f"file://{storage}", tmp_path / "models")
    (storage / "a/1/manifest.json").write_text("changed")
    (storage / "b/config.pbtxt").write_text("new")
    (storage / "b/2").mkdir()
    (storage / "b/2/model.onnx").write_text("newer")
    outcome = fetch(f"file://{storage}", tmp_path / "models")
    assert outcome.stdout == "1 versions copied, 3 were there\n"
    assert (tmp_path / "models/a/1/manifest.json").read_text() == "a/1/manifest.json"
    assert (tmp_path / "models/b/config.pbtxt").read_text() == "new"
    assert (tmp_path / "models/b/2/model.onnx").read_text() == "newer"


def test_interrupted_fetch_leaves_no_half_version(storage: Path, tmp_path: Path) -> None:
    left = tmp_path / "models/.incoming/a/1"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    assert fetch(f"file://{storage}", tmp_path / "models").returncode == 0
    assert not (tmp_path / "models/.incoming").exists()
    assert "a/1/half" not in tree(tmp_path / "models")


def test_fetch_fails_where_there_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = fetch(f"file://{tmp_path}/empty", tmp_path / "models")
    assert outcome.returncode != 0
    assert "no NAME/VERSION/... below file://" in outcome.stderr


def test_fetch_reads_any_file_system_of_fsspec(storage: Path, tmp_path: Path) -> None:
    archive = tmp_path / "models.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, *storage.iterdir()], check=True)
    assert "zip" in fsspec.available_protocols()
    outcome = fetch(f"zip://::file://{archive}", tmp_path / "models")
    assert outcome.returncode == 0, outcome.stderr
    assert "a/1/fp32/model.onnx" in tree(tmp_path / "models")


def locust(helm: Helm, server: Server, values: str) -> subprocess.CompletedProcess[str]:
    """Run the load test's container here, with its own command line."""
    manifests = helm.template("--set", f"loadTest.enabled=true,loadTest.runTime=1s,loadTest.users=2,{values}")
    (container,) = find(manifests, "Job")["spec"]["template"]["spec"]["containers"]
    assert f"--host={URL}" in container["args"]
    arguments = [text.replace("/scripts", str(FILES)).replace(URL, server.url) for text in container["args"]]
    command = [sys.executable, *container["command"][1:], *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_load_test_passes_within_its_objective(helm: Helm, server: Server) -> None:
    outcome = locust(helm, server, "loadTest.model=two_inputs,loadTest.maxP99Ms=20000")
    assert outcome.returncode == 0, outcome.stderr
    assert "0.0% refused" in outcome.stderr
    assert server.metric("slipstream_requests_total", model="two_inputs", code="ok") > 2


def test_load_test_fails_when_the_objective_is_missed(helm: Helm, server: Server) -> None:
    outcome = locust(helm, server, "loadTest.maxP99Ms=0.001")
    assert outcome.returncode == 1
    assert "objective missed: p99 is" in outcome.stderr
