"""How well a candidate reproduces the original on samples that no pass has seen.

No labels are needed: what counts is whether the candidate *decides* as the original does. Which decision a model takes
follows from its outputs (``decision_for``):

* ``top1``: the largest column of the first 2-D float output; without one, equality of the label per sample (1-D
  outputs that are no floats).
* ``nearest_neighbour``: embeddings, that is rows of unit norm; the nearest other held-out sample by cosine.
* ``close``: everything else; every element within 1 % of the original's scale.

Beside the decision stand the cosine per sample, the SQNR of the worst output, and, with labels, the task accuracy.
"""

import math

import numpy as np

from optimizers.errors import PassFailed
from server.artifact import Fidelity
from server.golden import sqnr_db
from server.tensors import Array, Tensors

CLOSE_RTOL = 1e-2
LEAST_NEIGHBOURS = 3
"""With two samples each is the other's nearest neighbour, whatever the embedding."""

_UNIT_NORM_TOLERANCE = 1e-3
_TIE = 1e-6
_Z95 = 1.959964


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, which holds for small ``n`` and shares near 0 and 1 too.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        successes: Count of hits, at most ``n``.
        n: Trials; 0 gives the interval (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z95 * _Z95
    centre = share + z2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def decision_for(reference: Tensors) -> str:
    """Tell which decision the original's outputs take: ``top1``, ``nearest_neighbour`` or ``close``.

    Args:
        reference: Name -> the original's output, axis 0 = samples, in the order of the signature.
    """
    if _scores(reference) is not None:
        return "top1"
    embedding = _embedding(reference)
    if embedding is not None and len(embedding) >= LEAST_NEIGHBOURS:
        return "nearest_neighbour"
    return "top1" if _labels(reference) else "close"


def compare(reference: Tensors, candidate: Tensors, decision: str, labels: Array | None = None) -> Fidelity:
    """Compare a candidate's outputs with the original's.

    Args:
        reference: Name -> the original's output, axis 0 = samples, in the order of the signature.
        candidate: The same names and shapes from the candidate.
        decision: What agreement counts, from ``decision_for``.
        labels: Integer class per sample; used for ``top1`` only.

    Raises:
        PassFailed: If an output is missing, has another shape, or is NaN or infinite where the original is finite.
    """
    _require_comparable(reference, candidate)
    same = _agreements(reference, candidate, decision)
    n = len(same)
    hits = int(np.count_nonzero(same))
    cosine = _cosines(reference, candidate, n)
    return Fidelity(
        samples=n,
        agreement=hits / n,
        agreement_low=wilson(hits, n)[0],
        decision=decision,
        cosine=float(cosine.mean()),
        cosine_worst=float(cosine.min()),
        sqnr_db=worst_sqnr_db(reference, candidate),
        accuracy=_accuracy(candidate, reference, labels) if decision == "top1" else None,
        accuracy_original=_accuracy(reference, reference, labels) if decision == "top1" else None,
    )


def worse(first: Fidelity, second: Fidelity) -> Fidelity:
    """Join two comparisons of one candidate, for instance at two batch sizes: the worse of every number counts."""
    accuracies = [f.accuracy for f in (first, second) if f.accuracy is not None]
    return Fidelity(
        samples=min(first.samples, second.samples),
        agreement=min(first.agreement, second.agreement),
        agreement_low=min(first.agreement_low, second.agreement_low),
        decision=first.decision,
        cosine=min(first.cosine, second.cosine),
        cosine_worst=min(first.cosine_worst, second.cosine_worst),
        sqnr_db=min(first.sqnr_db, second.sqnr_db),
        accuracy=min(accuracies) if accuracies else None,
        accuracy_original=first.accuracy_original,
    )


def worst_sqnr_db(reference: Tensors, candidate: Tensors) -> float:
    """Return the signal-to-noise ratio in decibel of the worst float output (of all outputs when none is a float)."""
    floats = _floats(reference)
    if not floats:
        return sqnr_db(reference, candidate)
    return min(sqnr_db({name: reference[name]}, {name: candidate[name]}) for name in floats)


def describe(fidelity: Fidelity) -> str:
    """Say the agreement with its sample count and what that count can prove, in one phrase."""
    n, misses = fidelity.samples, round((1 - fidelity.agreement) * fidelity.samples)
    if misses:
        low = fidelity.agreement_low
        return f"agreement {fidelity.agreement:.3f} ({misses} of {n} differ, 95 % lower bound {low:.3f})"
    return f"agreement 1.000 (0 of {n} differ: at most 3/{n} = {3 / n:.1%} do, with 95 % confidence)"


def _floats(outputs: Tensors) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind == "f"]


def _labels(outputs: Tensors) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind != "f" and array.ndim == 1]


def _has_unit_rows(array: Array) -> bool:
    """Embeddings have unit rows; so have confident probabilities, which are not embeddings: they never go below 0."""
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    return bool(np.all(np.abs(norms - 1) < _UNIT_NORM_TOLERANCE) and array.min() < 0)


def _scores(outputs: Tensors) -> Array | None:
    for name in _floats(outputs):
        array = outputs[name]
        if array.ndim == 2 and array.shape[1] >= 2 and array.size and not _has_unit_rows(array):
            return array
    return None


def _embedding(outputs: Tensors) -> Array | None:
    for name in _floats(outputs):
        array = outputs[name]
        if array.ndim == 2 and array.shape[1] >= 2 and array.size and _has_unit_rows(array):
            return array
    return None


def _name_of(outputs: Tensors, wanted: Array) -> str:
    return next(name for name, array in outputs.items() if array is wanted)


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


def _agreements(reference: Tensors, candidate: Tensors, decision: str) -> Array:
    """Return one boolean per sample."""
    if decision == "top1":
        scores = _scores(reference)
        if scores is None:
            return _equal_rows(reference, candidate, _labels(reference))
        seen = candidate[_name_of(reference, scores)]
        return np.asarray(scores.argmax(axis=-1) == seen.argmax(axis=-1))
    if decision == "nearest_neighbour":
        embedding = _embedding(reference)
        if embedding is None:
            raise PassFailed("no output holds embeddings of unit norm")
        return _same_neighbours(embedding, candidate[_name_of(reference, embedding)])
    others = [name for name in reference if name not in _floats(reference)]
    same = _equal_rows(reference, candidate, others)
    for name in _floats(reference):
        same = same & _close_rows(reference[name], candidate[name])
    return same


def _rows(array: Array) -> Array:
    """Return the array as [samples, elements]."""
    return array.reshape(len(array), -1)


def _equal_rows(reference: Tensors, candidate: Tensors, names: list[str]) -> Array:
    same = np.ones(len(next(iter(reference.values()))), np.bool_)
    for name in names:
        same &= np.all(_rows(reference[name] == candidate[name]), axis=1)
    return same


def _close_rows(reference: Array, candidate: Array) -> Array:
    finite = np.where(np.isfinite(reference), reference, 0).astype(np.float64)
    scale = np.maximum(np.abs(finite), math.sqrt(float(np.mean(finite**2))) if finite.size else 0.0)
    both = np.isfinite(reference) & np.isfinite(candidate)
    error = np.abs(finite - np.where(both, candidate, 0).astype(np.float64))
    fits = np.where(both, error <= CLOSE_RTOL * scale, _same_bits(reference, candidate))
    return np.asarray(np.all(_rows(fits), axis=1))


def _same_bits(reference: Array, candidate: Array) -> Array:
    return np.asarray((reference == candidate) | (np.isnan(reference) & np.isnan(candidate)))


def _same_neighbours(reference: Array, candidate: Array) -> Array:
    """Compare nearest neighbours; a neighbour that ties with the original's (duplicates) counts as the same."""
    if len(reference) < LEAST_NEIGHBOURS:
        raise PassFailed(f"nearest neighbours need {LEAST_NEIGHBOURS} held-out samples, there are {len(reference)}")
    original, seen = _similarities(reference), _similarities(candidate)
    chosen = np.take_along_axis(original, seen.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.asarray(chosen >= original.max(axis=1) - _TIE)


def _similarities(rows: Array) -> Array:
    """Return the cosine of every pair, [samples, samples], with -inf on the diagonal."""
    wide = rows.astype(np.float64)
    wide = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    similarity: Array = wide @ wide.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def _cosines(reference: Tensors, candidate: Tensors, n: int) -> Array:
    """Return the cosine per sample over all float outputs joined; 1 where there is nothing to compare."""
    names = [name for name in _floats(reference) if reference[name].size]
    if not names:
        return np.ones(n)
    left, right = (
        np.concatenate([_rows(np.nan_to_num(side[name].astype(np.float64))) for name in names], axis=1)
        for side in (reference, candidate)
    )
    dot = np.sum(left * right, axis=1)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    return np.asarray(np.where(both_zero, 1.0, dot / np.maximum(norms, 1e-30)))


def _accuracy(outputs: Tensors, reference: Tensors, labels: Array | None) -> float | None:
    """Return the share of samples whose decided class is the label."""
    if labels is None:
        return None
    scores = _scores(reference)
    if scores is not None:
        predicted = outputs[_name_of(reference, scores)].argmax(axis=-1)
    else:
        names = _labels(reference)
        if not names:
            return None
        predicted = outputs[names[0]]
    return float(np.mean(predicted == labels))
