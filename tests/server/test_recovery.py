"""Lanes that fail: whose fault it is, where the work goes, and how a lane comes back."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from server.batching import BatchLimits
from server.errors import InferenceFailed, LaneDown
from server.metrics import Metrics, ModelMetrics
from server.scheduler import Cores, LaneSpec, Scheduler
from server.tensors import Array, Tensors
from tests.server.test_scheduler import FakeSession, answer, check, failure, lane, request_of

PROBE = dict(request_of().inputs)


class Switch:
    """A runner that can be broken, and counts its runs."""

    def __init__(self) -> None:
        self.broken, self.runs = False, 0
        self._session = FakeSession()

    def run(self, inputs: Tensors) -> dict[str, Array]:
        self.runs += 1
        if self.broken:
            raise RuntimeError("CUDA error 700: an illegal memory access was encountered")
        if np.isnan(inputs["a"]).any():
            raise ValueError("the input is bad")
        return self._session.run(inputs)


def spec_of(runner: Switch, variant: str, device: str = "cpu", probe: Tensors | None = PROBE) -> LaneSpec:
    return LaneSpec(variant, device, runner, lane(runner, ms=1.0).latency, 1, probe=probe)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., tuple[Scheduler, Metrics]]]:
    made: list[Scheduler] = []

    def opener(*specs: LaneSpec) -> tuple[Scheduler, Metrics]:
        metrics = Metrics()
        limits = BatchLimits(True, 8, 64, 0.0, 0.0)
        made.append(Scheduler(specs, limits, ModelMetrics(metrics, "m", "1"), Cores(2)))
        return made[-1], metrics

    yield opener
    for scheduler in made:
        scheduler.close()


def is_up(metrics: Metrics, variant: str, device: str) -> float | None:
    labels = {"model": "m", "version": "1", "variant": variant, "device": device}
    return metrics.registry.get_sample_value("slipstream_lane_up", labels)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  (metrics and states have no event)
            await asyncio.sleep(0.01)


async def test_work_of_a_lane_that_fails_moves_to_another_and_back(opened):
    gpu, cpu = Switch(), Switch()
    scheduler, metrics = opened(spec_of(gpu, "fp16", "cuda:0"), spec_of(cpu, "int8"))
    assert (await answer(scheduler.submit(request_of(1.0)))).device == "cuda:0"
    gpu.broken = True
    futures = [scheduler.submit(request_of(float(i))) for i in range(20)]
    for i, future in enumerate(futures):
        done = await answer(future)
        check(done, float(i))
        assert done.device == "cpu"
    assert scheduler.serves
    assert scheduler.lanes_down == ("fp16 on cuda:0",)
    assert is_up(metrics, "fp16", "cuda:0") == 0
    gpu.broken = False
    await until(lambda: not scheduler.lanes_down)
    assert is_up(metrics, "fp16", "cuda:0") == 1
    assert (await answer(scheduler.submit(request_of(1.0)))).device == "cuda:0"
    assert metrics.registry.get_sample_value("slipstream_retries_total", {"model": "m", "version": "1"}) > 0


async def test_a_bad_input_fails_alone_and_takes_no_lane_down(opened):
    runner = Switch()
    scheduler, _ = opened(spec_of(runner, "fp32"))
    values = [1.0, float("nan"), 3.0]
    good, bad, other = [scheduler.submit(request_of(value)) for value in values]
    check(await answer(good), 1.0)
    check(await answer(other), 3.0)
    assert isinstance(await failure(bad), InferenceFailed)
    for _ in range(20):
        assert isinstance(await failure(scheduler.submit(request_of(float("nan")))), InferenceFailed)
    assert scheduler.lanes_down == ()


async def test_with_every_lane_down_requests_are_refused_at_once_until_one_is_back(opened):
    runner = Switch()
    scheduler, _ = opened(spec_of(runner, "fp32"))
    runner.broken = True
    assert isinstance(await failure(scheduler.submit(request_of())), InferenceFailed)
    assert not scheduler.serves
    with pytest.raises(LaneDown, match="all fail: fp32 on cpu") as caught:
        scheduler.submit(request_of())
    assert 0 <= caught.value.retry_after_s <= 0.1
    runner.broken = False
    await until(lambda: scheduler.serves)
    check(await answer(scheduler.submit(request_of(2.0))), 2.0)


async def test_a_variant_whose_lanes_are_down_is_refused_and_the_others_serve(opened):
    broken, well = Switch(), Switch()
    scheduler, _ = opened(spec_of(broken, "int8"), spec_of(well, "fp32"))
    broken.broken = True
    check(await answer(scheduler.submit(request_of(5.0))), 5.0)
    with pytest.raises(LaneDown):
        scheduler.submit(request_of(variant="int8"))
    check(await answer(scheduler.submit(request_of(6.0, variant="fp32"))), 6.0)


async def test_the_first_row_that_worked_is_the_probe_where_none_is_given(opened):
    runner = Switch()
    scheduler, _ = opened(spec_of(runner, "fp32", probe=None))
    await answer(scheduler.submit(request_of(rows=4)))
    runner.broken = True
    await failure(scheduler.submit(request_of()))
    assert not scheduler.serves, "one failed probe is enough"
    runner.broken = False
    await until(lambda: scheduler.serves)


async def test_a_lane_that_never_worked_is_tried_again_with_real_work(opened):
    runner = Switch()
    runner.broken = True
    scheduler, _ = opened(spec_of(runner, "fp32", probe=None))
    for _ in range(8):
        await failure(scheduler.submit(request_of()))
    assert not scheduler.serves
    runner.broken = False
    await until(lambda: scheduler.serves)
    check(await answer(scheduler.submit(request_of(2.0))), 2.0)


async def test_a_scheduler_closes_while_a_lane_is_down(opened):
    runner = Switch()
    scheduler, _ = opened(spec_of(runner, "fp32"))
    runner.broken = True
    await failure(scheduler.submit(request_of()))
    scheduler.close()
    runs = runner.runs
    await asyncio.sleep(0.15)
    assert runner.runs == runs, "nobody probes a closed lane"


async def test_pinned_requests_of_a_failed_batch_are_not_run_by_another_variant(opened):
    broken, well = Switch(), Switch()
    scheduler, _ = opened(spec_of(broken, "int8"), spec_of(well, "fp32"))
    broken.broken = True
    assert isinstance(await failure(scheduler.submit(request_of(variant="int8"))), InferenceFailed)
    assert well.runs == 0


async def test_lanes_that_share_a_session_go_down_together(opened):
    gpu, cpu = Switch(), Switch()
    scheduler, metrics = opened(spec_of(gpu, "fp16", "cuda:0"), spec_of(gpu, "fp16", "cuda:0"), spec_of(cpu, "fp32"))
    gpu.broken = True
    completion = await answer(scheduler.submit(request_of(3.0)))
    check(completion, 3.0)
    assert completion.device == "cpu", "the one retry did not go to the other lane of the same session"
    assert scheduler.lanes_down == ("fp16 on cuda:0", "fp16 on cuda:0")
    gpu.broken = False
    await until(lambda: not scheduler.lanes_down)
    assert is_up(metrics, "fp16", "cuda:0") == 1.0
