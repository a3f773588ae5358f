"""Which range of a tensor to quantize, given a histogram of its values: a narrow one cuts, a wide one rounds coarsely.

``minmax`` cuts nothing. ``percentile`` cuts the rarest values. ``entropy`` and ``mse`` search: first among ranges
``[-t, t]`` within the extremes, so that a tail that is longer than the other goes first, then at either end alone.

A range always contains zero, which quantization must represent exactly. Values that *are* zero (half of what a Relu
gives, padding) are no part of the histogram: they cost nothing in any range, and would hide what the others cost.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from server.tensors import Array

Method = Literal["minmax", "percentile", "entropy", "mse"]
"""How a range follows from the values."""

Range = tuple[float, float]
"""Lowest and highest value."""

BINS = 2048
LEVELS = 256
"""Values of 8 bits; half of them for magnitudes, where a range is symmetric."""

PERCENTILE = 99.99
"""Share of the values, in percent, that ``percentile`` keeps."""

_WIDTHS = 80
_ENTROPY_WIDTHS = 128
_DIGITS = 12  # of a divergence; more is rounding, which must not decide between equal candidates

Cost = Callable[[Array, Array], Array]
"""What some windows cost: their first bins and the bins behind their last, both INT64 ``[n]`` -> FLOAT64 ``[n]``."""


class Histogram(msgspec.Struct, frozen=True):
    """How often values occur.

    Attributes:
        counts: INT64 ``[BINS]``, zeros left out; bins have equal widths.
        low: Where the first bin begins, at most 0.
        high: Where the last bin ends, at least 0; above ``low``.
    """

    counts: Array
    low: float
    high: float

    @property
    def edges(self) -> Array:
        """Where bins begin and end: FLOAT64 ``[BINS + 1]``."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def zero(self) -> int:
        """The edge nearest to zero."""
        return int(np.abs(self.edges).argmin())


def range_of(histogram: Histogram, method: Method, levels: int = LEVELS) -> Range:
    """Choose the range to quantize; it contains zero.

    Args:
        histogram: At least one value.
        method: How to choose.
        levels: How many values the quantized tensor can have in the range.
    """
    if method == "minmax":
        return histogram.low, histogram.high
    if method == "percentile":
        return percentile_range(histogram, PERCENTILE)
    return entropy_range(histogram, levels) if method == "entropy" else mse_range(histogram, levels)


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """Cut as many values at both ends as are more than a share of all; at an end that is zero, nothing is cut.

    Args:
        histogram: At least one value.
        percentile: Share of the values to keep, in percent, e.g. 99.99.
    """
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    ends = 1 if 0.0 in (histogram.low, histogram.high) else 2
    tail = (1 - percentile / 100) / ends
    first = int(np.searchsorted(share, tail, side="right")) if histogram.low < 0 else 0
    last = int(np.searchsorted(share, 1 - tail)) + 1 if histogram.high > 0 else len(share)
    return _between(histogram, first, min(last, len(share)))


def mse_range(histogram: Histogram, levels: int = LEVELS) -> Range:
    """Choose the range whose expected squared error is least, rounding and clipping together.

    Values are taken as spread evenly within a bin. With step ``d`` the squared error of rounding has the antiderivative
    ``F(x) = k d^3 / 12 + (x - k d)^3 / 3``, ``k = round(x / d)``, that of clipping at ``c`` ``(x - c)^3 / 3``, so that
    the error of a bin is a difference of two values, exact however the steps and the bins lie to each other.

    Args:
        histogram: At least one value.
        levels: How many values the quantized tensor can have in the range.

    Source: the idea of choosing the clip by expected error: Banner et al. 2019, "Post training 4-bit quantization of
    convolutional networks for rapid-deployment", section 3.
    """
    edges, counts = histogram.edges, histogram.counts.astype(np.float64)

    def cost(first: Array, last: Array) -> Array:
        low, high = edges[first][:, None], edges[last][:, None]
        step = (high - low) / (levels - 1)
        inside = np.clip(edges, low, high)
        nearest = np.rint(inside / step)
        rounding, clipping = inside - nearest * step, edges - inside
        antiderivative = nearest * (step**3 / 12) + (_cube(rounding) + _cube(clipping)) / 3
        errors: Array = np.diff(antiderivative) @ counts
        return errors

    return _between(histogram, *_search(histogram, cost, 1, _WIDTHS))


def entropy_range(histogram: Histogram, levels: int = LEVELS) -> Range:
    """Choose the range whose quantized distribution tells least apart from the original one.

    Of each candidate, the reference ``P`` is the histogram within the range, what lies outside added to the bins at its
    ends. ``Q`` is the histogram within the range, without what lies outside, merged into ``levels`` groups, the mass of
    each spread evenly over those of its bins that ``P`` fills. The candidate with the least Kullback-Leibler divergence
    ``sum(P log(P / Q))`` wins, of equal ones the widest. No candidate has fewer bins than levels. ``Q`` is nowhere less
    than half a value of all, for else an outlier far out would forbid every cut. Fewer values than bins say nothing
    about a distribution, and nothing is cut.

    Args:
        histogram: At least one value.
        levels: How many values the quantized tensor can have in the range.

    Source: Szymon Migacz, "8-bit inference with TensorRT", GTC 2017, for magnitudes and 128 levels; here also for
    ranges with two different ends.
    """
    if histogram.counts.sum() < len(histogram.counts):
        return histogram.low, histogram.high

    def cost(first: Array, last: Array) -> Array:
        return np.array([_divergence(histogram.counts, i, j, levels) for i, j in zip(first, last, strict=True)])

    return _between(histogram, *_search(histogram, cost, min(levels, len(histogram.counts)), _ENTROPY_WIDTHS))


def _cube(values: Array) -> Array:
    return values * values * values  # many times faster than a power


def _divergence(counts: Array, first: int, last: int, levels: int) -> float:
    """Return KL(P || Q) of the window ``counts[first:last]``."""
    window = counts[first:last].astype(np.float64)
    reference = window.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    filled = reference > 0
    starts = np.arange(levels) * len(window) // levels
    sizes = np.diff(starts, append=len(window))
    shares = np.add.reduceat(window, starts) / np.maximum(np.add.reduceat(filled, starts, dtype=np.int64), 1)
    p = reference[filled] / reference.sum()
    q = np.repeat(shares, sizes)[filled] / max(float(window.sum()), 0.5)
    q = np.maximum(q, 0.5 / reference.sum())
    return round(float(np.sum(p * np.log(p / q))), _DIGITS)


def _search(histogram: Histogram, cost: Cost, least: int, widths: int) -> tuple[int, int]:
    """Return first bin and end of the cheapest window of at least ``least`` bins around zero."""
    bins, zero = len(histogram.counts), histogram.zero
    reach = np.unique(np.linspace(bins, 1, widths).astype(np.int64))[::-1] * max(zero, bins - zero) // bins
    first, last = _cheapest(cost, np.maximum(zero - reach, 0), np.minimum(zero + reach, bins), least)
    ends = np.unique(np.linspace(last, zero, widths // 2).astype(np.int64))[::-1]
    first, last = _cheapest(cost, np.full_like(ends, first), ends, least)
    starts = np.unique(np.linspace(first, zero, widths // 2).astype(np.int64))
    return _cheapest(cost, starts, np.full_like(starts, last), least)


def _cheapest(cost: Cost, first: Array, last: Array, least: int) -> tuple[int, int]:
    wide = last - first >= least
    first, last = first[wide], last[wide]
    best = int(np.argmin(cost(first, last)))
    return int(first[best]), int(last[best])


def _between(histogram: Histogram, first: int, last: int) -> Range:
    edges = histogram.edges
    return min(float(edges[first]), 0.0), max(float(edges[last]), 0.0)
