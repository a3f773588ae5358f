"""The front door: what it offers, what it imports, and what it says when a package is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from server import cli
from server.settings import Settings
from slipstream import main

ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    result = run(
        "import sys, slipstream\n"
        "try: slipstream.main(['--help'])\n"
        "finally: print('heavy:', sorted({'numpy', 'onnx', 'onnxruntime', 'fastapi'} & set(sys.modules)))"
    )
    for command in ("optimize", "serve", "inspect", "verify", "build-engine"):
        assert f"\n  {command} " in result.stdout
    assert "heavy: []" in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("slipstream, version ")


def test_unknown_command_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["fly"])
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.output


@pytest.mark.parametrize("command", ["optimize", "inspect", "verify", "build-engine"])
def test_missing_optimizer_says_how_to_install_it(command: str) -> None:
    result = run(f"import sys; sys.modules['onnx'] = None; import slipstream; slipstream.main(['{command}', 'x'])")
    assert result.returncode == 1
    assert result.stderr == f"Error: {command} needs the package onnx, run: pip install 'slipstream-server[optimize]'\n"


def test_serving_needs_none_of_the_optimizers_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxslim', 'onnxscript', 'onnx_ir', 'optimizers', 'rich'): sys.modules[name] = None\n"
        "import slipstream; slipstream.main(['serve', '--help'])"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "REPOSITORY" in result.stdout


class Calls:
    """What ``serve`` started: optimizer processes, and servers; both only noted."""

    def __init__(self) -> None:
        self.optimized: list[list[str]] = []
        self.served: list[Settings] = []
        self.exit_code = 0

    def optimize(self, command: list[str], stdout: int) -> int:
        self.optimized.append(command[2:])
        if not self.exit_code:
            Path(command[command.index("--repository") + 1]).mkdir(parents=True, exist_ok=True)
        return self.exit_code

    def serve(self, settings: Settings, *, debug: bool) -> int:
        self.served.append(settings)
        return 0


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", calls.optimize)
    monkeypatch.setattr(cli, "run", calls.serve)
    return calls


def test_model_file_is_optimized_into_a_cache_and_served(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "my model.onnx").write_bytes(b"one")
    result = CliRunner().invoke(main, ["serve", "my model.onnx", "--port", "81"])
    assert result.exit_code == 0, result.output
    (settings,) = calls.served
    assert settings.port == 81
    assert settings.repository.is_relative_to(".slipstream/models")
    assert calls.optimized == [
        ["optimize", "my model.onnx", "--repository", str(settings.repository), "--name", "my-model"]
    ]


def test_cache_is_keyed_by_content_and_samples(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"one")
    (tmp_path / "data.npz").write_bytes(b"samples")
    plain, sampled = ["serve", "m.onnx"], ["serve", "m.onnx", "--calibration", "data.npz"]
    for command in (plain, plain, sampled):
        assert CliRunner().invoke(main, command).exit_code == 0
    (tmp_path / "m.onnx").write_bytes(b"two")
    assert CliRunner().invoke(main, plain).exit_code == 0
    first, again, with_samples, changed = [settings.repository for settings in calls.served]
    assert first == again
    assert len({first, with_samples, changed}) == 3
    assert calls.optimized[2][-2:] == ["--calibration", "data.npz"]


def test_failed_optimization_is_not_served(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"one")
    calls.exit_code = 1
    assert CliRunner().invoke(main, ["serve", "m.onnx"]).exit_code == 1
    assert calls.served == []


def test_repository_is_served_as_it_is(calls: Calls, tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["serve", str(tmp_path)]).exit_code == 0
    assert (calls.optimized, calls.served) == ([], [Settings(repository=tmp_path)])


def test_samples_without_a_model_file_are_wrong_usage(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"samples")
    result = CliRunner().invoke(main, ["serve", str(tmp_path), "--calibration", "data.npz"])
    assert result.exit_code == 2
    assert "--calibration goes with a model file" in result.output
