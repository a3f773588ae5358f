"""Whether a series grows: a robust slope with its interval. Pure."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

import msgspec

# Neighbouring samples hang together; blocks of them do so less, and their number keeps the pairs few.
MOST_BLOCKS = 60
LEAST_BLOCKS = 5
_Z_95 = 1.96


class Trend(msgspec.Struct, frozen=True):
    """How much a series grows per unit of its abscissa.

    Attributes:
        slope: The median of the slopes of all pairs of blocks.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    slope: float
    low: float
    high: float


def trend_of(x: Sequence[float], y: Sequence[float]) -> Trend:
    """Estimate the slope of ``y`` over ``x``; one sample in three may be an outlier.

    Samples are joined to at most ``MOST_BLOCKS`` blocks of medians first. The interval takes the blocks as independent.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968.

    Args:
        x: Ascending.
        y: As many values.

    Raises:
        ValueError: If there are fewer than ``LEAST_BLOCKS`` samples.
    """
    points = _blocks(list(zip(x, y, strict=True)))
    count = len(points)
    if count < LEAST_BLOCKS:
        raise ValueError(f"a trend needs {LEAST_BLOCKS} samples, there are {count}")
    slopes = sorted((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2))
    spread = _Z_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    return Trend(statistics.median(slopes), slopes[low], slopes[high])


def _blocks(samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(samples) / MOST_BLOCKS)
    if size <= 1:
        return samples
    parts = (samples[start : start + size] for start in range(0, len(samples) - size + 1, size))
    return [(statistics.median(x for x, _ in part), statistics.median(y for _, y in part)) for part in parts]
