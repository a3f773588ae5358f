"""Slices: parts of the held-out samples, of which a candidate may spoil one while the whole looks well.

Labels are not needed: samples are told apart by the original's decision (``class``), by its confidence (``margin
quarter``: the gap between its two largest scores, quarter 1 the least confident), by what it predicts (``value
quarter``, for regressions), by true length (``length quarter``), and by ``label`` when there are labels.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from optimizers.decisions import binary_name, classes_of, threshold_of, top1_name
from optimizers.intervals import wilson
from optimizers.masks import lengths_of
from optimizers.outputs import float_names
from server.artifact import Slice
from server.tensors import Array, Tensors

LEAST_SLICE = 16
"""With fewer samples one miss alone would make a slice the worst."""


def slices_of(
    reference: Tensors, decision: str, singles: Sequence[Tensors] = (), labels: Array | None = None
) -> dict[str, Array]:
    """Tell the samples apart.

    Args:
        reference: Name -> the original's output, axis 0 = samples.
        decision: From ``decision_for``.
        singles: One request per sample, for the lengths.
        labels: Integer class per sample.

    Returns:
        What is told apart -> INT64 ``[samples]``, the number of the slice that each sample is in.
    """
    found: dict[str, Array | None] = {
        "class": classes_of(reference, reference, decision),
        "margin quarter": _quarters(_margins(reference, decision)),
        "value quarter": _quarters(_values(reference)) if decision == "close" else None,
        "length quarter": _quarters(lengths_of(singles)),
        "label": labels,
    }
    return {name: array.astype(np.int64) for name, array in found.items() if array is not None}


def worst_slice(same: Array, slices: Mapping[str, Array]) -> Slice | None:
    """Return the slice of at least 16 samples with the lowest agreement, among equals the least proven one.

    Args:
        same: BOOL ``[samples]``: whether the decisions are equal.
        slices: From ``slices_of``.
    """
    found = []
    for name, numbers in slices.items():
        for number in np.unique(numbers):
            inside = same[numbers == number]
            n, hits = len(inside), int(np.count_nonzero(inside))
            if n >= LEAST_SLICE:
                found.append(Slice(f"{name} {number}", n, hits / n, wilson(hits, n)[0]))
    return min(found, key=lambda part: (part.agreement, part.agreement_low), default=None)


def _quarters(values: Array | None) -> Array | None:
    """Return 1 to 4 by size, equal values together; ``None`` when all values are equal."""
    if values is None or values.min() == values.max():
        return None
    return np.asarray(np.searchsorted(np.quantile(values, (0.25, 0.5, 0.75)), values, side="left") + 1)


def _margins(reference: Tensors, decision: str) -> Array | None:
    if decision == "binary":
        name = binary_name(reference)
        return None if name is None else np.abs(reference[name].reshape(-1) - threshold_of(reference[name]))
    name = top1_name(reference) if decision == "top1" else None
    if name is None:
        return None
    largest = np.sort(reference[name].astype(np.float64), axis=1)[:, -2:]
    margins = np.asarray(largest[:, 1] - largest[:, 0])
    return margins if np.isfinite(margins).all() else None


def _values(reference: Tensors) -> Array | None:
    for name in float_names(reference):
        array = reference[name]
        if array.shape in ((len(array),), (len(array), 1)) and np.isfinite(array).all():
            return array.reshape(-1)
    return None
