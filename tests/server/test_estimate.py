"""Predicted run times, corrected by what is seen."""

import pytest

from server.artifact import LatencyTable
from server.estimate import Estimate


def table(p99: float = 1.5) -> LatencyTable:
    p50 = (1.0, 4.0, 10.0)
    return LatencyTable((1, 8, 32), p50, tuple(p99 * ms for ms in p50), p50, p50)


def test_the_table_is_what_is_known_at_first():
    estimate = Estimate(table())
    assert estimate.known
    assert estimate.run_s(8) == pytest.approx(0.004)
    assert estimate.safe_s(8) == pytest.approx(0.006)
    assert estimate.best_rows(64) == 32
    assert estimate.best_rows(4) == 4


def test_a_machine_that_became_slower_is_followed_at_every_size():
    estimate = Estimate(table())
    for _ in range(60):
        estimate.observe(8, 0.008)
    assert estimate.run_s(8) == pytest.approx(0.008, rel=0.02)
    assert estimate.run_s(32) == pytest.approx(0.020, rel=0.02), "sizes not seen follow the others"


def test_sizes_are_corrected_apart():
    estimate = Estimate(table())
    for _ in range(60):
        estimate.observe(8, 0.008)
        estimate.observe(32, 0.010)
    assert estimate.run_s(8) == pytest.approx(0.008, rel=0.02)
    assert estimate.run_s(32) == pytest.approx(0.010, rel=0.02)


def test_one_outlier_hardly_counts():
    estimate = Estimate(table())
    estimate.observe(8, 10.0)
    assert estimate.run_s(8) < 0.013


def test_what_a_deadline_may_count_on_is_the_99th_percentile_of_what_was_seen():
    estimate = Estimate(table(p99=1.0))
    for number in range(128):
        estimate.observe(8, 0.008 if number % 20 == 0 else 0.004)
    assert estimate.safe_s(8) > 1.5 * estimate.run_s(8)


def test_ratios_tell_how_good_the_prediction_was():
    assert Estimate(table()).observe(8, 0.006) == pytest.approx(1.5)
    assert Estimate(None).observe(8, 0.006) is None


def test_a_lane_without_a_table_promises_nothing_until_it_has_learned():
    estimate = Estimate(None)
    assert (estimate.known, estimate.run_s(8), estimate.safe_s(8), estimate.best_rows(16)) == (False, 0.0, 0.0, 16)
    for _ in range(3):
        estimate.observe(8, 0.004)
    assert estimate.known
    assert estimate.run_s(8) == pytest.approx(0.004)


def test_expectation_follows_each_observation() -> None:
    estimate = Estimate(LatencyTable((1, 8), (10.0, 10.0), (10.0, 10.0), (10.0, 10.0), (10.0, 10.0)))
    seen = []
    for _ in range(3):
        seen.append(estimate.run_s(1))
        estimate.observe(1, 0.02)
    assert seen == sorted(seen)
    assert len(set(seen)) == 3


def test_sizes_that_come_later_enter_what_was_learned():
    estimate = Estimate(None)
    for _ in range(3):
        estimate.observe(16, 0.160)
    assert (estimate.known, estimate.best_rows(32), estimate.learned) == (True, 16, 3)
    for _ in range(20):
        estimate.observe(16, 0.320)
    now = estimate.run_s(16)
    assert estimate.observe(1, 0.016) is None
    assert estimate.run_s(1) == pytest.approx(0.016)
    assert estimate.run_s(16) == pytest.approx(now), "what was corrected stays so"
    assert (estimate.best_rows(32), estimate.learned) == (1, 4)
    assert estimate.observe(1, 0.016) == pytest.approx(1.0)
    assert estimate.learned == 4
