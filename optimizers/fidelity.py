"""How well a candidate reproduces the original on samples that no pass has seen.

No labels are needed: what counts is whether the candidate *decides* as the original does (see ``decisions``). Beside
the share of equal decisions stand its interval, the worst slice, and how far the numbers are off: cosine per sample,
signal-to-noise ratio per output, divergence of the class distributions. With labels or an evaluator the task metric of
both comes on top.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from optimizers.decisions import CLOSE_RTOL, LEAST_NEIGHBOURS, agreements, classes_of, decision_for
from optimizers.divergence import divergence, top5_agreement
from optimizers.errors import CalibrationError, PassFailed
from optimizers.evaluator import Evaluate, difference_low, evaluated
from optimizers.intervals import change_interval, mean_interval, paired_drop, samples_needed, wilson
from optimizers.outputs import float_names, rows_of
from optimizers.slices import worst_slice
from server.artifact import Fidelity
from server.golden import sqnr_db
from server.tensors import Array, Tensors

__all__ = [
    "CLOSE_RTOL",
    "LEAST_NEIGHBOURS",
    "Change",
    "Fidelity",
    "compare",
    "decision_for",
    "describe",
    "describe_accuracy",
    "improves",
    "promise",
    "wilson",
    "worse",
    "worst_sqnr_db",
]


class Change(NamedTuple):
    """How an error changes from one candidate to the next.

    Attributes:
        better: Whether it falls beyond chance: the whole interval lies below 0.
        low: Lower end of the 95 % interval of the relative change; -0.25 means a quarter less error.
        high: Upper end.
    """

    better: bool
    low: float
    high: float


def compare(
    reference: Tensors,
    candidate: Tensors,
    decision: str,
    labels: Array | None = None,
    slices: Mapping[str, Array] | None = None,
    evaluate: Evaluate | None = None,
) -> Fidelity:
    """Compare a candidate's outputs with the original's.

    Args:
        reference: Name -> the original's output, axis 0 = samples, in the order of the signature.
        candidate: The same names and shapes from the candidate.
        decision: What agreement counts, from ``decision_for``.
        labels: Integer class per sample; the accuracy needs a decision for classes.
        slices: From ``slices.slices_of``; without it no worst slice is looked for.
        evaluate: The user's metric; its value stands in the place of the accuracy.

    Raises:
        PassFailed: If an output is missing, has another shape, or is NaN or infinite where the original is finite, or
            if the evaluator fails on the candidate's outputs.
        CalibrationError: If the evaluator fails on the original's outputs.
    """
    _require_comparable(reference, candidate)
    same = agreements(reference, candidate, decision)
    n, hits = len(same), int(np.count_nonzero(same))
    cosine, by_output = _cosines(reference, candidate, n), _sqnr_by_output(reference, candidate)
    found = Fidelity(
        samples=n,
        agreement=hits / n,
        agreement_low=wilson(hits, n)[0],
        decision=decision,
        cosine=float(cosine.mean()),
        cosine_worst=float(cosine.min()),
        sqnr_db=min(by_output.values()) if by_output else sqnr_db(reference, candidate),
        top5_agreement=top5_agreement(reference, candidate, decision),
        kl=divergence(reference, candidate, decision),
        sqnr_by_output=by_output,
        worst_slice=worst_slice(same, slices or {}),
        cosine_low=mean_interval(cosine)[0],
    )
    if evaluate is not None:
        return _with_metric(found, reference, candidate, labels, evaluate)
    return found if labels is None else _with_accuracy(found, reference, candidate, labels)


def worse(first: Fidelity, second: Fidelity) -> Fidelity:
    """Join two comparisons of one candidate, for instance at two batch sizes: the worse of every number counts."""
    parts = [part for part in (first.worst_slice, second.worst_slice) if part is not None]
    outputs = {**second.sqnr_by_output, **first.sqnr_by_output}
    return Fidelity(
        samples=min(first.samples, second.samples),
        agreement=min(first.agreement, second.agreement),
        agreement_low=min(first.agreement_low, second.agreement_low),
        decision=first.decision,
        cosine=min(first.cosine, second.cosine),
        cosine_worst=min(first.cosine_worst, second.cosine_worst),
        sqnr_db=min(first.sqnr_db, second.sqnr_db),
        accuracy=_least(first.accuracy, second.accuracy),
        accuracy_original=first.accuracy_original,
        top5_agreement=_least(first.top5_agreement, second.top5_agreement),
        kl=_most(first.kl, second.kl),
        sqnr_by_output={name: min(outputs[name], second.sqnr_by_output.get(name, outputs[name])) for name in outputs},
        worst_slice=min(parts, key=lambda part: (part.agreement, part.agreement_low), default=None),
        cosine_low=_least(first.cosine_low, second.cosine_low),
        accuracy_drop_high=_most(first.accuracy_drop_high, second.accuracy_drop_high),
        accuracy_difference_low=_least(first.accuracy_difference_low, second.accuracy_difference_low),
    )


def improves(reference: Tensors, before: Tensors, after: Tensors, seed: int = 0) -> Change:
    """Tell whether ``after`` is closer to the original than ``before``, on the same samples, beyond chance.

    The error of a sample is the mean over the floating point outputs of ``|output - original|^2``, divided by the mean
    of ``|original|^2`` over the samples; without such outputs it is 1 where the answers differ. The interval is a
    paired bootstrap, so that how hard a sample is does not count as noise.

    Args:
        reference: Name -> the original's output, axis 0 = samples.
        before: What one candidate answers.
        after: What the other one answers.
        seed: Seed of the bootstrap; the same seed gives the same interval.

    Raises:
        PassFailed: If an output is missing, has another shape, or is NaN or infinite where the original is finite.
    """
    for answers in (before, after):
        _require_comparable(reference, answers)
    was, became = _errors(reference, before), _errors(reference, after)
    if not was.any() and not became.any():
        return Change(False, 0.0, 0.0)
    low, high = change_interval(was, became, seed)
    return Change(high < 0, low, high)


def worst_sqnr_db(reference: Tensors, candidate: Tensors) -> float:
    """Return the signal-to-noise ratio in decibel of the worst float output (of all outputs when none is a float)."""
    by_output = _sqnr_by_output(reference, candidate)
    return min(by_output.values()) if by_output else sqnr_db(reference, candidate)


def describe(fidelity: Fidelity) -> str:
    """Say the agreement with its sample count and what that count can prove, in one phrase."""
    n, misses = fidelity.samples, round((1 - fidelity.agreement) * fidelity.samples)
    if misses:
        low = fidelity.agreement_low
        return f"agreement {fidelity.agreement:.3f} ({misses} of {n} differ, 95 % lower bound {low:.3f})"
    return f"agreement 1.000 (0 of {n} differ: at most 3/{n} = {3 / n:.1%} do, with 95 % confidence)"


def describe_accuracy(fidelity: Fidelity) -> str:
    """Say the accuracy, or the user's metric, beside the original's, in one phrase; nothing where there is none."""
    own, original, low = fidelity.accuracy, fidelity.accuracy_original, fidelity.accuracy_difference_low
    if own is None or original is None:
        return ""
    bound = f", 95 % lower bound {low:+.3f}" if low is not None else ""
    return f"accuracy {own:.3f}, the original's {original:.3f} (difference {own - original:+.3f}{bound})"


def promise(proof: Fidelity | int, min_agreement: float) -> str:
    """Say what the samples fail to show of a promised agreement; nothing when they show it.

    Args:
        proof: A comparison, or a number of samples, of which the best is assumed: that no decision differs.
        min_agreement: The share of equal decisions that was promised, 0 to 1.
    """
    n = proof if isinstance(proof, int) else proof.samples
    most = wilson(n, n)[0]
    if most < min_agreement:
        needed = (
            f"at least {samples_needed(min_agreement)} samples without a miss are needed"
            if min_agreement < 1
            else "no number of samples is enough"
        )
        return (
            f"{n} samples with 0 misses prove that at most 3/{n} = {3 / max(n, 3):.1%} of the decisions differ "
            f"(agreement at least {most:.4f}, 95 % lower bound); to show {min_agreement:g} {needed}"
        )
    if isinstance(proof, int) or proof.agreement_low >= min_agreement:
        return ""
    return f"{describe(proof)}: {min_agreement:g} is not shown"


def _least(first: float | None, second: float | None) -> float | None:
    return min((value for value in (first, second) if value is not None), default=None)


def _most(first: float | None, second: float | None) -> float | None:
    return max((value for value in (first, second) if value is not None), default=None)


def _require_comparable(reference: Tensors, candidate: Tensors) -> None:
    for name, expected in reference.items():
        seen = candidate.get(name)
        if seen is None:
            raise PassFailed(f"output '{name}' is missing")
        if seen.shape != expected.shape:
            raise PassFailed(f"output '{name}' has shape {list(seen.shape)}, the original's has {list(expected.shape)}")
        if expected.dtype.kind == "f":
            bad = int(np.count_nonzero(np.isfinite(expected) & ~np.isfinite(seen)))
            if bad:
                raise PassFailed(f"output '{name}' holds {bad} NaN or infinite values where the original's are finite")


def _with_metric(
    found: Fidelity, reference: Tensors, candidate: Tensors, labels: Array | None, evaluate: Evaluate
) -> Fidelity:
    original = evaluated(evaluate, reference, labels)
    try:
        own = evaluated(evaluate, candidate, labels)
    except CalibrationError as exc:
        raise PassFailed(f"on the candidate's outputs {exc}") from exc
    low = difference_low(evaluate, reference, candidate, labels)
    return msgspec.structs.replace(found, accuracy=own, accuracy_original=original, accuracy_difference_low=low)


def _with_accuracy(found: Fidelity, reference: Tensors, candidate: Tensors, labels: Array) -> Fidelity:
    expected = classes_of(reference, reference, found.decision)
    seen = classes_of(candidate, reference, found.decision)
    if expected is None or seen is None:
        return found
    right, still = np.asarray(expected == labels), np.asarray(seen == labels)
    return msgspec.structs.replace(
        found,
        accuracy=float(still.mean()),
        accuracy_original=float(right.mean()),
        accuracy_drop_high=paired_drop(right, still)[1],
        accuracy_difference_low=mean_interval(still.astype(np.float64) - right)[0],
    )


def _sqnr_by_output(reference: Tensors, candidate: Tensors) -> dict[str, float]:
    return {name: sqnr_db({name: reference[name]}, {name: candidate[name]}) for name in float_names(reference)}


def _cosines(reference: Tensors, candidate: Tensors, n: int) -> Array:
    """Return the cosine per sample over all float outputs joined; 1 where there is nothing to compare."""
    names = [name for name in float_names(reference) if reference[name].size]
    if not names:
        return np.ones(n)
    left, right = (
        np.concatenate([rows_of(np.nan_to_num(side[name].astype(np.float64))) for name in names], axis=1)
        for side in (reference, candidate)
    )
    dot = np.sum(left * right, axis=1)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    return np.asarray(np.where(both_zero, 1.0, dot / np.maximum(norms, 1e-30)))


def _errors(reference: Tensors, answers: Tensors) -> Array:
    """Return the error per sample, ``[samples]``, see ``improves``."""
    names = float_names(reference)
    if not names:
        same = [np.all(rows_of(reference[name] == answers[name]), axis=1) for name in reference]
        return np.asarray(1.0 - np.all(same, axis=0))
    total = np.zeros(len(reference[names[0]]))
    for name in names:
        counts = np.isfinite(reference[name])
        expected = rows_of(np.where(counts, reference[name], 0).astype(np.float64))
        error = expected - rows_of(np.where(counts, answers[name], 0).astype(np.float64))
        power = float(np.mean(np.sum(expected**2, axis=1)))
        total += np.sum(error**2, axis=1) / max(power, 1e-300)
    return np.asarray(total / len(names))
