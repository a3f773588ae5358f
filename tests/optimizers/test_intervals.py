"""Intervals: published values, and how often they hold what they promise."""

import math

import numpy as np
import pytest

from optimizers.intervals import change_interval, mean_interval, paired_drop, samples_needed, wilson


def test_wilson_matches_published_values():
    # 18 of 20, and no miss in 512: the closed form n / (n + z^2).
    assert wilson(18, 20) == pytest.approx((0.699, 0.972), abs=1e-3)
    assert wilson(512, 512) == pytest.approx((512 / (512 + 1.959964**2), 1.0))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
def test_samples_needed_are_the_fewest_that_show_a_share(share: float):
    n = samples_needed(share)
    assert wilson(n, n)[0] >= share - 1e-9
    assert wilson(n - 1, n - 1)[0] < share


def test_drop_without_a_difference_still_has_a_width():
    hits = np.ones(100, np.bool_)
    low, high = paired_drop(hits, hits)
    width = 1 - wilson(100, 100)[0]
    assert (low, high) == pytest.approx((-width, width))


def test_drop_of_a_sample_that_both_miss_is_narrow_because_they_are_paired():
    first = np.arange(200) % 4 > 0
    second = np.roll(first, 1)  # as many hits, on other samples
    paired, crossed = paired_drop(first, first), paired_drop(first, second)
    assert paired[1] < 0.02 < 0.08 < crossed[1]
    assert paired[0] == pytest.approx(-paired[1])


def test_drop_covers_the_truth_as_often_as_promised():
    # Both right with 0.80, only the first with 0.10, only the second with 0.04: a true drop of 0.06.
    rng = np.random.default_rng(0)
    kinds = rng.choice(4, size=(1000, 60), p=[0.80, 0.10, 0.04, 0.06])
    intervals = [paired_drop((row == 0) | (row == 1), (row == 0) | (row == 2)) for row in kinds]
    covered = sum(low <= 0.06 <= high for low, high in intervals) / len(intervals)
    assert 0.93 < covered < 0.98


def test_mean_interval_is_that_of_the_normal_for_many_values():
    values = np.random.default_rng(1).standard_normal(2000)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)
    assert mean_interval(values) == (low, high)
    assert mean_interval(values, seed=1) != (low, high)


def test_mean_interval_of_more_values_than_fit_at_once():
    low, high = mean_interval(np.tile([0.0, 1.0], 30_000))
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60_000), rel=0.15)


def test_change_is_relative_and_paired():
    before = np.random.default_rng(0).exponential(size=300)  # a spread of 100 %, which does not count
    assert change_interval(before, 0.9 * before) == pytest.approx((-0.1, -0.1))
    assert change_interval(np.zeros(20), np.zeros(20)) == (0.0, 0.0)
    assert change_interval(np.zeros(20), np.ones(20))[0] > 1e300
