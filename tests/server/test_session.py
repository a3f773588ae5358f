import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from server.artifact import SessionOptions
from server.errors import ArtifactError, InferenceFailed, ProviderUnavailable, SignatureMismatch, UnsupportedModel
from server.providers import CPU, Device
from server.session import MEASURED_ROWS, Session, check_text, measure_latency, synthetic_inputs
from server.tensors import Signature, TensorSpec
from tests import models
from tests.artifacts import random_inputs


def opened(path: Path) -> Session:
    return Session(path, CPU, SessionOptions())


def test_signature_comes_from_the_model(tmp_path: Path):
    session = opened(models.save_sequence(tmp_path / "sequence.onnx"))
    assert session.signature == Signature(
        (TensorSpec("ids", "INT64", ("batch", "sequence")), TensorSpec("mask", "INT64", ("batch", "sequence"))),
        (TensorSpec("vector", "FP32", ("batch", 8)),),
    )
    assert session.providers == ("CPUExecutionProvider",)
    assert session.device == CPU


def test_run_computes_the_model(mlp: Path):
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(mlp).graph.initializer}
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = np.maximum(x @ weights["w1"] + weights["b1"], 0) @ weights["w2"]
    # Sums of 64 products in another order.
    np.testing.assert_allclose(opened(mlp).run({"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


def test_wanted_outputs_come_in_the_order_asked_for(tmp_path: Path):
    session = opened(models.save_two_inputs(tmp_path / "two.onnx"))
    inputs = {"a": np.full((2, 4), 3, np.float32), "b": np.full((2, 4), 1, np.float32)}
    assert list(session.run(inputs)) == ["sum", "diff"]
    swapped = session.run(inputs, ("diff", "sum"))
    assert list(swapped) == ["diff", "sum"]
    assert swapped["diff"].tolist() == [[2.0] * 4] * 2
    assert list(session.run(inputs, ("diff",))) == ["diff"]


def test_views_and_read_only_arrays_are_taken(mlp: Path):
    session = opened(mlp)
    x = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    view = x[::2, ::2]
    body = np.frombuffer(view.tobytes(), np.float32).reshape(2, 64)
    assert not body.flags.writeable
    np.testing.assert_array_equal(session.run({"x": view})["y"], session.run({"x": body})["y"])


def test_text_goes_in_and_comes_out_as_bytes(tmp_path: Path):
    session = opened(models.save_strings(tmp_path / "strings.onnx"))
    texts = [b"plain", "žluťoučký 🐎".encode(), b"", b"nul\x00inside", b"b'x'"]
    outputs = session.run({"text": np.array(texts, object)})
    assert outputs["same"].tolist() == texts
    assert all(type(element) is bytes for element in outputs["same"])
    assert session.run({"text": np.array([], object)})["same"].shape == (0,)


def test_text_that_is_not_utf8_fails_and_is_found_before(tmp_path: Path):
    session = opened(models.save_strings(tmp_path / "strings.onnx"))
    inputs = {"text": np.array([b"good", b"\xff\xfe"], object)}
    with pytest.raises(InferenceFailed, match="can't decode byte 0xff"):
        session.run(inputs)
    with pytest.raises(SignatureMismatch, match=r"input 'text' must hold UTF-8 text: .* byte 0xff"):
        check_text(inputs)
    check_text({"text": np.array([b"good"], object), "x": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((1, 63), np.float32)},
        {"x": np.zeros((1, 64), np.float64)},
        {"x": np.zeros(64, np.float32)},
        {"z": np.zeros((1, 64), np.float32)},
        {},
    ],
    ids=["size", "dtype", "rank", "name", "none"],
)
def test_what_does_not_fit_fails_as_inference(mlp: Path, inputs: dict):
    session = opened(mlp)
    with pytest.raises(InferenceFailed, match=r"mlp\.onnx on cpu: "):
        session.run(inputs)
    assert session.run({"x": np.zeros((1, 64), np.float32)})["y"].shape == (1, 10)


def test_failing_kernel_fails_as_inference_without_noise(tmp_path: Path, capfd):
    session = opened(models.save_sequence(tmp_path / "sequence.onnx"))
    with pytest.raises(InferenceFailed, match="indices element out of data bounds"):
        session.run({"ids": np.full((1, 2), 1000), "mask": np.ones((1, 2), np.int64)})
    assert capfd.readouterr() == ("", "")


def test_one_session_runs_in_several_threads_at_once(mlp: Path):
    session = opened(mlp)
    inputs = [random_inputs(session.signature, rows=5, seed=seed) for seed in range(4)]
    expected = [session.run(feeds)["y"] for feeds in inputs]
    start = threading.Barrier(len(inputs))
    same: list[bool] = []

    def work(number: int) -> None:
        start.wait()
        same.extend(np.array_equal(session.run(inputs[number])["y"], expected[number]) for _ in range(100))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 400


def test_closed_session_does_not_run(mlp: Path):
    session = opened(mlp)
    session.close()
    with pytest.raises(InferenceFailed, match="is closed"):
        session.run({"x": np.zeros((1, 64), np.float32)})


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x08\x08"])
def test_unreadable_file_is_an_artifact_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        opened(path)


def test_truncated_model_is_an_artifact_error(mlp: Path):
    mlp.write_bytes(mlp.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"mlp\.onnx"):
        opened(mlp)


def test_unknown_operator_is_unsupported(tmp_path: Path):
    path = tmp_path / "custom.onnx"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Warp", ["x"], ["y"], domain="my.ops")], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(UnsupportedModel, match="Warp"):
        opened(path)


def test_sequence_output_is_unsupported(tmp_path: Path):
    path = tmp_path / "sequence.onnx"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(UnsupportedModel, match=r"'y' is a seq\(tensor\(float\)\)"):
        opened(path)


def test_bare_engine_is_unsupported(tmp_path: Path):
    with pytest.raises(UnsupportedModel, match=r"model\.plan is a bare TensorRT engine"):
        opened(tmp_path / "model.plan")


def test_gpu_that_is_not_there_is_an_error_and_not_the_cpu(mlp: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailable, match="CUDAExecutionProvider"):
        Session(mlp, Device("cuda"), SessionOptions())


def test_synthetic_inputs_fit_the_signature():
    signature = Signature(
        (
            TensorSpec("a", "FP16", ("batch", 3, None)),
            TensorSpec("b", "BYTES", ("batch",)),
            TensorSpec("c", "BOOL", (2,)),
            TensorSpec("d", "INT64", ()),
        ),
        (),
    )
    made = synthetic_inputs(signature, 5)
    signature.check(made)
    assert [array.shape for array in made.values()] == [(5, 3, 1), (5,), (2,), ()]
    assert made["b"].tolist() == [b"1"] * 5


class SlowSession:
    """A session whose runs take a time that depends on the rows, on a clock of its own."""

    def __init__(self, seconds_per_row: float) -> None:
        self.signature = Signature((TensorSpec("x", "FP32", ("batch",)),), ())
        self.seconds_per_row, self.now, self.runs = seconds_per_row, 0.0, 0

    def run(self, inputs: dict) -> dict:
        self.now += self.seconds_per_row * len(inputs["x"])
        self.runs += 1
        return {}


def test_latency_is_measured_for_every_size():
    session = SlowSession(1e-4)
    table = measure_latency(session, clock=lambda: session.now)
    assert table.rows == MEASURED_ROWS
    np.testing.assert_allclose(table.p50_ms, [0.1 * rows for rows in MEASURED_ROWS])
    assert all(low <= mid <= high for low, mid, high in zip(table.low_ms, table.p50_ms, table.high_ms, strict=True))
    assert session.now < 1.0


@pytest.mark.parametrize(("seconds", "rows"), [(0.02, (1, 2, 4)), (0.3, (1,)), (5.0, (1,))])
def test_slow_model_is_measured_at_fewer_sizes(seconds: float, rows: tuple[int, ...]):
    session = SlowSession(seconds)
    table = measure_latency(session, clock=lambda: session.now)
    assert table.rows == rows
    assert session.now <= max(1.2, 2 * seconds)


def test_real_session_is_measured(mlp: Path):
    table = measure_latency(opened(mlp), (1, 4), budget_s=0.01)
    assert table.rows == (1, 4)
    assert all(ms > 0 for ms in table.p50_ms)
