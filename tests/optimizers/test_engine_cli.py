"""The command ``build-engine``: what it writes, what it says, and what is left after an error or Ctrl-C."""

import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from optimizers import engine_cli
from optimizers.engine import EngineOptions, build_engine
from server.artifact import Profile
from tests.artifacts import write_plain
from tests.end_to_end.process import Server
from tests.models import save_sequence

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)

BASE = ("--flavour", "tensorrt-rtx", "--capability", "8.6")
SHAPES = ("--profile", "x=1x64:8x64:32x64")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(engine_cli.build_engine, [str(argument) for argument in arguments])


@rtx
def test_command_writes_the_plan_that_its_options_ask_for(mlp: Path, tmp_path: Path):
    result = run(
        mlp, "--out", tmp_path / "a.plan", *BASE, *SHAPES, "--capability", "8.9", "--workspace-mb", 64, "--tf32"
    )
    assert result.exit_code == 0, result.output
    size = (tmp_path / "a.plan").stat().st_size
    assert result.stdout.startswith(f"{tmp_path / 'a.plan'}: {size} bytes for 8.6, 8.9, tensorrt-rtx ")
    assert "built in" in result.stdout
    assert "Building engine" in result.stderr
    options = EngineOptions("tensorrt-rtx", workspace_bytes=64_000_000, capabilities=("8.6", "8.9"), tf32=True)
    build_engine(mlp, Profile(*({"x": (rows, 64)} for rows in (1, 8, 32))), tmp_path / "b.plan", options)
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


@rtx
def test_second_build_is_taken_from_the_cache(mlp: Path, tmp_path: Path):
    for name, state in (("a.plan", "built in"), ("b.plan", "from the cache")):
        result = run(mlp, "--out", tmp_path / name, *BASE, *SHAPES, "--cache", tmp_path / "cache")
        assert state in result.stdout
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


@rtx
def test_profiles_come_from_data(mlp: Path, tmp_path: Path):
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 64), np.float32))
    data = ("--calibration", tmp_path / "data.npz", "--rows", 8, "--rows", 32)
    text = ("--profile", "x=1x64:8x64:8x64", "--profile", "x=9x64:32x64:32x64")
    assert run(mlp, "--out", tmp_path / "a.plan", *BASE, *data).exit_code == 0
    assert run(mlp, "--out", tmp_path / "b.plan", *BASE, *text).exit_code == 0
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


@rtx
def test_profiles_come_from_the_requests_of_a_server(tmp_path: Path):
    sequence = save_sequence(tmp_path / "sequence.onnx")
    with Server(write_plain(tmp_path / "models", "sequence", "1", sequence).parents[1]) as server:
        for length in (8, 8, 4):
            tensors = [
                {"name": name, "datatype": "INT64", "shape": [1, length], "data": [1] * length}
                for name in ("ids", "mask")
            ]
            answer = httpx.post(f"{server.url}/v2/models/sequence/infer", json={"inputs": tensors})
            assert answer.status_code == 200, answer.text
        traffic = ("--traffic", f"{server.url}/v2/models/sequence/shapes", "--rows", 8)
        result = run(sequence, "--out", tmp_path / "a.plan", *BASE, *traffic)
    assert result.exit_code == 0, result.output
    text = [part for name in ("ids", "mask") for part in ("--profile", f"{name}=1x4:8x8:8x8")]
    assert run(sequence, "--out", tmp_path / "b.plan", *BASE, *text).exit_code == 0
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_traffic_that_cannot_be_read_says_so(mlp: Path, tmp_path: Path):
    result = run(mlp, "--out", tmp_path / "a.plan", "--traffic", tmp_path / "missing.json", "--rows", 8)
    assert result.exit_code == 1
    assert "No such file" in result.stderr


@rtx
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), r"the profile has no shapes for 'x' [-1, 64]"),
        (("--profile", "x=1x64:8x64"), "profile 'x=1x64:8x64'; it is INPUT=MIN:BEST:MAX"),
        (("--profile", "x=8x64:1x64:32x64"), "minimum <= optimum <= maximum"),
        (("--profile", "z=1x64"), "the profile names ['z']; the model takes ['x']"),
        ((*SHAPES, "--capability", "9.0"), "cannot build for compute capability 9.0"),
        ((*SHAPES, "--level", "3"), "tensorrt-rtx does not know a builder level"),
        ((*SHAPES, "--level", "9"), "builder level 9; it is 0 to 5"),
    ],
)
def test_error_is_one_line_and_nothing_is_written(mlp: Path, tmp_path: Path, options: tuple[str, ...], reason: str):
    result = run(mlp, "--out", tmp_path / "new" / "a.plan", *BASE, *options)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert reason in line
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--rows", "8"), "--rows needs --calibration or --traffic"),
        (("--calibration", "DATA"), "--calibration needs --rows"),
        (("--calibration", "DATA", "--rows", "8", *SHAPES), "are ways to say the same"),
        (("--flavour", "other"), "'other' is not one of"),
        (("--calibration", "none.npz", "--rows", "8"), "'none.npz' does not exist"),
    ],
)
def test_wrong_usage_is_told(mlp: Path, tmp_path: Path, options: tuple[str, ...], reason: str):
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 64), np.float32))
    given = [str(tmp_path / "data.npz") if option == "DATA" else option for option in options]
    result = run(mlp, "--out", tmp_path / "a.plan", *given)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_missing_file_is_told(tmp_path: Path):
    result = run(tmp_path / "none.onnx", "--out", tmp_path / "a.plan")
    assert result.exit_code == 2
    assert "none.onnx' does not exist" in result.stderr


def test_missing_builder_says_what_to_install(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("optimizers.engine.importlib.import_module", missing)
    result = run(mlp, "--out", tmp_path / "a.plan", *SHAPES)
    assert result.exit_code == 1
    assert "Install one: pip install 'slipstream-server[gpu]' or 'slipstream-server[rtx]'" in result.stderr


@rtx
@pytest.mark.parametrize("cached", [False, True])
def test_ctrl_c_cancels_and_leaves_nothing(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool):
    interrupted = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    @contextmanager
    def progress() -> Iterator[object]:
        def show(phase: str, share: float) -> None:
            if not interrupted.is_set():  # the first step: Ctrl-C, while the builder's own code runs
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                assert interrupted.wait(10)

        yield show

    monkeypatch.setattr(engine_cli, "progress", progress)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        cache = ("--cache", tmp_path / "cache") if cached else ()
        result = run(mlp, "--out", tmp_path / "new" / "a.plan", *BASE, *SHAPES, *cache)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted.is_set()
    assert result.exit_code == 1
    assert "Aborted!" in result.stderr
    assert not (tmp_path / "new").exists()
    assert [path for path in tmp_path.glob("cache/**/*") if path.is_file()] == []
