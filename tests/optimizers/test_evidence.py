"""Evidence: singles, the proof of batching on real models, and fidelity at the worse batch size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizers.errors import PassFailed
from optimizers.evidence import HeldOut, fidelity_of, join, prove_batching, run_batched, run_singly
from optimizers.fidelity import decision_for
from server.artifact import SessionOptions
from server.providers import CPU
from server.session import Session
from server.tensors import Array, Tensors
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
