"""The KServe manifests: valid for KServe's classes, and understood by the server."""

import copy
import re
from typing import Any

import jsonschema
import pytest
import yaml

from server.cli import serve
from server.metrics import Metrics
from server.settings import read_settings
from tests.deploy.chart import ROOT, Manifest
from tests.deploy.schemas import check

FOLDER = ROOT / "deploy" / "kserve"
FILES = sorted(FOLDER.glob("*.yaml"))
SERVICES = [path for path in FILES if path.stem.startswith("inferenceservice")]


def load(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return manifest


def container() -> dict[str, Any]:
    (found,) = load("clusterservingruntime")["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_manifest_is_valid(path: Any) -> None:
    check(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("clusterservingruntime", ("spec", "containers"), None),
        ("clusterservingruntime", ("spec", "bogus"), 1),
        ("clusterservingruntime", ("spec", "supportedModelFormats"), [{"format": "onnx"}]),
        ("clusterservingruntime", ("spec", "containers"), [{"name": "c", "imag": "x"}]),
        ("inferenceservice", ("spec", "predictor", "canaryTrafficPercent"), "ten"),
        ("inferenceservice", ("spec", "predictor", "model", "storageURI"), "s3://x"),
        ("inferenceservice-keda", ("spec", "predictor", "autoScaling", "metrics"), [{"external": {}}]),
    ],
)
def test_schema_refuses_what_kserve_does_not_know(name: str, place: tuple[str, ...], value: object) -> None:
    manifest = copy.deepcopy(load(name))
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_server_understands_its_command_line_and_its_variables(path: Any) -> None:
    predictor = yaml.safe_load(path.read_text())["spec"]["predictor"]
    (command, *arguments) = container()["args"]
    assert command == "serve"
    repository = serve.make_context("serve", arguments).params["repository"]
    variables = {entry["name"]: entry["value"] for entry in container()["env"] + predictor["model"].get("env", [])}
    settings = read_settings({"repository": repository}, variables)
    # Where KServe's storage initializer puts the files.
    assert str(settings.repository) == "/mnt/models"
    assert settings.host == "0.0.0.0"
    (port,) = container()["ports"]
    assert settings.port == port["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["port"] == settings.port
    assert load("clusterservingruntime")["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings.port)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_services_choose_the_runtime_and_what_it_speaks(path: Any) -> None:
    runtime = load("clusterservingruntime")
    predictor = yaml.safe_load(path.read_text())["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [{key: entry[key] for key in ("name", "version")} for entry in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert predictor["enableServiceLinks"] is False


def test_runtime_runs_without_privilege() -> None:
    context = container()["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    # KServe's own name for the container that serves.
    assert container()["name"] == "kserve-container"


def test_queries_ask_for_metrics_of_the_server() -> None:
    (metric,) = load("inferenceservice-keda")["spec"]["predictor"]["autoScaling"]["metrics"]
    names = re.findall(r"slipstream_\w+", metric["external"]["metric"]["query"])
    exported = {f"{family.name}_sum" for family in Metrics().registry.collect() if family.type == "histogram"}
    assert set(names) <= exported
    assert names
