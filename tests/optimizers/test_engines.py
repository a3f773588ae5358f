"""Engines of a run: what is built is a plan with its facts, and whatever the builder does, the run goes on."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from optimizers import engines
from optimizers.calibration import Samples
from optimizers.engines import build_engines, profile_of
from optimizers.report import EngineRecord
from server.artifact import Profile
from tests import models

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)

MLP_SAMPLES = Samples({"x": np.zeros((20, 64), np.float32)}, 20, batched=True)


# What stands in for the builder lives at module level, because a child process imports it.


def crash(*_: object) -> None:
    os._exit(11)


def hang(*_: object) -> None:
    threading.Event().wait()


def fault(*_: object) -> None:
    raise RuntimeError("an error that no one foresaw")


def build(model: Path, folder: Path, timeout_s: float = 120.0) -> EngineRecord:
    (record,) = build_engines({"fp32": model}, MLP_SAMPLES, 8, folder, timeout_s)
    return record


def test_profile_reaches_from_one_row_to_the_largest_batch():
    samples = Samples({"ids": np.zeros((20, 7), np.int64), "mask": np.zeros((20, 7), np.int64)}, 20, batched=True)
    one, many = (dict.fromkeys(("ids", "mask"), (rows, 7)) for rows in (1, 16))
    assert profile_of(samples, 16) == Profile(one, many, many)


def test_profile_of_inputs_without_a_batch_axis_is_their_shape():
    samples = Samples({"frame": np.zeros((20, 3, 5), np.float32)}, 20, batched=False, whole=frozenset({"frame"}))
    shape = {"frame": (3, 5)}
    assert profile_of(samples, 16) == Profile(shape, shape, shape)


@rtx
def test_engine_is_built_beside_the_artifact_and_recorded(mlp: Path, tmp_path: Path):
    record = build(mlp, tmp_path / "engines")
    assert record.status == "fp32: built"
    assert "not served" in record.reason
    size = (tmp_path / "engines" / "fp32.plan").stat().st_size
    assert record.facts["plan"] == f"engines/fp32.plan, {size} bytes"
    assert record.facts["builder"].startswith("tensorrt-rtx ")


@rtx
def test_refused_model_is_recorded_and_the_others_are_built(mlp: Path, tmp_path: Path):
    text = models.save_strings(tmp_path / "text.onnx")
    records = build_engines({"fp16": text, "fp32": mlp}, MLP_SAMPLES, 8, tmp_path / "engines", 120)
    assert [record.status for record in records] == ["fp16: refused", "fp32: built"]
    assert "cannot read" in records[0].reason
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["fp32.plan"]


@pytest.mark.parametrize(
    ("builder", "reason"),
    [
        (crash, "process ended without an answer"),
        (fault, "RuntimeError: an error that no one foresaw"),
    ],
)
def test_builder_that_fails_is_a_refusal(builder: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "build_engine", builder)
    record = build(tmp_path / "model.onnx", tmp_path / "engines")
    assert record.status == "fp32: refused"
    assert reason in record.reason
    assert record.facts == {}


def wait_for_exit(process: multiprocessing.Process) -> None:
    # Not ``join``: the pool's own thread waits as well, and who comes second learns the exit code a moment later.
    until_s = time.monotonic() + 10
    while process.exitcode is None and time.monotonic() < until_s:
        time.sleep(0.01)


def test_builder_that_hangs_is_stopped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = set(multiprocessing.active_children())
    other = multiprocessing.get_context("spawn").Process(target=hang, daemon=True)
    other.start()
    monkeypatch.setattr(engines, "build_engine", hang)
    try:
        record = build(tmp_path / "model.onnx", tmp_path / "engines", timeout_s=0.3)
        assert (record.status, record.reason) == ("fp32: refused", "stopped after 0.3 s")
        for builder in set(multiprocessing.active_children()) - before - {other}:
            wait_for_exit(builder)
            assert builder.exitcode == -signal.SIGKILL
        assert other.is_alive()
    finally:
        for left in set(multiprocessing.active_children()) - before:  # the interpreter waits for them when it ends
            left.kill()
            left.join()
