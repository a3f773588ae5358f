"""What ``slipstream doctor`` sees and what it advises."""

import json
import resource
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server import doctor as module
from server.doctor import doctor
from server.errors import EnvironmentConflict
from server.host import read_host
from server.libraries import Obstacle
from server.providers import CPU, Device, Devices
from tests.artifacts import edit_manifest, write_artifact, write_plain


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    version = write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp})
    edit_manifest(version, host={"fingerprint": read_host().fingerprint})
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def _free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_PORT", "0")


def ask(folder: Path) -> Result:
    return CliRunner().invoke(doctor, [str(folder)])


def findings(folder: Path) -> dict[str, tuple[str, str, str]]:
    result = CliRunner().invoke(doctor, [str(folder), "--json"])
    return {entry["what"]: (entry["state"], entry["seen"], entry["cure"]) for entry in json.loads(result.stdout)}


def test_healthy_machine_has_nothing_to_mend(folder: Path):
    result = ask(folder)
    assert result.exit_code == 0, result.output
    assert "ok    mlp/1" in result.output
    assert "whole, optimized on this kind of host: fp32" in result.output
    seen = findings(folder)
    assert seen["onnxruntime"][0] == seen["settings"][0] == seen["port"][0] == "ok"
    assert seen["devices"][1].endswith("cpu")


def test_unknown_setting_must_be_mended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_PROT", "80")
    result = ask(folder)
    assert result.exit_code == 1
    assert "fix   settings" in result.output
    assert "unknown environment variable SLIPSTREAM_PROT" in result.output


def test_taken_port_must_be_mended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("SLIPSTREAM_PORT", str(listening.getsockname()[1]))
        assert ask(folder).exit_code == 1
        state, seen, cure = findings(folder)["port"]
    assert (state, "Address already in use" in seen, "another --port" in cure) == ("fix", True, True)


def test_missing_and_empty_repositories_must_be_mended(tmp_path: Path):
    state, seen, cure = findings(tmp_path / "none")["repository"]
    assert (state, "No such file" in seen, cure.startswith("slipstream optimize")) == ("fix", True, True)
    assert findings(tmp_path)["repository"][:2] == ("fix", f"no models in {tmp_path}")


def test_damaged_artifact_must_be_mended(folder: Path):
    (folder / "mlp" / "1" / "fp32" / "model.onnx").write_bytes(b"cut short")
    state, seen, _ = findings(folder)["mlp/1"]
    assert state == "fix"
    assert "has SHA-256" in seen


def test_plain_and_foreign_models_could_be_better(folder: Path, mlp: Path):
    write_plain(folder, "plain", "1", mlp)
    edit_manifest(folder / "mlp" / "1", host={"fingerprint": "elsewhere"})
    (folder / "notes").mkdir()
    seen = findings(folder)
    assert seen["plain/1"][:2] == ("warn", "a plain model, unoptimized")
    assert seen["mlp/1"][1] == "whole, optimized on another kind of host: fp32"
    assert seen["repository"][0] == "warn"
    assert ask(folder).exit_code == 0


def test_two_onnxruntimes_must_be_mended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def conflict() -> str:
        raise EnvironmentConflict(
            "onnxruntime 1 and onnxruntime-gpu 1 overwrite each other's files; run: pip uninstall -y"
        )

    monkeypatch.setattr(module, "check_environment", conflict)
    state, seen, cure = findings(folder)["onnxruntime"]
    assert (state, seen) == ("fix", "onnxruntime 1 and onnxruntime-gpu 1 overwrite each other's files")
    assert cure == "run: pip uninstall -y"


def test_gpu_that_cannot_be_used_is_an_accident(folder: Path, monkeypatch: pytest.MonkeyPatch):
    missing = Obstacle("missing_library", "libcublas.so.13 not found")
    found = Devices((Device("cuda", 1), CPU), {"cuda:0": missing})
    monkeypatch.setattr(module, "find_devices", lambda _: found)
    monkeypatch.setattr(module, "obstacle_of", lambda _: Obstacle("missing_library", "no TensorRT runtime"))
    seen = findings(folder)
    assert seen["devices"][1] == "cuda:1, cpu"
    assert seen["cuda:0"][:2] == ("warn", "not used: libcublas.so.13 not found")
    assert seen["engines 1"][:2] == ("warn", "no TensorRT runtime")


def test_required_gpu_that_is_missing_must_be_mended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_GPU", "require")
    state, seen, cure = findings(folder)["devices"]
    if state == "ok":
        pytest.skip("a GPU works here")
    assert seen.startswith("no GPU can be used: ")
    assert "SLIPSTREAM_GPU=prefer" in cure


def test_few_open_files_could_be_more(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524_288))
    assert findings(folder)["open files"] == ("warn", "1024 at a time", "ulimit -n 65536: each client takes one")


def test_shared_memory_is_counted_for_workers(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_WORKERS", "2")
    monkeypatch.setenv("SLIPSTREAM_SLAB_BYTES", str(1 << 50))
    assert findings(folder)["shared memory"][0] == "fix"
