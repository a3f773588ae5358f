"""Intervals: what a finite number of samples proves about a share, a mean, or a difference; 95 % throughout."""

import math
from collections.abc import Callable

import numpy as np

from server.tensors import Array

RESAMPLES = 1000
"""Resamples of a bootstrap: the ends of its 95 % interval are then exact to about 1 % of the probability."""

_Z95 = 1.959964
_CHUNK = 1 << 20


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


def samples_needed(share: float) -> int:
    """Return how many samples without a miss put Wilson's lower bound at ``share``: ``z^2 share / (1 - share)``.

    Args:
        share: At least 0 and below 1.
    """
    return math.ceil(_Z95 * _Z95 * share / (1 - share) - 1e-9)


def paired_drop(before: Array, after: Array) -> tuple[float, float]:
    """Return the 95 % interval of the share of hits in ``before`` minus that in ``after``, on the same samples.

    Unlike the bootstrap it does not collapse to zero width when both hit and miss the same samples.

    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998), method 10.

    Args:
        before: BOOL ``[samples]``, at least one.
        after: BOOL ``[samples]``.
    """
    n = len(before)
    both, first = int(np.sum(before & after)), int(np.sum(before & ~after))
    second = int(np.sum(~before & after))
    neither = n - both - first - second
    (low1, high1), (low2, high2) = wilson(both + first, n), wilson(both + second, n)
    share1, share2 = (both + first) / n, (both + second) / n
    phi = _correlation(both, first, second, neither)
    down, up = (share1 - low1, high2 - share2), (high1 - share1, share2 - low2)
    difference = share1 - share2
    return difference - _length(down, phi), difference + _length(up, phi)


def bootstrap(statistic: Callable[[Array], Array], samples: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic under resampling of the samples with replacement.

    Source: B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979).

    Args:
        statistic: INT64 ``[resamples, samples]`` of sample indices -> the statistic of each resample, ``[resamples]``.
        samples: Samples, at least one.
        seed: Seed of the resampling; the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    at_once = max(_CHUNK // samples, 1)
    drawn = [
        statistic(rng.integers(0, samples, (min(at_once, RESAMPLES - start), samples)))
        for start in range(0, RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of ``values``, ``[samples]``."""
    return bootstrap(lambda chosen: np.asarray(values[chosen].mean(axis=1)), len(values), seed)


def change_interval(before: Array, after: Array, seed: int = 0) -> tuple[float, float]:
    """Return the paired bootstrap interval of ``mean(after) / mean(before) - 1``; below 0 means that it falls.

    Args:
        before: Error per sample, ``[samples]``, at least 0.
        after: Error of the same samples.
        seed: Seed of the resampling.
    """

    def change(chosen: Array) -> Array:
        was, became = before[chosen].mean(axis=1), after[chosen].mean(axis=1)
        # A resample without any error before cannot improve; its change is 0 or as bad as it gets.
        ratio = np.divide(became, was, out=np.where(became > 0, np.inf, 1.0), where=was > 0)
        return np.asarray(np.minimum(ratio, np.finfo(np.float64).max) - 1)

    return bootstrap(change, len(before), seed)


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Return the paired samples' phi coefficient with Newcombe's continuity correction."""
    n = both + first + second + neither
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    product = both * neither - first * second
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    return corrected / math.sqrt(margins)


def _length(sides: tuple[float, float], phi: float) -> float:
    one, two = sides
    return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))
