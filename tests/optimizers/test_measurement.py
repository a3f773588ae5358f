"""Races: order, pairing and intervals, on sessions whose time is under the test's control."""

import numpy as np
import pytest

from optimizers import measurement
from optimizers.measurement import Comparison, Race, RacePlan, Sample, median_interval, race

BATCHES = {rows: {"x": np.zeros((rows, 1), np.float32)} for rows in (1, 8)}


class Clock:
    """Stands for wall and CPU time; moves only when a session works or the race sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.pauses = 0
        monkeypatch.setattr(measurement.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(measurement.time, "process_time", lambda: self.now_s)
        monkeypatch.setattr(measurement.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses += 1


class Worker:
    """A session that takes a fixed time per row."""

    def __init__(self, name: str, clock: Clock, per_row_s: float, log: list[tuple[str, int]]) -> None:
        self.name, self.clock, self.per_row_s, self.log = name, clock, per_row_s, log

    def run(self, inputs):
        self.clock.now_s += self.per_row_s * len(inputs["x"])
        self.log.append((self.name, len(inputs["x"])))
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def samples(times: list[float]) -> list[Sample]:
    return [Sample(number, time, time) for number, time in enumerate(times)]


def test_table_and_speedup_follow_the_times(clock: Clock):
    workers = {"original": Worker("original", clock, 0.010, []), "half": Worker("half", clock, 0.005, [])}
    found = race(workers, BATCHES, plan=RacePlan(budget_s=2.0, max_rounds=20))
    assert found.rows == (1, 8)
    assert found.table("original").p50_ms == pytest.approx((10.0, 80.0))
    assert found.table("half").predict_s(8) == pytest.approx(0.040)
    speed = found.compare("half", "original", 8)
    assert (speed.speedup, speed.cpu_ratio, speed.verdict) == (pytest.approx(2.0), pytest.approx(0.5), "faster")
    assert found.compare("original", "half", 1).verdict == "slower"


def test_every_round_visits_every_session_once_in_shuffled_order(clock: Clock):
    log: list[tuple[str, int]] = []
    workers = {name: Worker(name, clock, 0.01, log) for name in ("a", "b", "c")}
    race(workers, {1: BATCHES[1]}, plan=RacePlan(budget_s=0.0, min_rounds=15, least_rounds=12))
    rounds = [[name for name, _ in log[9 + 3 * i : 12 + 3 * i]] for i in range(12)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2


def test_slow_batches_get_fewer_rounds_but_never_less_than_the_least(clock: Clock):
    log: list[tuple[str, int]] = []
    plan = RacePlan(budget_s=0.4, least_rounds=5, min_rounds=15, max_rounds=40)
    found = race({"a": Worker("a", clock, 0.01, log)}, BATCHES, plan=plan)
    assert len(found.samples["a", 1]) == 20
    assert len(found.samples["a", 8]) == 5
    assert found.samples["a", 8][-1].round >= 15, "rounds of a slow batch size are spread over the whole race"


def test_short_runs_are_repeated_within_a_sample(clock: Clock):
    log: list[tuple[str, int]] = []
    plan = RacePlan(budget_s=0.0, least_rounds=5, min_rounds=5, sample_s=1e-3)
    found = race({"a": Worker("a", clock, 1e-4, log)}, {1: BATCHES[1]}, plan=plan)
    assert len(log) == 3 + 5 * 10
    assert found.samples["a", 1][0].wall_s == pytest.approx(1e-4)


def test_sessions_that_spin_run_in_a_block_of_their_own_followed_by_a_pause(clock: Clock):
    log: list[tuple[str, int]] = []
    workers = {name: Worker(name, clock, 0.01, log) for name in ("original", "a", "b")}
    plan = RacePlan(budget_s=0.0, least_rounds=6, min_rounds=6)
    race(workers, BATCHES, frozenset({"original"}), plan)
    assert clock.pauses == 6
    for number in range(6):
        names = [name for name, _ in log[18 + 6 * number : 24 + 6 * number]]
        spinning = [index for index, name in enumerate(names) if name == "original"]
        assert spinning in ([0, 1], [4, 5])


def test_two_sessions_that_spin_never_share_a_block(clock: Clock):
    log: list[tuple[str, int]] = []
    workers = {name: Worker(name, clock, 0.01, log) for name in ("original", "a", "two", "b")}
    plan = RacePlan(budget_s=0.0, least_rounds=4, min_rounds=4)
    race(workers, BATCHES, frozenset({"original", "two"}), plan)
    assert clock.pauses == 8
    for number in range(4):
        names = [name for name, _ in log[24 + 8 * number : 32 + 8 * number]]
        for spinner in ("original", "two"):
            first = names.index(spinner)
            assert names[first : first + 2] == [spinner] * 2


def test_pauses_take_at_most_half_of_the_budget(clock: Clock):
    plan = RacePlan(budget_s=2.0, settle_s=0.05, max_rounds=60)
    race({"original": Worker("original", clock, 0.001, [])}, {1: BATCHES[1]}, frozenset({"original"}), plan)
    assert clock.pauses == 20


def test_speedups_are_paired_by_round():
    # Noise that hits both sessions of a round alike leaves the ratio alone.
    noise = np.random.default_rng(0).uniform(1, 10, 30)
    found = Race({("base", 1): samples(list(noise)), ("mine", 1): samples(list(noise / 1.1))})
    speed = found.compare("mine", "base", 1)
    assert speed.speedup == pytest.approx(1.1)
    assert speed.low == pytest.approx(1.1)
    assert speed.pairs == 30
    assert str(speed) == "1.10x (1.10-1.10) at batch 1"


def test_noise_is_called_indistinguishable():
    rng = np.random.default_rng(1)
    found = Race({("a", 1): samples(list(rng.uniform(1, 2, 40))), ("b", 1): samples(list(rng.uniform(1, 2, 40)))})
    assert found.compare("a", "b", 1).verdict == "indistinguishable"


def test_interval_of_the_median_covers_it_as_often_as_promised():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(sorted(rng.exponential(size=31)))
        hits += low <= np.log(2) <= high
    assert hits / 2000 > 0.94


def test_interval_of_few_values_is_their_range():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 5.0)
    assert median_interval([7.0]) == (7.0, 7.0)


def test_progress_ends_at_one(clock: Clock):
    seen: list[float] = []
    plan = RacePlan(budget_s=0.0, least_rounds=5, min_rounds=5)
    race({"a": Worker("a", clock, 0.1, [])}, BATCHES, plan=plan, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.9712, 0.9963, "(0.97-0.996)"),
        (1.0042, 1.0961, "(1.004-1.10)"),
        (0.95, 0.99996, "(0.95-0.99996)"),
        (0.97, 1.0, "(0.97-1.00)"),
        (0.994, 1.006, "(0.99-1.01)"),
    ],
)
def test_rounding_does_not_hide_on_which_side_of_1_an_interval_ends(low: float, high: float, text: str):
    assert str(Comparison(8, 0.98, low, high, 30, 1.0)) == f"0.98x {text} at batch 8"
