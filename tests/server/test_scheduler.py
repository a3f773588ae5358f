"""The scheduler: batches under load, cancellation, deadlines, routing, failure, drain and close.

The same tests run on a fake model and on a real onnxruntime session, so the fake is a verified one.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from queue import SimpleQueue

import msgspec
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.artifact import LatencyTable
from server.errors import (
    DeadlineExpired,
    DeadlineUnmeetable,
    Draining,
    InferenceFailed,
    QueueFull,
    SignatureMismatch,
    SlipstreamError,
    UnknownVariant,
)
from server.metrics import Metrics, ModelMetrics
from server.scheduler import BatchLimits, Completion, Cores, LaneSpec, Runner, Scheduler
from server.tensors import Array, InferRequest, Tensors
from tests import models

PATIENCE_S = 20.0  # How long a broken scheduler may hang before its test fails; never waited out by a correct one.


class FakeSession:
    """a, b FP32 [batch,4] -> sum, diff."""

    def run(self, inputs: Tensors) -> dict[str, Array]:
        if inputs["a"].shape[1:] != (4,):
            raise ValueError(f"secret detail: shape {inputs['a'].shape}")
        return {"sum": inputs["a"] + inputs["b"], "diff": inputs["a"] - inputs["b"]}


class RealSession:
    """The same model in onnxruntime."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Tensors) -> dict[str, Array]:
        return dict(zip(("sum", "diff"), self._session.run(["sum", "diff"], dict(inputs)), strict=True))


class Gate:
    """A runner that says when a batch arrives, and holds it until it is let through."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._arrived: SimpleQueue[int] = SimpleQueue()
        self._permits = threading.Semaphore(0)
        self.batches: list[int] = []
        self.threads: list[int] = []

    def run(self, inputs: Tensors) -> dict[str, Array]:
        self.batches.append(len(inputs["a"]))
        self.threads.append(threading.get_ident())
        self._arrived.put(len(inputs["a"]))
        assert self._permits.acquire(timeout=PATIENCE_S)
        return self._runner.run(inputs)

    async def arrival(self) -> int:
        """Wait until the next batch arrives; return its rows."""
        return await asyncio.to_thread(self._arrived.get, True, PATIENCE_S)

    def open(self, batches: int = 10_000) -> None:
        self._permits.release(batches)


class Failing:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def run(self, inputs: Tensors) -> dict[str, Array]:
        raise self._error


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["fake", "onnxruntime"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    if request.param == "fake":
        return FakeSession()
    return RealSession(models.save_two_inputs(tmp_path / "two.onnx"))


@pytest.fixture
def gate(session: Runner) -> Gate:
    return Gate(session)


Open = Callable[..., Scheduler]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens schedulers, and at the end opens their gates and closes them."""
    schedulers: list[tuple[Scheduler, list[LaneSpec]]] = []

    def opener(*lanes: LaneSpec, cores: int = 2, clock: Clock | None = None, metrics=None, **limits) -> Scheduler:
        metrics = metrics or ModelMetrics(Metrics(), "m", "1")
        scheduler = Scheduler(lanes, limits_of(**limits), metrics, Cores(cores), clock or Clock())
        schedulers.append((scheduler, list(lanes)))
        return scheduler

    yield opener
    for scheduler, lanes in schedulers:
        for lane in lanes:
            if isinstance(lane.runner, Gate):
                lane.runner.open()
        scheduler.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]


def limits_of(**changes) -> BatchLimits:
    values = {
        "batchable": True,
        "max_rows": 8,
        "max_queue_rows": 64,
        "max_queue_delay_s": 0.0,
        "default_timeout_s": 0.0,
    }
    return BatchLimits(**(values | changes))


def lane(runner: Runner, variant: str = "fp32", device: str = "cpu", ms: float | None = None) -> LaneSpec:
    """A lane; ``ms`` is its run time in the latency table, whatever the size."""
    times = (ms or 0.0,) * 2
    return LaneSpec(
        variant, device, runner, None if ms is None else LatencyTable((1, 8), times, times, times, times), 1
    )


def request_of(value: float = 1.0, rows: int = 1, width: int = 4, **fields) -> InferRequest:
    a = np.full((rows, width), value, np.float32)
    return InferRequest({"a": a, "b": np.ones_like(a)}, **fields)


async def answer(future: asyncio.Future[Completion]) -> Completion:
    async with asyncio.timeout(PATIENCE_S):
        return await future


async def failure(future: asyncio.Future[Completion]) -> SlipstreamError:
    with pytest.raises(SlipstreamError) as caught:
        await answer(future)
    return caught.value


def check(completion: Completion, value: float, rows: int = 1) -> None:
    assert completion.outputs["sum"].shape == (rows, 4)
    assert (completion.outputs["sum"] == np.float32(value) + 1).all()
    assert (completion.outputs["diff"] == np.float32(value) - 1).all()


# Batches.


async def test_requests_that_wait_for_a_busy_lane_share_the_next_batch(gate, opened):
    scheduler = opened(lane(gate))
    first = scheduler.submit(request_of(0.0))
    assert await gate.arrival() == 1
    later = [scheduler.submit(request_of(float(i), rows=i)) for i in (1, 2, 3)]
    gate.open()
    check(await answer(first), 0.0)
    for i, future in enumerate(later, start=1):
        completion = await answer(future)
        check(completion, float(i), rows=i)
        assert completion.batch_rows == 6
        assert (completion.variant, completion.device) == ("fp32", "cpu")
    assert gate.batches == [1, 6]


async def test_requests_of_one_loop_iteration_share_a_batch_and_one_wakeup(session, opened, monkeypatch):
    scheduler = opened(lane(session))
    loop = asyncio.get_running_loop()
    wakeups = []
    real = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *args, **kwargs: (wakeups.append(1), real(*args, **kwargs))
    )
    futures = [scheduler.submit(request_of(float(i))) for i in range(8)]
    for i, future in enumerate(futures):
        completion = await answer(future)
        check(completion, float(i))
        assert completion.batch_rows == 8
    assert len(wakeups) == 1


async def test_batches_stop_at_the_best_measured_size_and_keep_order(gate, opened):
    times = (1.0, 2.0, 4.0)
    latency = LatencyTable((1, 4, 8), times, times, times, times)
    scheduler = opened(LaneSpec("fp32", "cpu", gate, latency, 1))
    futures = [scheduler.submit(request_of(float(i))) for i in range(10)]
    finished = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: finished.append(i))
    gate.open()
    for future in futures:
        await answer(future)
    await asyncio.sleep(0)
    assert gate.batches == [4, 4, 2]
    assert finished == list(range(10))


async def test_unequal_shapes_are_never_mixed_and_the_oldest_goes_first(gate, opened):
    scheduler = opened(lane(gate))
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    wide = [scheduler.submit(request_of(width=5)) for _ in range(2)]
    narrow = [scheduler.submit(request_of(float(i))) for i in range(2)]
    gate.open()
    await answer(blocker)
    for future in wide:  # Only these fail: the model takes four columns.
        assert isinstance(await failure(future), InferenceFailed)
    for i, future in enumerate(narrow):
        check(await answer(future), float(i))
    # Each of the two that failed together is tried alone; a probe follows each failure.
    assert gate.batches == [1, 2, 1, 2, 1, 1, 1, 1]


async def test_a_request_above_the_best_size_is_parted_and_joined(gate, opened):
    scheduler = opened(lane(gate))
    gate.open()
    futures = [scheduler.submit(request_of(float(rows), rows)) for rows in (1, 20, 2)]
    for future, rows in zip(futures, (1, 20, 2), strict=True):
        check(await answer(future), float(rows), rows)
    assert gate.batches == [1, 8, 8, 6]


async def test_a_model_that_is_not_batched_runs_one_request_at_a_time(gate, opened):
    scheduler = opened(lane(gate), batchable=False)
    gate.open()
    futures = [scheduler.submit(request_of(float(rows), rows)) for rows in (3, 2)]
    for future, rows in zip(futures, (3, 2), strict=True):
        check(await answer(future), float(rows), rows)
    assert gate.batches == [3, 2]


async def test_inputs_that_disagree_are_refused_at_once(session, opened):
    inputs = {"a": np.zeros((2, 4), np.float32), "b": np.zeros((3, 4), np.float32)}
    with pytest.raises(SignatureMismatch, match="inputs disagree on batch size"):
        opened(lane(session)).submit(InferRequest(inputs))


async def test_two_lanes_of_a_variant_serve_one_queue(session, opened):
    gates = [Gate(session), Gate(session)]
    scheduler = opened(*map(lane, gates))
    first, second = scheduler.submit(request_of(1.0, rows=8)), scheduler.submit(request_of(2.0, rows=8))
    assert [await gate.arrival() for gate in gates] == [8, 8]
    gates[1].open()
    check(await answer(second), 2.0, rows=8)
    assert not first.done()
    gates[0].open()
    check(await answer(first), 1.0, rows=8)


async def test_a_tiny_model_runs_on_the_loop_until_nothing_waits(gate, opened):
    scheduler = opened(lane(gate, ms=0.05))
    gate.open()
    futures = [scheduler.submit(request_of(float(i))) for i in range(12)]
    check(await answer(futures[0]), 0.0)
    assert gate.batches == [8, 4]
    for i, future in enumerate(futures):
        check(await answer(future), float(i))
    assert set(gate.threads) == {threading.get_ident()}


async def test_a_large_request_of_a_tiny_model_leaves_the_loop_free(session, opened):
    clock = Clock()

    class Slow:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            clock.now += 0.0004
            return session.run(inputs)

    gate, times = Gate(Slow()), (0.05, 0.4)
    scheduler = opened(LaneSpec("fp32", "cpu", gate, LatencyTable((1, 8), times, times, times, times), 1), clock=clock)
    gate.open()
    future = scheduler.submit(request_of(3.0, rows=50))
    seen = []
    while not future.done():
        await asyncio.sleep(0)
        seen.append(len(gate.batches))
    check(await answer(future), 3.0, rows=50)
    assert gate.batches == [8] * 6 + [2]
    assert sorted(set(seen)) == [3, 6, 7], "others get a turn after each millisecond"


async def test_queue_and_compute_seconds_are_told_apart(session, opened):
    clock, metrics = Clock(), Metrics()

    class Slow:
        def run(self, inputs: Tensors) -> dict[str, Array]:
            clock.now += 0.5
            return session.run(inputs)

    gate = Gate(Slow())
    scheduler = opened(lane(gate), clock=clock, metrics=ModelMetrics(metrics, "m", "1"))
    first = scheduler.submit(request_of())
    await gate.arrival()
    second = scheduler.submit(request_of())
    gate.open()
    assert (await answer(first)).compute_s == pytest.approx(0.5)
    completion = await answer(second)
    assert (completion.queue_s, completion.compute_s) == (pytest.approx(0.5), pytest.approx(0.5))
    labels = {"model": "m", "version": "1"}
    value = metrics.registry.get_sample_value
    assert value("slipstream_queue_seconds_count", labels) == 2
    assert value("slipstream_queue_seconds_sum", labels) == pytest.approx(0.5)
    assert value("slipstream_batch_rows_sum", {**labels, "variant": "fp32", "device": "cpu"}) == 2


async def test_waiting_rows_are_shown_while_all_lanes_are_busy(gate, opened):
    metrics = Metrics()
    scheduler = opened(lane(gate), metrics=ModelMetrics(metrics, "m", "1"))
    first = scheduler.submit(request_of())
    await gate.arrival()
    second = scheduler.submit(request_of(rows=3))
    await asyncio.sleep(0)
    labels = {"model": "m", "version": "1"}
    assert metrics.registry.get_sample_value("slipstream_queue_rows", labels) == 3
    gate.open()
    await answer(first)
    await answer(second)
    assert metrics.registry.get_sample_value("slipstream_queue_rows", labels) == 0


# Cancellation.


async def test_cancelled_request_leaves_its_batch_intact(gate, opened):
    scheduler = opened(lane(gate))
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    futures = [scheduler.submit(request_of(float(i))) for i in range(4)]
    futures[1].cancel()
    gate.open()
    await answer(blocker)
    for i in (0, 2, 3):
        check(await answer(futures[i]), float(i))
    assert gate.batches == [1, 3], "the cancelled row was not run"


async def test_cancelling_while_the_batch_runs_leaves_the_others_intact(gate, opened):
    scheduler = opened(lane(gate))
    futures = [scheduler.submit(request_of(float(i))) for i in range(3)]
    await gate.arrival()
    futures[0].cancel()
    gate.open()
    for i in (1, 2):
        check(await answer(futures[i]), float(i))
    assert futures[0].cancelled()


async def test_cancelled_rows_make_room_in_a_full_queue(gate, opened):
    clock = Clock()
    scheduler = opened(lane(gate), max_queue_rows=4, clock=clock)
    scheduler.submit(request_of())
    await gate.arrival()
    waiting = [scheduler.submit(request_of()) for _ in range(4)]
    for future in waiting[:3]:
        future.cancel()
    admitted = scheduler.submit(request_of(7.0, rows=3))
    with pytest.raises(QueueFull):
        scheduler.submit(request_of())
    gate.open()
    check(await answer(admitted), 7.0, rows=3)
    await answer(waiting[3])


# Refusal and deadlines.


async def test_a_full_queue_refuses_at_once(gate, opened):
    scheduler = opened(lane(gate, ms=10.0), max_queue_rows=4)
    first = scheduler.submit(request_of())
    await gate.arrival()
    waiting = [scheduler.submit(request_of(rows=2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="4 rows wait and the request has 1; the queue holds 4") as caught:
        scheduler.submit(request_of())
    assert caught.value.retry_after_s == pytest.approx(0.020)
    gate.open()
    for future in (first, *waiting):
        await answer(future)
    await answer(scheduler.submit(request_of()))


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(gate, opened):
    clock = Clock()
    scheduler = opened(lane(gate, ms=10.0), clock=clock)
    with pytest.raises(DeadlineUnmeetable):
        scheduler.submit(request_of(timeout_s=0.011))  # a tenth is left for the answer's way
    scheduler.submit(request_of(timeout_s=0.012))
    await gate.arrival()
    with pytest.raises(DeadlineUnmeetable) as caught:
        scheduler.submit(request_of(timeout_s=0.022))
    assert caught.value.retry_after_s == pytest.approx(0.020)
    scheduler.submit(request_of(timeout_s=0.023))


async def test_an_expired_request_is_answered_while_the_lane_is_still_busy(gate, opened):
    clock = Clock()
    scheduler = opened(lane(gate), clock=clock)
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    patient = scheduler.submit(request_of(5.0))
    late = [scheduler.submit(request_of(timeout_s=timeout_s)) for timeout_s in (0.02, 0.01)]
    clock.now += 1
    for future in late:
        assert isinstance(await failure(future), DeadlineExpired)
    assert not blocker.done()
    gate.open()
    check(await answer(patient), 5.0)
    assert gate.batches == [1, 1]


async def test_the_timer_serves_one_deadline_after_the_other(gate, opened):
    clock = Clock()
    scheduler = opened(lane(gate), clock=clock, default_timeout_s=0.01)
    blocker = scheduler.submit(request_of(timeout_s=1000.0))
    await gate.arrival()
    first = scheduler.submit(request_of())
    second = scheduler.submit(request_of(timeout_s=0.03))
    clock.now += 0.02
    await failure(first)
    assert not second.done()
    clock.now += 0.02
    error = await failure(second)
    assert "40.0 ms in the queue" in str(error)
    gate.open()
    await answer(blocker)


async def test_a_request_that_expired_is_dropped_when_the_batch_forms(gate, opened, monkeypatch):
    clock = Clock()
    scheduler = opened(lane(gate), clock=clock)
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    late, fresh = scheduler.submit(request_of(timeout_s=50.0)), scheduler.submit(request_of(2.0))
    clock.now += 60
    gate.open()
    await answer(blocker)
    assert isinstance(await failure(late), DeadlineExpired)
    check(await answer(fresh), 2.0)
    assert gate.batches == [1, 1]


async def test_no_timer_runs_when_nobody_has_a_deadline(gate, opened, monkeypatch):
    loop = asyncio.get_running_loop()
    timers = []
    real = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda *args: (timers.append(args), real(*args))[1])
    scheduler = opened(lane(gate))
    futures = [scheduler.submit(request_of()) for _ in range(9)]
    gate.open()
    await asyncio.gather(*futures)
    assert timers == []
    await scheduler.submit(request_of(timeout_s=60.0))
    assert len(timers) == 1


# Delay.


async def test_without_a_delay_an_idle_lane_takes_a_single_request_at_once(gate, opened):
    scheduler = opened(lane(gate))
    scheduler.submit(request_of())
    assert await gate.arrival() == 1


async def test_a_delay_holds_a_batch_until_it_is_full(gate, opened):
    scheduler = opened(lane(gate), max_queue_delay_s=1000.0)
    gate.open()
    futures = [scheduler.submit(request_of(float(i))) for i in range(7)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert gate.batches == []
    futures.append(scheduler.submit(request_of(7.0)))
    for i, future in enumerate(futures):
        check(await answer(future), float(i))
    assert gate.batches == [8]


async def test_a_delay_ends_when_the_oldest_request_is_that_old(gate, opened):
    clock = Clock()
    scheduler = opened(lane(gate), max_queue_delay_s=0.01, clock=clock)
    gate.open()
    futures = [scheduler.submit(request_of(float(i))) for i in range(2)]
    await asyncio.sleep(0)
    assert gate.batches == []
    clock.now += 0.02
    for future in futures:
        assert (await answer(future)).batch_rows == 2


# Routing.


async def test_a_pinned_request_goes_to_its_variant(session, opened):
    scheduler = opened(lane(session, "int8"), lane(session, "fp32"))
    assert (await answer(scheduler.submit(request_of()))).variant == "int8"
    assert (await answer(scheduler.submit(request_of(variant="fp32")))).variant == "fp32"


async def test_an_unknown_variant_is_refused_with_the_known_ones(session, opened):
    scheduler = opened(lane(session, "int8"), lane(session, "fp32"))
    with pytest.raises(UnknownVariant, match="unknown variant 'fp64'; this model serves: int8, fp32"):
        scheduler.submit(request_of(variant="fp64"))


@pytest.mark.parametrize(("slow_ms", "taken"), [(15.0, True), (25.0, False)])
async def test_work_overflows_to_a_slower_lane_only_when_that_is_sooner(session, opened, slow_ms, taken):
    fast, slow = Gate(session), Gate(session)
    scheduler = opened(lane(fast, "fp16", "cuda:0", ms=10.0), lane(slow, "int8", "cpu", ms=slow_ms))
    first = scheduler.submit(request_of(1.0))
    await fast.arrival()
    second = scheduler.submit(request_of(2.0))
    await asyncio.sleep(0)
    if taken:
        assert await slow.arrival() == 1
    fast.open()
    slow.open()
    await answer(first)
    completion = await answer(second)
    check(completion, 2.0)
    assert completion.variant == ("int8" if taken else "fp16")


async def test_pinned_work_starts_although_all_cores_are_busy(session, opened):
    int8, fp32 = Gate(session), Gate(session)
    scheduler = opened(lane(int8, "int8", ms=10.0), lane(fp32, "fp32", ms=1.0), cores=1)
    scheduler.submit(request_of())
    await int8.arrival()
    waiting = scheduler.submit(request_of())
    pinned = scheduler.submit(request_of(4.0, variant="fp32"))
    assert await fp32.arrival() == 1
    fp32.open()
    check(await answer(pinned), 4.0)
    assert not waiting.done(), "one core: unpinned work does not overflow"
    assert fp32.batches == [1]


# Failure.


async def test_a_failing_run_fails_exactly_its_batch_and_is_logged(gate, opened, caplog):
    scheduler = opened(lane(gate))
    gate.open()
    bad = [scheduler.submit(request_of(width=5)) for _ in range(2)]
    good = scheduler.submit(request_of(3.0))
    with caplog.at_level(logging.ERROR, "server.recovery"):
        errors = [await failure(future) for future in bad]
        check(await answer(good), 3.0)
    assert all(isinstance(error, InferenceFailed) for error in errors)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == "variant 'fp32' failed on cpu; the server's log has the details"
    assert [record.exc_info is not None for record in caplog.records] == [True] * 3, "once together, once each alone"
    check(await answer(scheduler.submit(request_of(4.0))), 4.0)


@pytest.mark.parametrize("ms", [None, 0.05], ids=["thread", "loop"])
@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), asyncio.CancelledError()], ids=repr)
async def test_whatever_a_runner_raises_the_lane_goes_on(opened, error, ms):
    scheduler = opened(lane(Failing(error), ms=ms))
    for _ in range(2):
        assert isinstance(await failure(scheduler.submit(request_of())), InferenceFailed)


@pytest.mark.parametrize("outputs", [{"y": np.zeros((3, 1))}, {"y": np.zeros(())}, None])
async def test_outputs_that_cannot_be_split_fail_the_batch(opened, outputs):
    class Wrong:
        def run(self, inputs):
            return outputs

    scheduler = opened(lane(Wrong()))
    futures = [scheduler.submit(request_of()) for _ in range(2)]
    for future in futures:
        assert isinstance(await failure(future), InferenceFailed)


# Drain and close.


async def test_drain_finishes_what_was_admitted_and_refuses_the_rest(gate, opened):
    scheduler = opened(lane(gate), max_queue_delay_s=1000.0)
    futures = [scheduler.submit(request_of(float(i))) for i in range(9)]
    drain = asyncio.create_task(scheduler.drain(PATIENCE_S))
    await gate.arrival()
    with pytest.raises(Draining):
        scheduler.submit(request_of())
    assert not drain.done()
    gate.open()
    assert await drain
    for i, future in enumerate(futures):
        assert future.done()
        check(future.result(), float(i))


async def test_drain_ends_the_delay_of_a_waiting_batch(session, opened):
    scheduler = opened(lane(session), max_queue_delay_s=1000.0)
    future = scheduler.submit(request_of(1.0))
    await asyncio.sleep(0)
    assert await scheduler.drain(PATIENCE_S)
    check(future.result(), 1.0)


async def test_drain_of_an_idle_scheduler_returns_at_once(session, opened):
    assert await opened(lane(session)).drain(0.0)


async def test_drain_that_times_out_fails_what_is_left(gate, opened):
    scheduler = opened(lane(gate))
    running = scheduler.submit(request_of())
    await gate.arrival()
    waiting = scheduler.submit(request_of())
    assert not await scheduler.drain(0.01)
    for future in (running, waiting):
        assert isinstance(await failure(future), Draining)
    gate.open()
    assert await scheduler.drain(PATIENCE_S), "the lane itself is done later"
    assert gate.batches == [1]


async def test_close_answers_what_runs_fails_what_waits_and_ends_the_threads(gate, opened):
    scheduler = opened(lane(gate))
    running = scheduler.submit(request_of(1.0))
    await gate.arrival()
    waiting = scheduler.submit(request_of(timeout_s=60.0))
    gate.open()
    scheduler.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
    check(await answer(running), 1.0)
    assert isinstance(await failure(waiting), Draining)
    with pytest.raises(Draining):
        scheduler.submit(request_of())
    scheduler.close()


# Load.


async def test_every_client_gets_its_own_rows_under_load(session, opened):
    scheduler = opened(lane(session), lane(session), lane(session, "int8"), max_queue_rows=10_000)
    batches = []

    async def client(number: int) -> None:
        for i in range(10):
            value, rows = float(number * 10 + i), 1 + (number + i) % 3
            completion = await answer(scheduler.submit(request_of(value, rows, variant=("", "int8")[i % 2])))
            check(completion, value, rows)
            batches.append(completion.batch_rows)

    await asyncio.gather(*(client(number) for number in range(40)))
    assert max(batches) > 3, "batches grow under load"


_CLIENTS = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.sampled_from(["", "int8", "fp32"]),
        st.sampled_from([None, 0.0005, 60.0]),
        st.sampled_from(["wait", "cancel now", "cancel later", "yield"]),
        st.sampled_from([4, 4, 4, 5]),
    ),
    max_size=25,
)


def check_settled(future: asyncio.Future[Completion], number: int, rows: int, width: int) -> None:
    assert future.done()
    if future.cancelled():
        return
    error = future.exception()
    if error is None:
        assert width == 4
        check(future.result(), float(number), rows)
    else:
        assert isinstance(error, DeadlineExpired) or (isinstance(error, InferenceFailed) and width == 5)


@settings(max_examples=60, deadline=None)
@given(_CLIENTS, st.booleans(), st.sampled_from([0.0, 0.001]), st.sampled_from([None, 0.05, 1.0]))
def test_every_request_is_settled_exactly_once_whatever_happens(clients, batchable, delay_s, ms):
    async def scenario() -> None:
        lanes = [lane(FakeSession(), "int8", ms=ms), lane(FakeSession(), "fp32", ms=ms)]
        limits = limits_of(batchable=batchable, max_queue_delay_s=delay_s, max_queue_rows=40)
        scheduler = Scheduler(lanes, limits, ModelMetrics(Metrics(), "m", "1"), Cores(1))
        waiting: list[tuple[asyncio.Future[Completion], int, int, int]] = []
        for number, (rows, pin, timeout_s, action, width) in enumerate(clients):
            try:
                future = scheduler.submit(request_of(float(number), rows, width, variant=pin, timeout_s=timeout_s))
            except (QueueFull, DeadlineUnmeetable):
                continue
            waiting.append((future, number, rows, width))
            if action == "cancel now":
                future.cancel()
            elif action == "cancel later":
                asyncio.get_running_loop().call_soon(future.cancel)
            elif action == "yield":
                await asyncio.sleep(0)
        assert await scheduler.drain(PATIENCE_S)
        await asyncio.sleep(0)  # the parts of a large request settle it one turn of the loop later
        for settled in waiting:
            check_settled(*settled)
        scheduler.close()

    logging.getLogger("server.recovery").setLevel(logging.CRITICAL)
    try:
        asyncio.run(scenario())
    finally:
        logging.getLogger("server.recovery").setLevel(logging.NOTSET)


# Large requests, priorities, clients, several models, brown-outs.


async def test_the_parts_of_a_large_request_run_on_all_lanes(session, opened):
    gates = [Gate(session), Gate(session)]
    scheduler = opened(*map(lane, gates))
    future = scheduler.submit(request_of(2.0, rows=16))
    assert [await gate.arrival() for gate in gates] == [8, 8]
    for gate in gates:
        gate.open()
    check(await answer(future), 2.0, 16)


async def test_a_large_request_that_is_cancelled_leaves_the_queue(gate, opened):
    scheduler = opened(lane(gate))
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    large = scheduler.submit(request_of(rows=24))
    large.cancel()
    await asyncio.sleep(0)
    gate.open()
    await answer(blocker)
    check(await answer(scheduler.submit(request_of(3.0))), 3.0)
    assert gate.batches == [1, 1]


async def test_a_large_request_fails_as_a_whole(gate, opened):
    scheduler = opened(lane(gate))
    gate.open()
    assert isinstance(await failure(scheduler.submit(request_of(rows=24, width=5))), InferenceFailed)


async def test_the_higher_priority_goes_first(gate, opened):
    scheduler = opened(lane(gate), max_rows=1)
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    order, futures = [], [blocker]
    for name, priority in (("last", 9), ("default", 0), ("first", 1)):
        futures.append(scheduler.submit(request_of(priority=priority)))
        futures[-1].add_done_callback(lambda _, name=name: order.append(name))
    gate.open()
    await asyncio.gather(*map(answer, futures))
    assert order == ["first", "default", "last"]


async def test_a_client_that_floods_does_not_delay_another(gate, opened):
    scheduler = opened(lane(gate, ms=10.0), max_rows=1)
    blocker = scheduler.submit(request_of())
    await gate.arrival()
    order, futures = [], [blocker]
    for client in ("greedy",) * 10 + ("modest",):
        futures.append(scheduler.submit(request_of(client=client)))
        futures[-1].add_done_callback(lambda _, client=client: order.append(client))
    gate.open()
    await asyncio.gather(*map(answer, futures))
    assert order.index("modest") <= 1


async def test_two_models_share_the_cores(session):
    cores, gates = Cores(1), [Gate(session), Gate(session)]
    schedulers = [
        Scheduler([lane(gate)], limits_of(), ModelMetrics(Metrics(), name, "1"), cores)
        for name, gate in zip("ab", gates, strict=True)
    ]
    first, second = (scheduler.submit(request_of(float(i))) for i, scheduler in enumerate(schedulers))
    await gates[0].arrival()
    await asyncio.sleep(0.01)
    assert gates[1].batches == [], "one core, one batch"
    gates[0].open()
    assert await gates[1].arrival() == 1
    gates[1].open()
    check(await answer(first), 0.0)
    check(await answer(second), 1.0)
    for scheduler in schedulers:
        scheduler.close()


async def test_the_queue_is_bounded_by_predicted_work(gate, opened):
    scheduler = opened(lane(gate, ms=100.0), max_queue_s=1.0, max_queue_rows=10_000)
    futures = [scheduler.submit(request_of())]
    await gate.arrival()
    futures += [scheduler.submit(request_of(rows=8)) for _ in range(10)]  # one second, in batches of 100 ms
    with pytest.raises(QueueFull, match=r"80 rows wait .* the queue holds 80") as caught:
        scheduler.submit(request_of())
    gate.open()
    await asyncio.gather(*map(answer, futures))
    assert caught.value.retry_after_s == pytest.approx(1.1, abs=0.2)


async def test_overload_is_served_by_the_fastest_variant_where_that_is_allowed(session, opened, caplog):
    clock = Clock()
    fast, exact = Gate(session), Gate(session)
    metrics = Metrics()
    specs = [
        msgspec.structs.replace(lane(fast, "int8", ms=5.0), agreement=0.99),
        msgspec.structs.replace(lane(exact, "fp32", ms=10.0), agreement=1.0),
    ]
    scheduler = opened(
        *specs, cores=1, clock=clock, brownout=True, max_queue_rows=8, metrics=ModelMetrics(metrics, "m", "1")
    )
    futures = [scheduler.submit(request_of())]
    assert await exact.arrival() == 1, "normally the most faithful one serves"
    futures += [scheduler.submit(request_of(rows=4)) for _ in range(2)]
    assert metrics.registry.get_sample_value("slipstream_brownout", {"model": "m", "version": "1"}) == 0
    with pytest.raises(QueueFull):
        scheduler.submit(request_of())
    assert metrics.registry.get_sample_value("slipstream_brownout", {"model": "m", "version": "1"}) == 1
    exact.open()
    assert await fast.arrival() == 8
    fast.open()
    for future in futures:
        await answer(future)
    clock.now += 10.0
    await answer(scheduler.submit(request_of()))
    assert (await answer(scheduler.submit(request_of()))).variant == "fp32"
    assert metrics.registry.get_sample_value("slipstream_brownout", {"model": "m", "version": "1"}) == 0
