"""Counts and percentiles, and what a worker reports."""

import math

import numpy as np
import pytest

from loadtests.tallies import FAILED, OK, REFUSALS, UNANSWERED, Recording, Tally, outcome_of


def test_percentiles_are_within_half_a_percent():
    times = np.random.default_rng(0).lognormal(1.0, 1.5, 5000)
    tally = Tally()
    for time_ms in times:
        tally.add(OK, float(time_ms), in_time=True)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = np.sort(times)[max(0, math.ceil(share * len(times)) - 1)]
        assert tally.percentile_ms(share) == pytest.approx(exact, rel=0.0051)


def test_refusals_and_failures_are_apart():
    tally = Tally()
    for status in (200, 200, 429, 503, 504, 500, 0):
        tally.add(outcome_of(status), 1.0, in_time=status == 200)
    tally.add(OK, 50.0, in_time=False)
    tally.add(UNANSWERED, 0.0, in_time=False)
    assert (tally.asked, tally.answered, tally.good, tally.refused, tally.failed) == (9, 3, 2, 3, 3)
    assert tally.outcomes == {OK: 3, **dict.fromkeys(REFUSALS.values(), 1), FAILED: 2, UNANSWERED: 1}


def test_only_good_answers_have_latencies():
    tally = Tally()
    tally.add(REFUSALS[429], 1.0, in_time=False)
    assert math.isnan(tally.percentile_ms(0.5))


def test_reports_of_workers_add_up_and_are_given_once():
    worker, other, master = Recording(), Recording(), Recording()
    for recording, kind, ms in ((worker, 0, 5.0), (worker, 1, 7.0), (other, 0, 9.0)):
        recording.at(3.7, kind).add(OK, ms, in_time=True)
    worker.at(3.7, 0).queue_ms += 2.0
    for recording in (worker, other, worker):
        master.give(recording.take())
    assert master.between(3, 4).answered == 3
    assert master.between(3, 4, kind=0).answered == 2
    assert master.between(3, 4).queue_ms == 2.0
    assert master.between(3, 4).percentile_ms(1.0) == pytest.approx(9.0, rel=0.006)
    assert master.between(4, 9).asked == 0
