"""Runs sessions over held-out samples: the original's answers, the proof of batching, and a candidate's fidelity.

A *single* is one sample as one request would carry it: a row of one for inputs with a batch axis, the complete tensor
for the others. Singles run several at a time, each in its own thread; a session is thread-safe.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np

from optimizers.errors import PassFailed
from optimizers.evaluator import Evaluate
from optimizers.fidelity import compare, worse, worst_sqnr_db
from optimizers.masks import hide, mask_of
from optimizers.slices import slices_of
from server.artifact import Batching, Fidelity
from server.errors import InferenceFailed
from server.tensors import Array, Signature, Tensors

BATCHING_MIN_SQNR_DB = 40.0
"""Least SQNR of the original's batched against its single outputs.

Rounding alone gives 120 dB in most models and 55 dB in one whose activations reach 1e5; rows that influence each other
give less than 20 dB.
"""

BATCHING_MAX_CHANGED = 0.01
"""Largest share of decisions that batching may change, for near ties that rounding tips over."""


class Runner(Protocol):
    """What evidence needs of a session."""

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        """Run one request."""
        ...


class HeldOut(msgspec.Struct, frozen=True, dict=True):
    """Samples that no pass has seen, with the original's answers.

    Attributes:
        singles: One request per sample.
        reference: Name -> the original's output, axis 0 = samples.
        decision: What agreement counts, see ``fidelity.decision_for``.
        labels: Class per sample, or ``None``.
    """

    singles: tuple[Tensors, ...]
    reference: Tensors
    decision: str
    labels: Array | None = None

    @cached_property
    def mask(self) -> Array | None:
        """Which positions of the samples count, see ``masks.mask_of``."""
        return mask_of(self.singles)

    @cached_property
    def visible(self) -> Tensors:
        """The original's answers, zero at positions that the mask hides."""
        return hide(self.reference, self.mask)

    @cached_property
    def slices(self) -> dict[str, Array]:
        """How the samples are told apart, see ``slices.slices_of``."""
        return slices_of(self.reference, self.decision, self.singles, self.labels)


def join(singles: Sequence[Tensors]) -> dict[str, Array]:
    """Make one batch of several singles; for batchable models only."""
    return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}


def run_singly(session: Runner, singles: Sequence[Tensors], workers: int = 1) -> dict[str, Array]:
    """Run every sample alone; return name -> outputs with axis 0 = samples.

    Outputs with a batch axis are joined along it, others are stacked. Outputs whose shape depends on the sample are
    padded with zeros to the largest.
    """
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(session.run, singles))
    return stack(answers)


def stack(answers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Make name -> outputs with axis 0 = samples of the answers to single requests, see ``run_singly``."""
    return {name: _stack([answer[name] for answer in answers]) for name in answers[0]}


def run_batched(session: Runner, singles: Sequence[Tensors], rows: int, workers: int = 1) -> dict[str, Array]:
    """Run the samples in batches of ``rows``; return name -> outputs with axis 0 = samples.

    Raises:
        PassFailed: If an output does not have one row per sample.
    """
    # Every batch is full: the last one is filled up with the first samples, whose second answers are dropped.
    padded = [singles[i % len(singles)] for i in range(-(-len(singles) // rows) * rows)]
    batches = [join(padded[start : start + rows]) for start in range(0, len(padded), rows)]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(session.run, batches))
    for name, array in answers[0].items():
        if array.ndim == 0 or len(array) != rows:
            raise PassFailed(f"output '{name}' has shape {list(array.shape)} for a batch of {rows}")
    return {name: np.concatenate([answer[name] for answer in answers])[: len(singles)] for name in answers[0]}


def prove_batching(session: Runner, signature: Signature, held_out: HeldOut, rows: int, workers: int = 1) -> Batching:
    """Find out whether rows of different requests may share a run, by running the original batched against singly.

    Args:
        session: The original.
        signature: Its signature.
        held_out: Samples with the original's single answers.
        rows: The batch size to prove, also the largest that will be served.
        workers: Batches that run at a time.
    """
    if not _has_batch_axis(signature):
        return Batching(False, "axis 0 of the inputs and outputs is not one shared variable axis", 1)
    try:
        batched = run_batched(session, held_out.singles, rows, workers)
        agreement = compared(batched, held_out).agreement
    except (PassFailed, InferenceFailed) as exc:
        return Batching(False, f"a batch of {rows} fails: {exc}", 1)
    n, sqnr = len(held_out.singles), worst_sqnr_db(held_out.reference, batched)
    if sqnr < BATCHING_MIN_SQNR_DB:
        return Batching(
            False,
            f"batches of {rows} answer otherwise than single requests: SQNR {sqnr:.1f} dB < "
            f"{BATCHING_MIN_SQNR_DB:.0f} dB on {n} samples",
            1,
        )
    if 1 - agreement > BATCHING_MAX_CHANGED:
        return Batching(
            False, f"{1 - agreement:.1%} of the decisions differ between batches of {rows} and single requests", 1
        )
    seen = "identical" if sqnr >= 200 else f"{sqnr:.0f} dB"
    return Batching(True, f"batches of {rows} answer as single requests do ({seen}, {n} samples)", rows)


def fidelity_of(
    session: Runner, held_out: HeldOut, rows: int, workers: int = 1, evaluate: Evaluate | None = None
) -> Fidelity:
    """Compare a candidate with the original one by one and in batches of ``rows``; the worse counts.

    Dynamic INT8 takes its scale from the whole batch, so that a row's answer can depend on its neighbours.

    Args:
        session: The candidate.
        held_out: Samples with the original's single answers.
        rows: The batch size; 1 where rows must not share a run.
        workers: Runs at a time.
        evaluate: The user's metric, see ``evaluator``; its value stands in the place of the accuracy.

    Raises:
        PassFailed: If an output has another shape, or is NaN or infinite where the original's is finite, or if the
            evaluator fails on the candidate's outputs.
        CalibrationError: If the evaluator fails on the original's outputs.
        InferenceFailed: If the session fails.
    """
    alone = compared(run_singly(session, held_out.singles, workers), held_out, evaluate)
    if rows == 1:
        return alone
    return worse(alone, compared(run_batched(session, held_out.singles, rows, workers), held_out, evaluate))


def compared(outputs: Tensors, held_out: HeldOut, evaluate: Evaluate | None = None) -> Fidelity:
    """Compare answers to the held-out samples with the original's; what a mask hides does not count.

    Args:
        outputs: Name -> the candidate's output, axis 0 = samples.
        held_out: Samples with the original's answers.
        evaluate: The user's metric.

    Raises:
        PassFailed: As ``fidelity_of``.
        CalibrationError: As ``fidelity_of``.
    """
    seen = hide(outputs, held_out.mask)
    return compare(held_out.visible, seen, held_out.decision, held_out.labels, held_out.slices, evaluate)


def _has_batch_axis(signature: Signature) -> bool:
    """Whether axis 0 is one variable axis of all inputs, and variable in all outputs (exporters rename it there)."""
    inputs = {spec.shape[0] if spec.shape else 0 for spec in signature.inputs}
    outputs = [spec.shape[0] if spec.shape else 0 for spec in signature.outputs]
    return len(inputs) == 1 and not any(isinstance(axis, int) for axis in (*inputs, *outputs))


def _stack(arrays: Sequence[Array]) -> Array:
    if len({array.shape for array in arrays}) > 1:
        shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
        arrays = [np.pad(a, [(0, full - size) for full, size in zip(shape, a.shape, strict=True)]) for a in arrays]
    has_rows = arrays[0].ndim > 0 and arrays[0].shape[0] == 1
    return np.concatenate(arrays) if has_rows else np.stack(arrays)
