"""Evidence: singles, the proof of batching on real models, and fidelity at the worse batch size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizers.errors import PassFailed
from optimizers.evidence import HeldOut, fidelity_of, join, prove_batching, run_batched, run_singly
from optimizers.fidelity import decision_for
from server.artifact import SessionOptions
from server.errors import InferenceFailed
from server.providers import CPU
from server.session import Session
from server.tensors import Array, Signature, Tensors, TensorSpec
from tests import models


def opened(path: Path) -> Session:
    return Session(path, CPU, SessionOptions())


def singles_of(name: str, width: int, count: int = 20) -> tuple[Tensors, ...]:
    rng = np.random.default_rng(0)
    return tuple({name: rng.standard_normal((1, width)).astype(np.float32)} for _ in range(count))


def held_out_of(session: Session, singles: tuple[Tensors, ...]) -> HeldOut:
    reference = run_singly(session, singles)
    return HeldOut(singles, reference, decision_for(reference))


def prove(save: Callable[[Path], Path], path: Path, width: int):
    session = opened(save(path))
    singles = singles_of("x", width)
    return prove_batching(session, session.signature, held_out_of(session, singles), 8)


def test_batches_answer_as_singles_do_whatever_the_count(mlp: Path):
    session = opened(mlp)
    singles = singles_of("x", 64, count=21)
    alone = run_singly(session, singles, workers=2)
    assert alone["y"].shape == (21, 10)
    batched = run_batched(session, singles, rows=8, workers=2)
    np.testing.assert_allclose(batched["y"], alone["y"], rtol=1e-4, atol=1e-5)


def test_batching_is_proven_for_a_model_of_independent_rows(tmp_path: Path):
    found = prove(models.save_mlp, tmp_path / "m.onnx", 64)
    assert (found.batchable, found.max_rows) == (True, 8)
    assert "20 samples" in found.reason


def test_model_whose_rows_influence_each_other_is_never_batched(tmp_path: Path):
    found = prove(models.save_batch_mixing, tmp_path / "m.onnx", 4)
    assert (found.batchable, found.max_rows) == (False, 1)
    assert "SQNR" in found.reason


def test_model_with_the_batch_on_another_axis_is_never_batched(tmp_path: Path):
    found = prove(models.save_batch_on_axis_1, tmp_path / "m.onnx", 4)
    assert not found.batchable
    assert "axis 0" in found.reason


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (("batch", "batch"), 1),  # the output has one row, whatever comes in
        (("batch", 4), "batch"),  # one input has a fixed number of rows
        (("first", "second"), "batch"),  # nothing says that both inputs have as many rows
    ],
)
def test_without_one_shared_variable_axis_nothing_is_batched(inputs: tuple[str | int, ...], output: str | int):
    specs = tuple(TensorSpec(f"x{i}", "FP32", (rows, 4)) for i, rows in enumerate(inputs))
    signature = Signature(specs, (TensorSpec("y", "FP32", (output, 4)),))
    found = prove_batching(None, signature, None, 8)  # type: ignore[arg-type]  (it is not even tried)
    assert (found.batchable, found.max_rows) == (False, 1)
    assert "axis 0" in found.reason


def test_output_axis_of_another_name_is_still_the_batch(tmp_path: Path):
    session = opened(models.save_mlp(tmp_path / "m.onnx"))
    renamed = Signature(session.signature.inputs, (TensorSpec("y", "FP32", ("rows", 10)),))
    assert prove_batching(session, renamed, held_out_of(session, singles_of("x", 64)), 8).batchable


class Fake:
    """Answers x, and on batches what a test adds or raises."""

    def __init__(self, on_batch: Callable[[Array], Array]) -> None:
        self.on_batch = on_batch

    def run(self, inputs: Tensors) -> dict[str, Array]:
        return {"y": self.on_batch(inputs["x"]) if len(inputs["x"]) > 1 else inputs["x"]}


FOUR = Signature((TensorSpec("x", "FP32", ("batch", 4)),), (TensorSpec("y", "FP32", ("batch", 4)),))


def test_batch_that_fails_is_the_reason():
    def fail(_: Array) -> Array:
        raise InferenceFailed("Reshape cannot do that")

    singles = singles_of("x", 4)
    found = prove_batching(Fake(fail), FOUR, HeldOut(singles, {"y": join(singles)["x"]}, "top1"), 8)
    assert not found.batchable
    assert found.reason == "a batch of 8 fails: Reshape cannot do that"


def test_decisions_that_change_in_batches_forbid_them_however_small_the_difference():
    def tip(x: Array) -> Array:
        return x + np.array([0, 1e-3, 0, 0], np.float32)

    singles = [{"x": np.array([[1, 1 - 5e-4, 0, 0]], np.float32)}] * 20
    held_out = HeldOut(tuple(singles), {"y": join(singles)["x"]}, "top1")
    found = prove_batching(Fake(tip), FOUR, held_out, 8)
    assert not found.batchable
    assert found.reason.startswith("100.0% of the decisions differ")


def test_rounding_in_batches_is_allowed():
    singles = singles_of("x", 4)
    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1")
    assert prove_batching(Fake(lambda x: x * np.float32(1 + 1e-6)), FOUR, held_out, 8).batchable


def test_labels_give_accuracy_and_the_worse_one_counts():
    singles = singles_of("x", 4, count=32)
    truth = join(singles)["x"]
    held_out = HeldOut(singles, {"y": truth}, "top1", labels=truth.argmax(axis=1))
    found = fidelity_of(Fake(lambda x: -x), held_out, rows=8)
    assert (found.accuracy_original, found.accuracy, found.agreement) == (1.0, 0.0, 0.0)
    assert fidelity_of(Fake(lambda x: -x), held_out, rows=1).accuracy == 1.0


def test_candidate_that_gives_nan_only_in_batches_is_refused():
    singles = singles_of("x", 4)
    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1")
    with pytest.raises(PassFailed, match="NaN"):
        fidelity_of(Fake(lambda x: x * np.float32("nan")), held_out, rows=8)


def test_outputs_without_a_batch_axis_are_stacked(tmp_path: Path):
    session = opened(models.save_batch_on_axis_1(tmp_path / "m.onnx"))
    assert run_singly(session, singles_of("x", 4, count=5))["state"].shape == (5, 2, 1, 4)


def test_outputs_of_unequal_length_are_padded():
    class Ragged:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"boxes": np.ones((int(inputs["n"][0]), 4), np.float32)}

    singles = [{"n": np.array([count])} for count in (2, 3)]
    boxes = run_singly(Ragged(), singles)["boxes"]
    assert boxes.shape == (2, 3, 4)
    assert boxes.sum() == 5 * 4


def test_fidelity_is_the_worse_of_single_and_batched():
    class DisturbedByNeighbours:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            noise = 0.5 if len(inputs["x"]) > 1 else 0.0
            return {"y": inputs["x"] + noise * np.arange(4, dtype=np.float32)}

    singles = singles_of("x", 4, count=32)
    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1")
    assert fidelity_of(DisturbedByNeighbours(), held_out, rows=1).agreement == 1.0
    assert fidelity_of(DisturbedByNeighbours(), held_out, rows=8).agreement < 0.9


def test_output_that_does_not_have_one_row_per_sample_is_refused():
    class Summing:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"y": inputs["x"].sum(axis=0, keepdims=True)}

    with pytest.raises(PassFailed, match="'y' has shape"):
        run_batched(Summing(), singles_of("x", 4), rows=4)


def test_evaluator_is_asked_for_both_and_the_worse_answer_counts():
    def mean(outputs: Tensors, labels: Array | None) -> float:
        return float(outputs["y"].mean())

    singles = tuple({"x": np.array([[1.0, 2.0, 3.0, i % 5]], np.float32)} for i in range(32))
    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1", labels=np.zeros(32, np.int64))
    found = fidelity_of(Fake(lambda x: x / 2), held_out, rows=8, evaluate=mean)
    assert found.accuracy_original == pytest.approx(held_out.reference["y"].mean())
    assert found.accuracy == pytest.approx(found.accuracy_original / 2)


def test_worst_slice_comes_with_the_fidelity():
    rng = np.random.default_rng(0)
    lengths = np.arange(80) % 8 + 1
    singles = tuple(
        {"x": rng.standard_normal((1, 4)).astype(np.float32), "mask": (np.arange(8)[None] < n).astype(np.int64)}
        for n in lengths
    )

    class SpoilsLong:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"y": np.where(inputs["mask"].sum(axis=1, keepdims=True) > 6, -inputs["x"], inputs["x"])}

    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1")
    found = fidelity_of(SpoilsLong(), held_out, rows=8)
    assert found.worst_slice.name == "length quarter 4"
    assert (found.worst_slice.samples, found.worst_slice.agreement) == (20, 0.0)
    assert found.agreement == pytest.approx(0.75)


def test_what_a_mask_hides_does_not_count():
    rng = np.random.default_rng(0)
    singles = tuple(
        {
            "x": rng.standard_normal((1, 8, 5)).astype(np.float32),
            "mask": (np.arange(8)[None] < 1 + i % 8).astype(np.int64),
        }
        for i in range(40)
    )

    class SpoilsHidden:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"y": np.where(inputs["mask"][:, :, None] == 0, np.float32("nan"), inputs["x"])}

    class SpoilsSeen:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            return {"y": np.where(inputs["mask"][:, :, None] == 1, -inputs["x"], inputs["x"])}

    reference = {"y": join(singles)["x"]}
    held_out = HeldOut(singles, reference, decision_for(reference))
    assert held_out.decision == "tokens"
    found = fidelity_of(SpoilsHidden(), held_out, rows=8)
    assert (found.agreement, found.sqnr_db, found.cosine_worst) == (1.0, 200.0, pytest.approx(1.0))
    assert fidelity_of(SpoilsSeen(), held_out, rows=8).agreement == 0.0


def test_slices_and_mask_are_found_out_once():
    singles = singles_of("x", 4, count=32)
    held_out = HeldOut(singles, {"y": join(singles)["x"]}, "top1")
    assert held_out.slices is held_out.slices
    assert set(held_out.slices) == {"class", "margin quarter"}
    assert held_out.mask is None
    assert held_out.visible is held_out.reference
