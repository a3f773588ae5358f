"""Engines of a run: what is built is a plan with its facts, and whatever the builder does, the run goes on."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizers import engines
from optimizers.calibration import Samples
from optimizers.engine import EngineOptions
from optimizers.engines import EnginePolicy, build_engines, has_sparse_weights
from optimizers.profiles import profile_of
from optimizers.report import EngineRecord
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
    (record,) = build_engines({"fp32": model}, profile_of(MLP_SAMPLES, 8), folder, timeout_s)
    return record


@rtx
def test_engine_is_built_beside_the_artifact_and_recorded(mlp: Path, tmp_path: Path):
    record = build(mlp, tmp_path / "engines")
    assert record.status == "fp32: built"
    assert "a server tries it" in record.reason
    size = (tmp_path / "engines" / "fp32.plan").stat().st_size
    assert record.facts["plan"] == f"engines/fp32.plan, {size} bytes"
    assert record.facts["builder"].startswith("tensorrt-rtx ")


@rtx
def test_engine_of_an_earlier_run_is_taken_from_the_cache(mlp: Path, tmp_path: Path):
    policy = EnginePolicy(tmp_path / "cache", EngineOptions(flavour="tensorrt-rtx", capabilities=("8.9",)))
    records = []
    for run in ("one", "two"):
        records += build_engines({"fp32": mlp}, profile_of(MLP_SAMPLES, 8), tmp_path / run, 120, policy)
    assert [record.facts["cache"] for record in records] == ["built now", "hit"]
    assert [record.facts["compute capabilities"] for record in records] == ["8.9", "8.9"]
    assert (tmp_path / "one" / "fp32.plan").read_bytes() == (tmp_path / "two" / "fp32.plan").read_bytes()


def layer(op: str, weight: np.ndarray, shape: list[int], **attributes: int) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    return helper.make_model(
        helper.make_graph([node], "one", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    )


PATTERN = np.tile(np.array([1, 0, 0, 1], np.float32), 2)  # of 8 inputs


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_sparse_weights_are_those_with_the_pattern_along_their_inputs(dtype: type):
    rows = np.tile(PATTERN[:, None], (1, 4)).astype(dtype)
    assert has_sparse_weights(layer("MatMul", rows, [1, 8]))
    assert not has_sparse_weights(layer("MatMul", rows.T.copy(), [1, 8]))  # full along its inputs
    assert has_sparse_weights(layer("Gemm", rows, [1, 8]))
    assert has_sparse_weights(layer("Gemm", rows.T.copy(), [1, 8], transB=1))
    assert not has_sparse_weights(layer("Gemm", rows, [1, 8], transB=1))
    kernel = np.tile(PATTERN[None, :, None, None], (4, 1, 3, 3)).astype(dtype)
    assert has_sparse_weights(layer("Conv", kernel, [1, 8, 5, 5]))
    assert not has_sparse_weights(layer("Conv", kernel.swapaxes(0, 1).copy(), [1, 4, 5, 5]))


def test_weights_without_the_pattern_are_not_sparse(mlp: Path):
    assert not has_sparse_weights(onnx.load(mlp))
    assert not has_sparse_weights(layer("MatMul", np.zeros((8, 4), np.float32), [1, 8]))
    assert not has_sparse_weights(layer("MatMul", np.ones((6, 4), np.float32), [1, 6]))
    assert not has_sparse_weights(layer("Add", np.zeros(8, np.float32), [1, 8]))


@rtx
def test_refused_model_is_recorded_and_the_others_are_built(mlp: Path, tmp_path: Path):
    text = models.save_strings(tmp_path / "text.onnx")
    records = build_engines({"fp16": text, "fp32": mlp}, profile_of(MLP_SAMPLES, 8), tmp_path / "engines", 120)
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
    monkeypatch.setattr(engines, "build_plan", builder)
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
    monkeypatch.setattr(engines, "build_plan", hang)
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
