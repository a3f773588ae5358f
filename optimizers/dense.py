"""Decisions of outputs with a position axis: tokens, pixels, heatmaps, and any other large tensor.

Every element within 1 %, which ``close`` asks of a handful of numbers, fails of thousands for INT8 and even for FP16,
although nothing is decided otherwise. What counts here:

* ``tokens`` ``[samples, positions, classes]`` and ``pixels`` ``[samples, classes, height, width]``: the largest class
  is the same at 99 % of a sample's positions (at all of them, then, with fewer than 100). Positions at which the
  original is zero throughout are padding and do not count.
* ``maps``: detectors and masks read a map ``[samples, 1, height, width]`` by its peaks. The locations above half of
  the original's maximum must match (intersection over union at least 0.9), and at those of the original the root mean
  square error of every output on the same grid (sizes, offsets, landmarks) must stay within 10 % of its range: an
  offset of almost zero has no energy to compare with. Locations where both lie within 10 % of the threshold are left
  out: which side rounding puts them on says nothing. A sample whose maximum is below a quarter of the usual maximum
  (90th percentile over the samples) shows nothing; there the candidate must show nothing as well. Measured on a face
  detector (CenterFace, 40 pictures): INT8 per channel moves sizes by 1 % of their range, offsets by 3 %, INT8 per
  tensor by 12 % and 10 %; noise at 25 dB changes no detection, while at 40 dB no sample is ``close``.
* ``near``: for other outputs with at least 64 elements per sample; the error's energy is at most 1 % of the output's
  (20 dB, a cosine of 0.995) in every sample and output.
"""

import numpy as np

from optimizers.outputs import are_probabilities, are_shares, float_names, have_equal_scales, rows_of
from server.tensors import Array, Tensors

SAME_POSITIONS = 0.99
PEAKS_IOU = 0.9
NEAR_DB = 20.0
PEAKS_ERROR = 0.1
LEAST_ELEMENTS = 64

_LEAST_GRID = 16
_BOX = 4
_TIE = 0.1
_SHOWS = 0.25
_HIDDEN_SIZES = range(128, 8193)
"""Sizes of hidden states; class scores have fewer columns (tags, characters) or more (words)."""


def tokens_name(outputs: Tensors) -> str | None:
    """Return the first output ``[samples, positions, classes]`` that holds class scores."""
    for name in float_names(outputs):
        array = outputs[name]
        if array.ndim == 3 and array.shape[1] >= 2 and _are_classes(array, -1):
            return name
    return None


def pixels_name(outputs: Tensors) -> str | None:
    """Return the first output ``[samples, classes, height, width]`` that holds class scores."""
    for name in float_names(outputs):
        array = outputs[name]
        if array.ndim == 4 and 1 not in array.shape[2:] and _are_classes(array, 1):
            return name
    return None


def map_name(outputs: Tensors) -> str | None:
    """Return the output that holds a map with peaks: the first with one channel, else the first that fits.

    A map of several channels is nowhere below 0 and no distribution over them; one without a channel axis,
    ``[samples, height, width]``, lies between 0 and 1.
    """
    grids = [name for name in float_names(outputs) if _is_grid(outputs[name])]
    single = [n for n in grids if outputs[n].ndim == 4 and 1 in (outputs[n].shape[1], outputs[n].shape[3])]
    several = [n for n in grids if (outputs[n].min() >= 0 if outputs[n].ndim == 4 else are_shares(outputs[n]))]
    return next(iter([*single, *(n for n in several if not _are_distributions(outputs[n]))]), None)


def is_dense(outputs: Tensors) -> bool:
    """Whether an output holds at least 64 elements per sample, not all of them zero."""
    return any(rows_of(outputs[n]).shape[1] >= LEAST_ELEMENTS and outputs[n].any() for n in float_names(outputs))


def same_classes(reference: Array, candidate: Array, axis: int) -> Array:
    """Return per sample whether the largest class is the same at 99 % of the positions.

    Args:
        reference: The original's class scores, axis 0 = samples.
        candidate: The candidate's.
        axis: Where the classes are.
    """
    counts = rows_of(np.any(reference != 0, axis=axis))
    same = rows_of(reference.argmax(axis=axis) == candidate.argmax(axis=axis))
    return np.asarray(np.sum(same & counts, axis=1) >= SAME_POSITIONS * counts.sum(axis=1) - 1e-9)


def same_peaks(reference: Tensors, candidate: Tensors, name: str) -> Array:
    """Return per sample whether the map ``name`` peaks at the same locations and the outputs there are near."""
    original, seen = (rows_of(np.nan_to_num(side[name]).astype(np.float64)) for side in (reference, candidate))
    most = original.max(axis=1)
    threshold = np.maximum(most / 2, _SHOWS * np.quantile(most, 0.9))[:, None]
    peaks, found = original > threshold, seen > threshold
    tie = (np.abs(original - threshold) <= _TIE * threshold) & (np.abs(seen - threshold) <= _TIE * threshold)
    shared, either = np.sum(peaks & found & ~tie, axis=1), np.sum((peaks | found) & ~tie, axis=1)
    same = np.asarray(shared >= PEAKS_IOU * either)
    mask = peaks.reshape(reference[name].shape)
    for other in float_names(reference):
        there = _on_grid(mask, reference[other])
        if there is not None:
            same = same & _like_rows(reference[other], candidate[other], there)
    return same


def near_rows(reference: Array, candidate: Array) -> Array:
    """Return per sample whether the error's energy is at most 1 % of the original's."""
    finite = np.isfinite(reference)
    same_elsewhere = finite | (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))
    expected = np.where(finite, reference, 0).astype(np.float64)
    error = expected - np.where(finite, candidate, 0).astype(np.float64)
    power = np.sum(rows_of(expected) ** 2, axis=1)
    # A sample that is zero, or almost, is compared with what the output usually is.
    scale = np.maximum(power, 0.01 * power.mean())
    fits = np.sum(rows_of(error) ** 2, axis=1) <= 10 ** (-NEAR_DB / 10) * scale
    return np.asarray(fits & np.all(rows_of(same_elsewhere), axis=1))


def _like_rows(reference: Array, candidate: Array, where: Array) -> Array:
    """Return per sample whether the root mean square error at some elements is within 10 % of the output's range."""
    expected, seen = (np.nan_to_num(side).astype(np.float64) for side in (reference, candidate))
    energy = np.sum(rows_of(np.where(where, expected - seen, 0)) ** 2, axis=1)
    counts = np.count_nonzero(rows_of(where), axis=1)
    return np.asarray(energy <= (PEAKS_ERROR * np.ptp(expected)) ** 2 * counts)


def _on_grid(mask: Array, other: Array) -> Array | None:
    """Return where ``other`` lies at a peak, in its own shape; ``None`` when it is on another grid."""
    if other.shape == mask.shape:
        return mask
    if mask.ndim != 4 or other.ndim != 4:
        return None
    if mask.shape[1] == 1 and other.shape[2:] == mask.shape[2:]:
        return np.broadcast_to(mask, other.shape)
    if mask.shape[3] == 1 and other.shape[1:3] == mask.shape[1:3]:
        return np.broadcast_to(mask, other.shape)
    return None


def _is_grid(array: Array) -> bool:
    """Whether the samples are planes with something above 0, with a channel axis before, after, or none."""
    if array.ndim not in (3, 4) or rows_of(array).shape[1] < _LEAST_GRID or not np.isfinite(array).all():
        return False
    if array.ndim == 3 and array.shape[2] == _BOX:
        return False
    plane = sorted(array.shape[1:])[-2:]
    return bool(plane[0] >= 2 and array.max() > 0)


def _are_distributions(array: Array) -> bool:
    return are_probabilities(_positions(array, -1 if array.ndim == 3 else 1))


def _are_classes(array: Array, axis: int) -> bool:
    """Whether the elements along ``axis`` compete: probabilities, or scores of one scale whose winner changes."""
    classes = array.shape[axis]
    if classes < 2 or not array.any() or not np.isfinite(array).all():
        return False
    positions = _positions(array, axis)
    if are_probabilities(positions):
        return True
    if classes == _BOX or classes in _HIDDEN_SIZES or positions.min() >= 0 or not have_equal_scales(positions):
        return False
    shares = np.unique(positions.argmax(axis=1), return_counts=True)[1] / len(positions)
    return bool(shares.max() <= SAME_POSITIONS)


def _positions(array: Array, axis: int) -> Array:
    """Return ``[positions, classes]`` without those positions that are zero throughout."""
    moved = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return np.asarray(moved[moved.any(axis=1)])
