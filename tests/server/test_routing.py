"""Routing policy: which lane takes what, and what admission predicts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import routing
from server.artifact import LatencyTable
from server.batching import BatchLimits
from server.errors import DeadlineUnmeetable, QueueFull
from server.estimate import Estimate
from server.prediction import latest_s, predict_completion
from server.routes import LaneSpec, LaneState, Route, routes_of, state_of
from server.routing import refusal
from server.tensors import InferRequest
from server.waiting import Pending, RequestQueue
from tests.server.waiting import Answer, Room, pending_of

LIMITS = BatchLimits(batchable=True, max_rows=8, max_queue_rows=64, max_queue_delay_s=0.0, default_timeout_s=0.0)


def table(*ms: float, rows: tuple[int, ...] = (1, 8)) -> LatencyTable:
    times = ms if len(ms) == len(rows) else ms * len(rows)
    return LatencyTable(rows, times, times, times, times)


def lane(
    variant: str = "int8", device: str = "cpu", ms: float | None = 10.0, threads: int = 1, max_rows: int = 8
) -> LaneState:
    """A lane whose runs take the same time whatever their size."""
    return LaneState(variant, device, Estimate(None if ms is None else table(ms)), threads, max_rows, max_rows)


def lanes_of(route: Route) -> tuple[LaneState, ...]:
    return (*route.preferred, *route.bulk, *route.slower)


def choose(taker: LaneState, routes: dict[str, Route], waiting, now: float, cores: int) -> str | None:
    return routing.choose(taker, routes, waiting, now, Room(cores, lanes_of(routes[""])))


def may_take(taker: LaneState, route: Route, waiting, now: float, cores: int) -> bool:
    return routing.may_take(taker, route, waiting, now, Room(cores, lanes_of(route)))


def queues(**waiting: list[tuple[int, float]]) -> dict[str, RequestQueue[Answer]]:
    """Queues by pin ("any" = no pin) that hold requests of (rows, arrival)."""
    made: dict[str, RequestQueue[Answer]] = {pin: RequestQueue() for pin in ("", "int8", "fp32")}
    for name, requests in waiting.items():
        pin = "" if name == "any" else name
        for rows, arrival_s in requests:
            made[pin].append(request_of(rows, arrival_s, pin))
    return made


def request_of(rows: int, arrival_s: float, pin: str = "", timeout_s: float | None = None) -> Pending[Answer]:
    request = InferRequest({"x": np.zeros((rows, 1))}, variant=pin, timeout_s=timeout_s)
    return pending_of(request, arrival_s)


class NoRunner:
    def run(self, inputs):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("latency", "batchable", "max_rows"),
    [
        (None, True, 8),
        (None, False, 1),
        (table(1.0, 2.0, 4.0, rows=(1, 4, 8)), True, 4),
        (table(1.0, 1.0, 1.0, rows=(1, 4, 32)), True, 8),
        (table(1.0, 1.0, 1.0, rows=(1, 4, 32)), False, 1),
    ],
    ids=["unmeasured", "unmeasured alone", "best size", "limit", "alone"],
)
def test_a_lane_batches_up_to_its_best_measured_size_within_the_limit(latency, batchable, max_rows):
    limits = BatchLimits(batchable, 8, 64, 0.0, 0.0)
    assert state_of(LaneSpec("v", "cpu", NoRunner(), latency, 1), limits, 2).max_rows == max_rows


def test_a_lane_of_all_threads_occupies_all_cores():
    assert state_of(LaneSpec("v", "cpu", NoRunner(), None, 0), LIMITS, 6).threads == 6


def test_pinned_work_goes_only_to_lanes_of_its_variant():
    int8, fp32 = lane("int8"), lane("fp32")
    routes, waiting = routes_of([int8, fp32]), queues(fp32=[(1, 0.0)])
    assert choose(int8, routes, waiting, 1.0, 2) is None
    assert choose(fp32, routes, waiting, 1.0, 2) == "fp32"


def test_the_oldest_request_decides_between_pinned_and_other_work():
    int8 = lane("int8")
    routes = routes_of([int8, lane("fp32")])
    assert choose(int8, routes, queues(any=[(1, 0.0)], int8=[(1, 1.0)]), 2.0, 2) == ""
    assert choose(int8, routes, queues(any=[(1, 1.0)], int8=[(1, 0.0)]), 2.0, 2) == "int8"


def test_an_idle_lane_with_an_empty_queue_takes_nothing():
    int8 = lane("int8")
    assert choose(int8, routes_of([int8, lane("fp32")]), queues(), 0.0, 2) is None


@pytest.mark.parametrize(
    ("slow_ms", "busy_for_s", "takes"),
    [(25.0, 0.020, True), (35.0, 0.020, False), (35.0, 0.030, True)],
    ids=["sooner", "later", "sooner because the fast one is busy for longer"],
)
def test_a_slower_lane_takes_work_only_when_it_finishes_it_sooner(slow_ms, busy_for_s, takes):
    fast, slow = lane("fp16", "cuda:0", 10.0), lane("int8", "cpu", slow_ms)
    route = routes_of([fast, slow])[""]
    fast.busy, fast.busy_until_s = True, 100.0 + busy_for_s
    assert may_take(slow, route, queues(any=[(1, 0.0)])[""], 100.0, 2) is takes


def test_a_slower_lane_leaves_work_to_an_idle_fast_lane():
    fast, slow = lane("fp16", "cuda:0", 10.0), lane("int8", "cpu", 1.0)
    assert not may_take(slow, routes_of([fast, slow])[""], queues(any=[(1, 0.0)])[""], 0.0, 2)


@pytest.mark.parametrize("fast_ms", [None, 10.0])
def test_without_a_prediction_a_slower_lane_takes_only_pinned_work(fast_ms):
    fast, slow = lane("fp32", "cuda:0", fast_ms), lane("int8", "cpu", None)
    routes = routes_of([fast, slow])
    fast.start(1, False, 0.0)
    assert choose(slow, routes, queues(any=[(1, 0.0)]), 5.0, 2) is None
    assert choose(slow, routes, queues(any=[(1, 0.0)], int8=[(1, 1.0)]), 5.0, 2) == "int8"


def test_an_overdue_fast_lane_is_expected_to_be_late_by_as_much_again():
    fast, slow = lane("fp16", "cuda:0", 10.0), lane("int8", "cpu", 40.0)
    route, waiting = routes_of([fast, slow])[""], queues(any=[(1, 0.0)])[""]
    fast.start(1, False, 100.0)
    assert not may_take(slow, route, waiting, 100.015, 2)
    assert may_take(slow, route, waiting, 100.050, 2)


def test_work_without_a_pin_never_keeps_more_threads_busy_than_cores():
    first, second, third = lane("int8"), lane("int8"), lane("int8", "cuda:0")
    route, waiting = routes_of([first, second])[""], queues(any=[(1, 0.0)])[""]
    first.start(1, False, 0.0)
    assert may_take(second, route, waiting, 0.0, 2)
    assert not may_take(second, route, waiting, 0.0, 1)
    elsewhere = routes_of([third, second])[""]
    third.start(1, False, 0.0)
    second.times = Estimate(table(1.0))
    assert may_take(second, elsewhere, waiting, 0.0, 1), "another device has cores of its own"


def test_pinned_work_neither_starves_nor_is_counted():
    int8, fp32 = lane("int8"), lane("fp32")
    routes = routes_of([int8, fp32])
    int8.start(1, False, 0.0)
    assert choose(fp32, routes, queues(fp32=[(1, 0.0)]), 0.0, 1) == "fp32"
    another = lane("int8")
    assert choose(another, routes_of([int8, another]), queues(int8=[(1, 0.0)]), 0.0, 1) == "int8"
    int8.busy = False
    fp32.start(1, True, 0.0)
    assert choose(int8, routes, queues(any=[(1, 0.0)]), 0.0, 1) == ""


def test_a_lane_of_more_threads_than_cores_runs_when_it_is_alone():
    wide = lane("int8", threads=4)
    assert may_take(wide, routes_of([wide])[""], queues(any=[(1, 0.0)])[""], 0.0, 2)


def test_pinned_work_prefers_the_first_device_of_its_variant():
    gpu, cpu = lane("fp32", "cuda:0", 1.0), lane("fp32", "cpu", 50.0)
    routes, waiting = routes_of([gpu, cpu]), queues(fp32=[(1, 0.0)])
    gpu.start(1, True, 0.0)
    assert choose(cpu, routes, waiting, 0.0, 2) is None
    assert choose(gpu, routes, waiting, 0.0, 2) == "fp32"


@pytest.mark.parametrize(
    ("backlog", "rows", "expected_ms"),
    [(0, 1, 10), (0, 20, 10), (7, 1, 10), (8, 1, 20), (7, 2, 20), (16, 1, 30), (16, 0, 20)],
)
def test_one_idle_lane_finishes_after_its_backlog(backlog, rows, expected_ms):
    route = routes_of([lane()])[""]
    assert predict_completion(route, backlog, rows, 5.0, 2) == pytest.approx(5.0 + expected_ms / 1e3)


def test_lanes_work_off_a_backlog_in_parallel():
    pair = [lane(), lane()]
    assert predict_completion(routes_of(pair)[""], 8, 1, 0.0, 2) == pytest.approx(0.010)
    assert predict_completion(routes_of(pair)[""], 16, 1, 0.0, 2) == pytest.approx(0.020)
    assert predict_completion(routes_of(pair)[""], 8, 1, 0.0, 1) == pytest.approx(0.020), "one core, one lane"


def test_a_running_batch_counts():
    only = lane()
    only.start(8, False, 0.0)
    assert predict_completion(routes_of([only])[""], 0, 1, 0.004, 2) == pytest.approx(0.020)


def test_behind_a_full_batch_others_are_expected_to_fill_the_next_one():
    only = state_of(LaneSpec("v", "cpu", NoRunner(), table(10.0, 40.0), 1), LIMITS, 2)
    route = routes_of([only])[""]
    assert predict_completion(route, 0, 1, 0.0, 2) == pytest.approx(0.010)
    assert predict_completion(route, 8, 1, 0.0, 2) == pytest.approx(0.080), "not 0.050"
    assert predict_completion(route, 8, 0, 0.0, 2) == pytest.approx(0.040), "nobody's own batch"


def test_a_slower_lane_shortens_the_prediction_only_for_what_it_would_take():
    fast, slow = lane("fp16", "cuda:0", 10.0), lane("int8", "cpu", 25.0)
    route = routes_of([fast, slow])[""]
    assert predict_completion(route, 8, 8, 0.0, 2) == pytest.approx(0.020)
    assert predict_completion(route, 16, 8, 0.0, 2) == pytest.approx(0.025)


def test_an_unmeasured_model_has_no_prediction():
    assert predict_completion(routes_of([lane(ms=None)])[""], 0, 1, 0.0, 2) is None


@given(st.integers(0, 20_000), st.integers(1, 16), st.lists(st.floats(1.0, 50.0), min_size=1, max_size=3))
def test_prediction_grows_with_the_backlog_and_stays_near_the_lanes_throughput(backlog, rows, times_ms):
    lanes = [lane(ms=ms) for ms in times_ms]
    route = routes_of(lanes)[""]
    seen = predict_completion(route, backlog, rows, 0.0, len(lanes))
    more = predict_completion(route, backlog + 64 * len(lanes), rows, 0.0, len(lanes))
    rows_per_s = sum(8 / (ms / 1e3) for ms in times_ms)
    assert seen is not None
    assert more is not None
    assert seen < more
    assert backlog / rows_per_s - 0.1 <= seen <= backlog / rows_per_s + 3 * max(times_ms) / 1e3


def test_a_full_queue_refuses_with_the_predicted_drain_time():
    lanes = [lane(), lane("fp32")]
    waiting = queues(any=[(60, 0.0)], fp32=[(4, 0.0)])
    refused = refusal(request_of(1, 0.0), routes_of(lanes), waiting, 64, 0.0, 1)
    assert isinstance(refused, QueueFull)
    assert refused.retry_after_s == pytest.approx(0.080)
    assert "64 rows wait" in str(refused)


def test_a_full_queue_of_unknown_speed_asks_for_at_least_a_second():
    waiting = queues(any=[(64, 0.0)])
    refused = refusal(request_of(1, 0.0), routes_of([lane(ms=None)]), waiting, 64, 0.0, 1)
    assert isinstance(refused, QueueFull)
    assert refused.retry_after_s >= 1.0


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    assert refusal(request_of(100, 0.0), routes_of([lane()]), queues(), 64, 0.0, 1) is None


def test_a_deadline_before_the_predicted_completion_is_refused():
    routes, waiting = routes_of([lane()]), queues()
    waiting[""].append(request_of(8, -0.1, timeout_s=0.1))
    assert refusal(request_of(1, 0.0, timeout_s=0.021), routes, waiting, 64, 0.0, 1) is None
    refused = refusal(request_of(1, 0.0, timeout_s=0.019), routes, waiting, 64, 0.0, 1)
    assert isinstance(refused, DeadlineUnmeetable)
    assert refused.retry_after_s == pytest.approx(0.020)
    assert "predicted in 20.0 ms, the timeout is 19.0 ms" in str(refused)


def test_a_deadline_of_an_unmeasured_model_is_admitted():
    waiting = queues(any=[(8, 0.0)])
    assert refusal(request_of(1, 0.0, timeout_s=1e-6), routes_of([lane(ms=None)]), waiting, 64, 0.0, 1) is None


def test_work_pinned_to_another_variant_is_no_backlog():
    lanes = [lane("int8"), lane("fp32")]
    waiting = queues()
    waiting["fp32"].append(request_of(32, -1.0, "fp32"))
    assert refusal(request_of(1, 0.0, timeout_s=0.011), routes_of(lanes), waiting, 64, 0.0, 1) is None
    assert refusal(request_of(1, 0.0, "fp32", 0.011), routes_of(lanes), waiting, 64, 0.0, 1) is not None


def bulk_lanes(threads: int = 1) -> tuple[LaneState, LaneState]:
    large = lane("int8", ms=5.0, threads=threads)
    large.from_rows = 4
    return lane("fp32", threads=threads), large


def test_large_batches_go_to_their_own_lane_and_small_ones_do_not():
    usual, large = bulk_lanes()
    routes = routes_of([usual, large])
    for rows, taker, other in ((3, usual, large), (4, large, usual)):
        waiting = queues(any=[(1, 0.0)] * rows)
        assert choose(taker, routes, waiting, 1.0, 2) == ""
        assert choose(other, routes, waiting, 1.0, 2) is None


def test_preferred_lane_takes_a_large_batch_while_its_own_lane_is_busy():
    usual, large = bulk_lanes()
    large.start(8, False, 0.0)
    assert choose(usual, routes_of([usual, large]), queues(any=[(1, 0.0)] * 8), 1.0, 2) == ""


def test_preferred_lane_takes_a_large_batch_that_finds_no_core_on_its_own_lane():
    usual, other, large = lane("fp32"), lane("fp32"), lane("int8", threads=2)
    large.from_rows = 4
    other.start(1, False, 0.0)
    routes = routes_of([usual, other, large])
    assert choose(usual, routes, queues(any=[(1, 0.0)] * 8), 1.0, 2) == ""


def test_pinned_work_of_any_size_goes_to_its_lane():
    usual, large = bulk_lanes()
    routes = routes_of([usual, large])
    assert choose(large, routes, queues(int8=[(1, 0.0)]), 1.0, 2) == "int8"
    assert choose(usual, routes, queues(int8=[(8, 0.0)]), 1.0, 2) is None


def test_lane_for_large_batches_that_leads_takes_everything():
    large = bulk_lanes()[1]
    assert choose(large, routes_of([large, lane("fp32")]), queues(any=[(1, 0.0)]), 1.0, 2) == ""


def test_prediction_counts_on_the_lane_for_large_batches():
    usual, large = bulk_lanes(threads=2)
    route = routes_of([usual, large])[""]
    assert predict_completion(route, 0, 3, 0.0, 2) == pytest.approx(0.010)
    assert predict_completion(route, 0, 4, 0.0, 2) == pytest.approx(0.005)


def test_a_much_slower_lane_takes_the_end_of_a_long_queue_only():
    fast, slow = lane("fp16", "cuda:0", 10.0), lane("int8", "cpu", 50.0)
    route = routes_of([fast, slow])[""]
    fast.start(8, False, 0.0)
    assert not may_take(slow, route, queues(any=[(8, 0.0)] * 3)[""], 0.0, 2), (
        "the fast lane is done with it after 40 ms"
    )
    assert may_take(slow, route, queues(any=[(8, 0.0)] * 5)[""], 0.0, 2), "the fast lane would need 60 ms"


def trials(lane: LaneState, batches: int, waiting: int = 64) -> list[int]:
    """Start so many batches out of a long queue; return the numbers of those that tried more rows."""
    found = []
    for number in range(lane.batches, lane.batches + batches):
        rows = min(lane.next_rows, waiting)
        if rows > lane.max_rows:
            found.append(number)
        lane.start(rows, False, 0.0)
    return found


def test_trials_of_twice_the_rows_grow_rare_while_they_change_nothing() -> None:
    lane = LaneState("fp32", "cpu", Estimate(table(1.0, 1.5, 4.0, rows=(1, 2, 4))), 1, 2, 8)
    assert trials(lane, 600) == [32, 96, 224, 480]
    assert [b - a for a, b in pairwise(trials(lane, 5000))][-1] == 1024
    for _ in range(60):
        lane.times.observe(2, 0.0015)
        lane.times.observe(4, 0.0015)
    trials(lane, 200)
    assert lane.max_rows == 4
    assert lane.trial_gap <= 128, "what was found out may go on"


def test_trial_waits_for_a_long_queue_and_keeps_to_the_limit() -> None:
    lane = LaneState("fp32", "cpu", Estimate(table(1.0, 1.5, 4.0, rows=(1, 2, 4))), 1, 2, 3)
    assert trials(lane, 100, waiting=2) == []
    assert lane.next_rows == 3
    assert trials(lane, 2) == [100]


def test_lanes_that_learn_together_know_at_once_which_batches_pay() -> None:
    times = Estimate(None)
    spec = LaneSpec("v", "cpu", NoRunner(), None, 1)
    first, second = (state_of(spec, LIMITS, 2, times) for _ in range(2))
    assert first.max_rows == LIMITS.max_rows, "nothing is known"
    for rows in (1, 1, 1, 8):
        times.observe(rows, 0.010 * rows)
    second.start(1, False, 0.0)
    assert second.max_rows == 1
    assert first.max_rows == LIMITS.max_rows
    first.start(1, False, 0.0)
    assert first.max_rows == 1


def test_size_of_batches_follows_what_is_seen() -> None:
    latency = table(20.0, 22.0, 44.0, rows=(1, 2, 4))
    lane = state_of(LaneSpec("v", "cpu", NoRunner(), latency, 1), LIMITS, 2)
    assert lane.max_rows == 2
    for _ in range(60):
        lane.times.observe(2, 0.022)
        lane.times.observe(4, 0.025)
    lane.batches = 31
    lane.start(2, False, 0.0)
    assert lane.max_rows == 4


@given(backlog=st.integers(0, 200), rows=st.integers(1, 8), lanes=st.integers(1, 4), busy_s=st.floats(0, 0.5))
def test_what_one_lane_alone_would_do_in_time_is_never_refused_nor_underestimated(
    backlog: int, rows: int, lanes: int, busy_s: float
) -> None:
    states = [lane(ms=10.0) for _ in range(lanes)]
    states[0].busy, states[0].busy_until_s = True, busy_s
    route = routes_of(states)[""]
    done_s = predict_completion(route, backlog, rows, 0.0, lanes)
    assert done_s is not None
    assert latest_s(states[0], backlog + rows, 0.0) >= done_s - 1e-9
