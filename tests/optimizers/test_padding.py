"""The proof of padding on real models: masked, unmasked, per token, with positions that end, and with no such axis."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizers.evidence import HeldOut, run_singly
from optimizers.fidelity import decision_for
from optimizers.padding import prove_padding
from server.artifact import Padding, SessionOptions
from server.providers import CPU
from server.session import Session
from server.tensors import Array, Signature, Tensors, TensorSpec
from tests import models
from tests.models import FLOAT, INT64

NODE = helper.make_node
TABLE = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)


def opened(path: Path) -> Session:
    return Session(path, CPU, SessionOptions())


def sequence_model(
    path: Path, nodes: list, output: tuple, weights: dict[str, Array], inputs: tuple = ("ids",)
) -> Session:
    """Inputs INT64 [batch,sequence]; ``table`` and ``axis1`` are there."""
    weights = {"table": TABLE, "axis1": np.array([1], np.int64), **weights}
    graph = helper.make_graph(
        nodes,
        "sequence",
        [helper.make_tensor_value_info(name, INT64, ["batch", "sequence"]) for name in inputs],
        [helper.make_tensor_value_info(*output)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return opened(path)


def ids_of(count: int = 20, length: int = 7) -> tuple[Tensors, ...]:
    rng = np.random.default_rng(1)
    return tuple({"ids": rng.integers(1, 100, (1, length))} for _ in range(count))


def masked(count: int = 20, length: int = 7) -> tuple[Tensors, ...]:
    return tuple(
        {**single, "mask": (np.arange(length)[None] < 2 + i % (length - 1)).astype(np.int64)}
        for i, single in enumerate(ids_of(count, length))
    )


def prove(session: Session, singles: tuple[Tensors, ...]) -> Padding:
    decision = decision_for(run_singly(session, singles))
    return prove_padding(session, session.signature, held_out(singles, decision), workers=2)


def held_out(singles: tuple[Tensors, ...], decision: str) -> HeldOut:
    return HeldOut(singles, {}, decision)


def test_masked_mean_may_be_padded(tmp_path: Path):
    found = prove(opened(models.save_sequence(tmp_path / "m.onnx")), masked())
    assert found.paddable
    assert found.axes == {"ids": 1, "mask": 1}
    assert found.output_axes == {}
    assert found.value == 0
    assert "axis 'sequence'" in found.reason
    assert "20 samples, from length 7 to 14" in found.reason


def test_unmasked_mean_may_not_and_the_reason_has_numbers(tmp_path: Path):
    nodes = [NODE("Gather", ["table", "ids"], ["e"]), NODE("ReduceMean", ["e"], ["y"], axes=[1], keepdims=0)]
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["batch", 8]), {})
    found = prove(session, ids_of())
    assert not found.paddable
    assert found.axes == {}
    assert "from length 7 to 8, change the answers: SQNR" in found.reason
    assert "dB < 40 dB on 20 samples" in found.reason


def test_one_zero_that_changes_nothing_does_not_prove_more_of_them(tmp_path: Path):
    """A mean over windows of two: the first zero falls into a window that is cut off."""
    nodes = [
        NODE("Gather", ["table", "ids"], ["e"]),
        NODE("Transpose", ["e"], ["t"], perm=[0, 2, 1]),
        NODE("MaxPool", ["t"], ["p"], kernel_shape=[2], strides=[2]),
        NODE("ReduceMean", ["p"], ["y"], axes=[2], keepdims=0),
    ]
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["batch", 8]), {})
    found = prove(session, ids_of(length=6))
    assert not found.paddable
    assert "from length 6 to 12, change the answers" in found.reason


def test_output_per_token_is_cut_back(tmp_path: Path):
    nodes = [NODE("Gather", ["table", "ids"], ["y"])]
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["batch", "tokens", 8]), {})
    found = prove(session, ids_of())
    assert found.paddable
    assert (found.axes, found.output_axes) == ({"ids": 1}, {"y": 1})


def test_output_per_token_that_sees_the_padding_is_refused(tmp_path: Path):
    nodes = [
        NODE("Gather", ["table", "ids"], ["e"]),
        NODE("ReduceMean", ["e"], ["m"], axes=[1], keepdims=1),
        NODE("Sub", ["e", "m"], ["y"]),
    ]
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["batch", "tokens", 8]), {})
    found = prove(session, ids_of())
    assert not found.paddable
    assert "change the answers" in found.reason


def test_output_that_grows_otherwise_is_refused(tmp_path: Path):
    nodes = [NODE("Gather", ["table", "ids"], ["e"]), NODE("Concat", ["e", "e"], ["y"], axis=1)]
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["batch", "tokens", 8]), {})
    found = prove(session, ids_of())
    assert not found.paddable
    assert "output 'y' has shape [1, 14, 8] at length 7 and [1, 16, 8] at 8" in found.reason


def positions_model(path: Path) -> Session:
    """Learned positions up to 8: anything longer fails."""
    nodes = [
        NODE("Gather", ["table", "ids"], ["e"]),
        NODE("Shape", ["ids"], ["n"], start=1, end=2),
        NODE("Squeeze", ["n"], ["length"]),
        NODE("Range", ["zero", "length", "one"], ["range"]),
        NODE("Gather", ["positions", "range"], ["p"]),
        NODE("Add", ["e", "p"], ["y"]),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "positions": TABLE[:8]}
    return sequence_model(path, nodes, ("y", FLOAT, ["batch", "tokens", 8]), weights)


def test_where_positions_end_halves_are_padded_to_the_whole(tmp_path: Path):
    found = prove(positions_model(tmp_path / "m.onnx"), ids_of(length=8))
    assert (found.paddable, found.output_axes) == (True, {"y": 1})
    assert "from length 4 to length 8, beyond which it fails: " in found.reason


def test_model_that_takes_one_length_only_is_refused(tmp_path: Path):
    nodes = [NODE("Gather", ["table", "ids"], ["e"]), NODE("Reshape", ["e", "shape"], ["y"])]
    weights = {"shape": np.array([-1, 56], np.int64)}
    session = sequence_model(tmp_path / "m.onnx", nodes, ("y", FLOAT, ["rows", 56]), weights)
    found = prove(session, ids_of())
    assert not found.paddable
    assert found.reason.startswith("padding axis 'sequence' fails: ")


def test_samples_of_unequal_length_are_each_padded_from_their_own(tmp_path: Path):
    session = opened(models.save_sequence(tmp_path / "m.onnx"))
    singles = [{name: array[:, : 3 + i % 5] for name, array in single.items()} for i, single in enumerate(masked())]
    found = prove(session, tuple(singles))
    assert found.paddable
    assert "from length 3 to 14" in found.reason


def test_vision_model_has_no_such_axis(tmp_path: Path):
    session = opened(models.save_cnn(tmp_path / "m.onnx"))
    found = prove(session, ({"image": np.zeros((1, 3, 16, 16), np.float32)},))
    assert found == Padding(False, "no variable axis with a name beside the batch")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TensorSpec("x", "FP32", ("batch", "n", "n")), "axis 'n' occurs twice in one input"),
        (TensorSpec("x", "BYTES", ("batch", "n")), "axis 'n' holds text, which has no zero"),
        (TensorSpec("x", "FP32", ("batch", None)), "no variable axis with a name beside the batch"),
        (TensorSpec("x", "FP32", ("batch", "batch")), "no variable axis with a name beside the batch"),
    ],
)
def test_axes_that_cannot_be_padded_are_not_even_tried(spec: TensorSpec, reason: str):
    found = prove_padding(None, Signature((spec,), ()), held_out(({},), "close"))  # type: ignore[arg-type]
    assert found == Padding(False, reason)


def test_of_two_axes_the_one_that_may_be_padded_is_found(tmp_path: Path):
    """x [batch,rows,columns] -> the mean over the columns of the sum over the rows."""
    nodes = [
        NODE("ReduceSum", ["x", "axis1"], ["s"], keepdims=0),
        NODE("ReduceMean", ["s"], ["y"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", "columns"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.array([1], np.int64), "axis1")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    singles = tuple({"x": np.random.default_rng(i).random((1, 3, 5), np.float32)} for i in range(4))
    found = prove(opened(path), singles)
    assert (found.paddable, found.axes) == (True, {"x": 1})


def test_answers_that_padding_changes_are_refused_whatever_they_decide():
    class Growing:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"y": np.array([[2.0, 1.0, 0.0]], np.float32) * np.float32(1 + 0.05 * (inputs["x"].shape[1] - 4))}

    signature = Signature((TensorSpec("x", "FP32", ("batch", "n")),), (TensorSpec("y", "FP32", ("batch", 3)),))
    found = prove_padding(Growing(), signature, held_out(({"x": np.ones((1, 4), np.float32)},) * 8, "top1"))
    assert not found.paddable
    assert "from length 4 to 5, change the answers: SQNR 26.0 dB < 40 dB on 8 samples" in found.reason


@pytest.mark.parametrize("decision", ["top1", "top1 of y", "close"])
def test_decisions_that_padding_tips_over_are_refused_however_small_the_difference(decision: str):
    class Tipping:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            longer = inputs["x"].shape[1] > 4
            return {"y": np.array([[1.0, 0.9995 + (0.001 if longer else 0), -1.0]], np.float32)}

    signature = Signature((TensorSpec("x", "FP32", ("batch", "n")),), (TensorSpec("y", "FP32", ("batch", 3)),))
    found = prove_padding(Tipping(), signature, held_out(({"x": np.ones((1, 4), np.float32)},) * 8, decision))
    if decision == "close":  # nobody reads a class from these outputs
        assert found.paddable
        return
    assert not found.paddable
    assert found.reason.endswith("from length 4 to 5, change 100.0% of the decisions on 8 samples")
