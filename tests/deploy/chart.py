"""Running helm on the chart, and reading what it renders."""

import functools
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "slipstream"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
NODE_VALUES = sorted(CHART.glob("values-*.yaml"))
RENDERINGS = [*CI_VALUES, *NODE_VALUES]

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Helm:
    """One helm command that sees no cluster and leaves nothing outside ``home``."""

    path: Path
    home: Path

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "KUBECONFIG": str(self.home / "none"), "PATH": "/usr/bin:/bin"}
        command = [str(self.path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=self.home)

    def template(self, *arguments: str | Path, release: str = "rel") -> list[Manifest]:
        """Render the chart; the test fails with helm's words when helm refuses."""
        text = self.template_text(*arguments, release=release)
        return [manifest for manifest in yaml.safe_load_all(text) if manifest]

    @functools.cache  # noqa: B019  (the chart does not change during the tests, and a helm is one of two)
    def template_text(self, *arguments: str | Path, release: str = "rel") -> str:
        outcome = self.run("template", release, CHART, "--namespace", "serving", *arguments)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    def refusal(self, *arguments: str | Path) -> str:
        """What helm says when it refuses to render; the test fails when it does not refuse."""
        outcome = self.run("template", "rel", CHART, *arguments)
        assert outcome.returncode != 0, f"helm accepted {arguments}"
        return outcome.stderr


def all_of(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    """Every manifest of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def find(manifests: Sequence[Manifest], kind: str, suffix: str = "") -> Manifest:
    """The only manifest of a kind, or the only one whose name ends so."""
    (manifest,) = (found for found in all_of(manifests, kind) if found["metadata"]["name"].endswith(suffix))
    return manifest


def workload_of(manifests: Sequence[Manifest]) -> Manifest:
    """The Deployment or the StatefulSet."""
    (manifest,) = (manifest for manifest in manifests if manifest["kind"] in ("Deployment", "StatefulSet"))
    return manifest


def pod_of(manifests: Sequence[Manifest]) -> Manifest:
    """The pod specification of the Deployment or the StatefulSet."""
    specification: Manifest = workload_of(manifests)["spec"]["template"]["spec"]
    return specification


def pods_of(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Every pod specification: the server's, the test's, those of Jobs."""
    templates = [manifest["spec"].get("template", manifest) for manifest in manifests if "spec" in manifest]
    return [template["spec"] for template in templates if "containers" in template["spec"]]


def server_of(manifests: Sequence[Manifest]) -> Manifest:
    """The only container of the server's pod."""
    (container,) = pod_of(manifests)["containers"]
    found: Manifest = container
    return found


def environment_of(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Variable -> value of the server's container; all values are text, as Kubernetes wants them."""
    (source,) = server_of(manifests)["envFrom"]
    variables: dict[str, str] = find(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    variables |= {entry["name"]: entry["value"] for entry in server_of(manifests).get("env", [])}
    assert all(isinstance(value, str) for value in variables.values())
    return variables


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; an empty mapping and a list count as values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
