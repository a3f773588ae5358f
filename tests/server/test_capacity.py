"""The simulated replica, against what queueing theory knows."""

import pytest

from server.artifact import LatencyTable
from server.capacity import Replica, capacity, serve


def table(*times_ms: float, rows: tuple[int, ...] = (1,), p99: float = 1.0) -> LatencyTable:
    return LatencyTable(rows, times_ms, tuple(time * p99 for time in times_ms), times_ms, times_ms)


def replica(lanes: int = 1, most_rows: int = 1, overhead_s: float = 0.0, **tables: LatencyTable) -> Replica:
    return Replica(((0, tables.get("first", table(10.0))),), lanes, most_rows, 2, overhead_s)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_lane_without_batches_waits_as_m_d_1_does(load: float):
    service = serve(replica(), load / 0.010, requests=100_000)
    assert service.busy == pytest.approx(load, rel=0.03)
    assert service.batch == 1.0
    # Pollaczek and Khinchine: mean wait = load * t / (2 * (1 - load)); the p99 is tested by its order only.
    mean_s = 0.010 * (1 + load / (2 * (1 - load)))
    assert 0.010 <= service.p50_s < mean_s * 1.1
    assert service.p99_s > mean_s


def test_an_idle_replica_answers_in_the_time_of_a_run():
    service = serve(replica(overhead_s=0.002), 0.1)
    assert service.p50_s == pytest.approx(0.012, rel=0.01)
    assert service.p99_s == pytest.approx(0.012, rel=0.05)


def test_spread_of_run_times_reaches_the_p99():
    spread = Replica(((0, table(10.0, p99=3.0)),), 1, 1, 2, 0.0)
    assert serve(spread, 0.1).p99_s == pytest.approx(0.030, rel=0.1)


def test_batches_and_lanes_raise_the_capacity():
    batched = replica(most_rows=8, first=table(10.0, 20.0, rows=(1, 8)))
    assert replica().most_per_s(1) == pytest.approx(100)
    assert batched.most_per_s(1) == pytest.approx(400)
    assert replica(lanes=3).most_per_s(1) == pytest.approx(300)
    one, more, lanes = (capacity(each, 0.1) for each in (replica(), batched, replica(lanes=3)))
    assert 70 < one < 100
    assert 300 < more <= 400
    assert 2.5 * one < lanes <= 300
    assert serve(batched, 300).batch > 2


def test_the_p99_at_the_capacity_is_the_limit():
    pod = replica(lanes=2, most_rows=8, first=table(10.0, 20.0, rows=(1, 8)))
    highest = capacity(pod, 0.050)
    assert serve(pod, highest).p99_s <= 0.050
    assert serve(pod, highest * 1.1).p99_s > 0.050


def test_no_rate_keeps_a_limit_below_one_run():
    assert capacity(replica(), 0.009) == 0.0


def test_work_around_a_run_takes_from_the_same_cores():
    heavy = replica(overhead_s=0.010)
    assert heavy.most_per_s(1) == pytest.approx(1 / (0.010 + 0.005))
    assert capacity(heavy, 0.2) < 0.75 * capacity(replica(), 0.2)
    apart = Replica(heavy.tables, 1, 1, 2, 0.010, shares_cores=False)
    assert apart.most_per_s(1) == pytest.approx(100)


def test_batches_fit_the_limit_twice():
    pod = replica(most_rows=32, first=table(10.0, 40.0, 80.0, rows=(1, 4, 8)))
    assert pod.capped(0.080, rows=1).most_rows == 4
    assert pod.capped(0.001, rows=2).most_rows == 2


def test_large_batches_run_in_their_own_variant():
    pod = Replica(((0, table(10.0, 80.0, rows=(1, 8))), (8, table(30.0, 40.0, rows=(1, 8)))), 1, 8, 2, 0.0)
    assert pod.run_s(7) == pytest.approx(0.070)
    assert pod.run_s(8) == pytest.approx(0.040)


def test_the_same_seed_gives_the_same_figures():
    assert serve(replica(lanes=2), 120, seed=3) == serve(replica(lanes=2), 120, seed=3)
    assert serve(replica(lanes=2), 120, seed=3) != serve(replica(lanes=2), 120, seed=4)
