"""The commands: what goes to stdout and stderr, and the exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from optimizers import cli, pipeline
from optimizers.cli import inspect, optimize, verify
from optimizers.errors import OptimizerError
from optimizers.isolation import SERVING
from optimizers.report import read_report
from server.artifact import digest_of, read_artifact
from server.providers import CPU
from server.session import Session
from tests import models
from tests.artifacts import edit_manifest, write_plain

FAST = ["--precisions", "fp32", "--compressions", "none", "--devices", "cpu", "--portable"]
FAST += ["--time-budget", "0.1"]


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """Model, repository, and the result of optimizing it."""
    folder = tmp_path_factory.mktemp("cli")
    model = models.save_mlp(folder / "mlp.onnx")
    result = run(optimize, model, "--repository", folder / "models", "--name", "mlp", *FAST)
    return model, folder / "models", result


@pytest.fixture
def artifact(first: tuple[Path, Path, Result]) -> Path:
    return first[1] / "mlp" / "1"


def test_optimize_ends_with_a_table_the_verdicts_and_where_it_is(first: tuple[Path, Path, Result], artifact: Path):
    result = first[2]
    assert result.exit_code == 0
    assert "original-1thread" in result.stdout
    assert "fp32" in result.stdout
    assert f"written: {artifact}" in result.stdout
    assert f"report: {artifact / 'report.html'}" in result.stdout


def test_optimize_tells_its_stages_on_stderr(first: tuple[Path, Path, Result]):
    lines = first[2].stderr.splitlines()
    assert any("pass sanitize" in line for line in lines)
    assert any("latency race" in line for line in lines)
    assert "latency race" not in first[2].stdout


def test_second_optimize_does_nothing(
    first: tuple[Path, Path, Result], artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "optimize", None)
    result = run(optimize, first[0], "--repository", first[1], "--name", "mlp", *FAST)
    assert result.exit_code == 0
    assert f"up to date: {artifact}" in result.stdout


def test_json_prints_one_document(first: tuple[Path, Path, Result], artifact: Path):
    for result in (
        run(optimize, first[0], "--repository", first[1], "--name", "mlp", *FAST, "--json"),
        run(inspect, artifact, "--json"),
    ):
        assert result.exit_code == 0
        assert json.loads(result.stdout)["chosen"] == "fp32"


def test_a_process_of_its_own_keeps_stdout_for_the_document(tmp_path: Path, mlp: Path):
    script = Path(cli.__file__).parents[1] / "slipstream.py"
    command = [sys.executable, script, "optimize", mlp, "--repository", tmp_path / "models", "--name", "mlp", *FAST]
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    document = json.loads(ended.stdout)
    assert (document["name"], document["version"], document["chosen"]) == ("mlp", "1", "fp32")
    assert document["command"].startswith(f"slipstream optimize {mlp}")
    assert "latency race" in ended.stderr


def test_inspect_says_why_each_candidate_was_kept_or_refused(artifact: Path):
    result = run(inspect, artifact)
    assert result.exit_code == 0
    assert "original-1thread is" in result.stdout
    assert "search samples only" in result.stdout


def test_verify_proves_every_variant_again(artifact: Path):
    result = run(verify, artifact)
    assert result.exit_code == 0
    assert "fp32 on cpu" in result.stdout


def damage(artifact: Path, folder: Path) -> Path:
    """Copy an artifact and change a weight, with the manifest's digest in step, as a broken host would compute."""
    copy = folder / "mlp" / "1"
    shutil.copytree(artifact, copy)
    path = copy / "fp32" / "model.onnx"
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    onnx.save(model, path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["variants"][0]["sha256"] = digest_of(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_verify_fails_when_a_variant_answers_otherwise(artifact: Path, tmp_path: Path):
    result = run(verify, damage(artifact, tmp_path))
    assert result.exit_code == 1
    assert "FAILED fp32" in result.stdout
    assert "1 of 1 variants failed: fp32" in result.stderr


def test_verify_fails_when_a_variant_stays_below_its_bound(artifact: Path, tmp_path: Path):
    copy = tmp_path / "mlp" / "1"
    shutil.copytree(artifact, copy)
    (variant,) = read_artifact(copy).variants
    edit_manifest(copy, variants=(msgspec.structs.replace(variant, golden_min_sqnr_db=201.0),))
    result = run(verify, copy)
    assert result.exit_code == 1
    assert "FAILED fp32: variant fp32 on cpu" in result.stdout
    assert "at least 201.0 dB are required" in result.stdout
    assert result.stderr == "Error: 1 of 1 variants failed: fp32\n"


def test_verify_names_a_device_that_is_not_here(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "usable_devices", lambda _gpu: (CPU,))
    copy = tmp_path / "mlp" / "1"
    shutil.copytree(artifact, copy)
    (variant,) = read_artifact(copy).variants
    edit_manifest(copy, variants=(msgspec.structs.replace(variant, name="fp32-cuda", provider="cuda"), variant))
    result = run(verify, copy)
    assert result.exit_code == 1
    assert "FAILED fp32-cuda: no cuda device is usable here" in result.stdout
    assert "ok     fp32 on cpu" in result.stdout


def test_verify_refuses_a_build_for_another_cpu(artifact: Path, tmp_path: Path):
    copy = tmp_path / "mlp" / "1"
    shutil.copytree(artifact, copy)
    (variant,) = read_artifact(copy).variants
    bound = msgspec.structs.replace(variant, name="fp32-host", host_bound=True, host="another")
    edit_manifest(copy, variants=(bound, variant))
    result = run(verify, copy)
    assert result.exit_code == 1
    assert "FAILED fp32-host: it was built for another kind of host" in result.stdout
    assert "ok     fp32 on cpu" in result.stdout


def test_verify_fails_when_a_file_was_changed(artifact: Path, tmp_path: Path):
    shutil.copytree(artifact, tmp_path / "mlp" / "1")
    (tmp_path / "mlp" / "1" / "fp32" / "model.onnx").write_bytes(b"")
    result = run(verify, tmp_path / "mlp" / "1")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr


def test_error_is_one_line_without_traceback(tmp_path: Path):
    (tmp_path / "bad.onnx").write_text("not a model")
    result = run(optimize, tmp_path / "bad.onnx", "--repository", tmp_path / "models", "--name", "bad")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "bad.onnx is not an ONNX model" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_debug_lets_the_error_through(tmp_path: Path):
    (tmp_path / "bad.onnx").write_text("not a model")
    result = run(optimize, tmp_path / "bad.onnx", "--repository", tmp_path, "--name", "bad", "--debug")
    assert isinstance(result.exception, OptimizerError)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--name", "x"),
        ("--name", "x", "--repository", "r", "--precisions", "int3"),
        ("--name", "x", "--repository", "r", "--devices", ","),
        ("--name", "x", "--repository", "r", "--compressions", "zip"),
        ("--name", "x", "--repository", "r", "--objective", "beauty"),
        ("--name", "x", "--repository", "r", "--decision", "y"),
        ("--name", "x", "--repository", "r", "--decision", "=top1"),
        ("--name", "x", "--repository", "r", "--decision", "y=best"),
        ("--name", "x", "--repository", "r", "--version", "0"),
        ("--name", "x", "--repository", "r", "--time-budget", "nan"),
        ("--name", "x", "--repository", "r", "--time-budget", "inf"),
        ("--name", "x", "--repository", "r", "--time-budget", "-1"),
        ("--name", "x", "--repository", "r", "--calibration", "missing.npz"),
    ],
)
def test_wrong_usage_exits_with_2(mlp: Path, arguments: tuple[str, ...]):
    result = run(optimize, mlp, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage:")


def test_labels_without_samples_are_wrong_usage(mlp: Path, tmp_path: Path):
    np.savez(tmp_path / "labels.npz", labels=np.zeros(4, np.int64))
    result = run(optimize, mlp, "--name", "x", "--repository", tmp_path, "--labels", tmp_path / "labels.npz")
    assert result.exit_code == 2
    assert "--labels needs --calibration" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--min-agreement", "2", "min_agreement is 2.0; it must be above 0 and at most 1"),
        ("--min-agreement", "nan", "min_agreement is nan; it must be above 0 and at most 1"),
        ("--max-accuracy-drop", "1", "max_accuracy_drop is 1.0; it must be from 0 to below 1"),
        ("--slo-ms", "0", "slo_ms is 0.0; it must be above 0 milliseconds"),
    ],
)
def test_options_out_of_range_are_refused(mlp: Path, tmp_path: Path, option: str, value: str, named: str):
    result = run(optimize, mlp, "--name", "x", "--repository", tmp_path / "models", option, value)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {named}\n"
    assert not (tmp_path / "models").exists()


def test_decision_of_an_unknown_output_or_of_another_shape_is_refused(mlp: Path, tmp_path: Path):
    plain = ("--name", "x", "--repository", tmp_path / "models", *FAST)
    result = run(optimize, mlp, *plain, "--decision", "y=close", "--decision", "z=top1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "for an output 'z', which the model does not have; its outputs are y; kinds of decisions" in result.stderr
    result = run(optimize, mlp, *plain, "--decision", "y=pixels")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'pixels' does not fit the output 'y'" in result.stderr
    assert "y [32, 10]: top1, nearest_neighbour, near, close" in result.stderr


def test_named_decision_is_recorded_and_replayed(mlp: Path, tmp_path: Path):
    plain = ("--repository", tmp_path / "models", "--name")
    assert run(optimize, mlp, *plain, "named", *FAST, "--decision", "y=close").exit_code == 0
    recipe = tmp_path / "models" / "named" / "1" / "recipe.toml"
    assert run(optimize, mlp, *plain, "again", "--time-budget", "0.1", "--recipe", recipe).exit_code == 0
    assert run(optimize, mlp, *plain, "guessed", *FAST).exit_code == 0
    digests = set()
    for name, decisions in (("named", {"y": "close"}), ("again", {"y": "close"}), ("guessed", {})):
        folder = tmp_path / "models" / name / "1"
        report = json.loads((folder / "report.json").read_text())
        assert report["recipe"]["decisions"] == decisions
        wanted = "close of y" if decisions else "top1"
        assert {c["fidelity"]["decision"] for c in report["candidates"] if c["fidelity"]} <= {wanted}
        digests.add(json.loads((folder / "manifest.json").read_text())["recipe_sha256"])
    assert len(digests) == 3


@pytest.mark.parametrize("metric", ["labels", "evaluator", ""])
def test_table_shows_the_accuracy_of_the_original_and_of_candidates_with_a_metric(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
):
    samples = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    labels = Session(mlp, CPU, SERVING).run({"x": samples})["y"].argmax(axis=1)
    labels[::4] += 1
    np.savez(tmp_path / "data.npz", x=samples)
    np.savez(tmp_path / "labels.npz", labels=labels % 10)
    (tmp_path / "cli_metric.py").write_text("def half(outputs, labels):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    given = {"labels": ("--labels", "labels.npz"), "evaluator": ("--evaluator", "cli_metric:half")}.get(metric, ())
    (tmp_path / "recipe.toml").write_text(
        'devices = ["cpu"]\n[[variants]]\nname = "int8"\nprecision = "int8-dynamic"\n'
        'passes = [{ pass = "sanitize" }, { pass = "int8-dynamic" }]\n'
    )
    result = run(
        optimize, mlp, "--repository", tmp_path / "models", "--name", "m", "--calibration", "data.npz", *given,
        "--recipe", "recipe.toml", "--objective", "size", "--min-agreement", "0.8", "--time-budget", "1",
    )  # fmt: skip
    assert result.exit_code == 0
    head, *lines = (
        line for line in result.stdout.splitlines() if line.startswith(("  variant", "  original", "  int8"))
    )
    assert ("acc" in head.split()) is bool(metric)
    (record,) = (r for r in read_report(tmp_path / "models" / "m" / "1").candidates if r.name == "int8")
    assert record.fidelity is not None
    if metric:
        found = record.fidelity
        assert all(f"{found.accuracy_original:.3f}" in line for line in lines if "original" in line)
        assert all(f"{found.accuracy:.3f}" in line for line in lines if "int8" in line)
        bound = f"95 % lower bound {found.accuracy_difference_low:+.3f})"
        assert f"accuracy {found.accuracy:.3f}, the original's {found.accuracy_original:.3f}" in result.stdout
        assert bound in result.stdout
    assert len(lines) == 3


def test_recipe_with_an_unknown_key_is_refused_with_the_known_ones(mlp: Path, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('precision = ["fp32"]\n')
    recipe = tmp_path / "recipe.toml"
    result = run(optimize, mlp, "--name", "x", "--repository", tmp_path / "models", "--recipe", recipe)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "unknown field `precision`; known keys are precisions, compressions, devices" in result.stderr


def test_options_win_over_the_recipe(first: tuple[Path, Path, Result], artifact: Path, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(
        'precisions = ["int8"]\ncompressions = []\nportable = false\ndevices = ["cpu"]\n'
    )
    recipe, repository = tmp_path / "recipe.toml", first[1]
    result = run(optimize, first[0], "--repository", repository, "--name", "mlp", "--recipe", recipe, *FAST)
    assert f"up to date: {artifact}" in result.stdout


def test_plain_model_is_neither_inspected_nor_verified(mlp: Path, tmp_path: Path):
    folder = write_plain(tmp_path, "plain", "1", mlp)
    for command, reason in ((inspect, "without any evidence"), (verify, "without golden outputs")):
        result = run(command, folder)
        assert (result.exit_code, result.stdout) == (1, "")
        assert reason in result.stderr


def test_help_teaches_the_formats():
    result = run(optimize, "--help")
    assert result.exit_code == 0
    for word in ("DATA.npz", "LABELS.npz", "slipstream serve", "--min-agreement"):
        assert word in result.stdout
