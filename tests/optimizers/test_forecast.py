"""Forecasts: what comparisons and races take, from the times of single runs."""

import pytest

from optimizers.forecast import Forecast

COST = {1: 0.5, 8: 2.0}
"""0.5 s for a single, 0.25 s for a row in a full batch."""


@pytest.mark.parametrize(("workers", "seconds"), [(1, 25.0), (2, 12.5)])
def test_search_samples_are_compared_in_full_batches_only(workers: int, seconds: float):
    assert Forecast(100, 0, 8, workers).glance_s(COST) == seconds


def test_held_out_samples_are_compared_one_by_one_and_in_full_batches():
    assert Forecast(0, 200, 8, 2).proof_s(COST) == 200 * (0.5 + 0.25) / 2


def test_rows_that_must_not_share_a_run_are_compared_one_by_one():
    assert Forecast(0, 200, 1, 1).proof_s(COST) == 200 * 0.5
    assert Forecast(10, 0, 1, 1).glance_s(COST) == 5.0


def test_race_takes_its_budget_or_its_least_number_of_rounds():
    forecast = Forecast(0, 0, 8, 1)
    assert forecast.race_s([COST, COST], [1, 8], 10.0) == 7 * 2 * (0.5 + 2.0)
    assert forecast.race_s([COST, COST], [1], 10.0) == 10.0
    assert forecast.race_s([COST], [1]) == 3.5


def test_trial_is_a_proof_its_races_and_the_measurement_of_memory():
    forecast = Forecast(0, 200, 8, 2)
    assert forecast.races_s([COST, COST], 1.0) == 3 * forecast.race_s([COST, COST], COST) + 2.0
    assert forecast.races_s([COST, COST], 1000.0) == 1002.0
    settings_s = forecast.race_s([COST], COST)
    assert forecast.trial_s(COST) == forecast.proof_s(COST) + forecast.races_s([COST]) + settings_s
