"""Devices that run out of memory or die, several of them, and overflow: real sessions on the CPU stand for devices."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from server.artifact import LatencyTable, SessionOptions
from server.batching import BatchLimits
from server.errors import InferenceFailed, SlipstreamError
from server.faults import fault_of
from server.metrics import Metrics, ModelMetrics
from server.outcome import Completion
from server.providers import CPU
from server.scheduler import Cores, LaneSpec, Scheduler
from server.session import Session
from server.tensors import Array, InferRequest, Tensors
from tests import models
from tests.server.test_recovery import until

NO_MEMORY = "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"
LOST = "CUDA failure 719: unspecified launch failure ; GPU=0 ; expr=cudaStreamSynchronize(stream);"
MOST_ROWS = 16


class Device:
    """Stands for a device: real sessions, of which it runs batches up to ``memory_rows`` while it is not ``lost``."""

    def __init__(self, model: Path, name: str, pause_s: float = 0.0) -> None:
        self._session = Session(model, CPU, SessionOptions())
        self.name, self.pause_s = name, pause_s
        self.memory_rows, self.lost = 1_000, False
        self.batches: list[int] = []
        self._lock = threading.Lock()

    def run(self, inputs: Tensors) -> dict[str, Array]:
        rows = len(inputs["x"])
        with self._lock:
            self.batches.append(rows)
        if self.lost or rows > self.memory_rows:
            text = LOST if self.lost else NO_MEMORY
            raise fault_of(RuntimeError(text))(text)
        time.sleep(self.pause_s)
        return self._session.run(inputs)

    def lane(self, variant: str = "fp32", runner: object = None) -> LaneSpec:
        ms = max(self.pause_s * 1e3, 0.5)
        rows = (1, MOST_ROWS)
        times = (ms, ms + 0.5)
        probe = {"x": np.zeros((1, 64), np.float32)}
        return LaneSpec(
            variant, self.name, runner or self, LatencyTable(rows, times, times, times, times), 1, probe=probe
        )


class Other:
    """Another session on the same device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, inputs: Tensors) -> dict[str, Array]:
        return self._device.run(inputs)


Opened = Callable[..., tuple[Scheduler, Metrics]]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    made: list[Scheduler] = []

    def opener(*lanes: LaneSpec) -> tuple[Scheduler, Metrics]:
        metrics = Metrics()
        limits = BatchLimits(True, MOST_ROWS, 4096, 0.0, 0.0)
        made.append(Scheduler(lanes, limits, ModelMetrics(metrics, "m", "1"), Cores(4)))
        return made[-1], metrics

    yield opener
    for scheduler in made:
        scheduler.close()


@pytest.fixture
def gpu(mlp: Path) -> Device:
    return Device(mlp, "cuda:0")


@pytest.fixture
def cpu(mlp: Path) -> Device:
    return Device(mlp, "cpu")


X = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


async def ask(scheduler: Scheduler, row: int = 0, rows: int = 1) -> Completion:
    async with asyncio.timeout(20):
        return await scheduler.submit(InferRequest({"x": X[row : row + rows]}))


def right(completion: Completion, mlp: Path, row: int = 0, rows: int = 1) -> bool:
    expected = Session(mlp, CPU, SessionOptions()).run({"x": X[row : row + rows]})["y"]
    return np.allclose(completion.outputs["y"], expected, rtol=1e-4, atol=1e-5)


def count(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model": "m", "version": "1", **labels})


# Out of memory.


async def test_batch_without_memory_is_halved_until_it_fits(opened, gpu, mlp, caplog):
    gpu.memory_rows = 3
    scheduler, metrics = opened(gpu.lane())
    answers = await asyncio.gather(*(ask(scheduler, row) for row in range(MOST_ROWS)))
    assert all(right(answer, mlp, row) for row, answer in enumerate(answers))
    assert gpu.batches[:3] == [16, 8, 4], "each time half, and no probe in between"
    assert max(gpu.batches[3:]) == 2
    assert count(metrics, "slipstream_out_of_memory_total", variant="fp32", device="cuda:0") == 3
    assert count(metrics, "slipstream_retries_total") == 0, "it does not use up the one retry"
    assert scheduler.lanes_down == ()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(" and ")[0] for text in warned] == [
        f"lane fp32 on cuda:0 has no memory for a batch of {rows} rows: it takes {rows // 2} from now on,"
        for rows in (16, 8, 4)
    ]


async def test_request_larger_than_what_fits_is_parted(opened, gpu, mlp):
    gpu.memory_rows = 5
    scheduler, _ = opened(gpu.lane())
    answer = await ask(scheduler, rows=MOST_ROWS)
    assert right(answer, mlp, rows=MOST_ROWS)
    assert max(gpu.batches[-4:]) == 4
    assert right(await ask(scheduler, rows=MOST_ROWS), mlp, rows=MOST_ROWS)
    assert gpu.batches.count(16) == 1, "the next large one is parted at once"


async def test_lanes_of_one_session_shrink_together(opened, gpu):
    gpu.memory_rows = 4
    scheduler, _ = opened(gpu.lane(), gpu.lane())
    await asyncio.gather(*(ask(scheduler, row) for row in range(48)))
    assert {worker.state.limit_rows for worker in scheduler._workers} == {4}


async def test_cap_rises_again_and_the_next_time_later(opened, gpu):
    gpu.memory_rows = 8
    scheduler, metrics = opened(gpu.lane())
    await ask(scheduler, rows=MOST_ROWS)
    (worker,) = scheduler._workers
    assert worker.state.limit_rows == 8
    for _ in range(260):
        await ask(scheduler)
    assert worker.state.limit_rows == MOST_ROWS
    await ask(scheduler, rows=MOST_ROWS)
    assert worker.state.limit_rows == 8
    for _ in range(260):
        await ask(scheduler)
    assert worker.state.limit_rows == 8, "its gap is twice the last one"
    assert count(metrics, "slipstream_out_of_memory_total", variant="fp32", device="cuda:0") == 2


async def test_one_row_without_memory_takes_the_lane_down_and_runs_elsewhere(opened, gpu, cpu, mlp):
    gpu.memory_rows = 0
    scheduler, _ = opened(gpu.lane(), cpu.lane("safe"))
    answer = await ask(scheduler)
    assert (answer.device, right(answer, mlp)) == ("cpu", True)
    assert scheduler.lanes_down == ("fp32 on cuda:0",)
    gpu.memory_rows = 1
    await until(lambda: not scheduler.lanes_down)


async def test_model_without_batches_has_nothing_to_halve(opened, gpu):
    gpu.memory_rows = 0
    metrics = Metrics()
    limits = BatchLimits(False, MOST_ROWS, 4096, 0.0, 0.0)
    scheduler = Scheduler([gpu.lane()], limits, ModelMetrics(metrics, "m", "1"), Cores(2))
    with pytest.raises(SlipstreamError):
        await ask(scheduler, rows=4)
    assert count(metrics, "slipstream_out_of_memory_total", variant="fp32", device="cuda:0") is None
    scheduler.close()


# Lost devices.


async def test_lost_device_takes_all_its_lanes_down_at_once(opened, gpu, cpu, mlp):
    scheduler, metrics = opened(gpu.lane("fp16"), gpu.lane("fp32", Other(gpu)), cpu.lane("safe"))
    gpu.lost = True
    answer = await ask(scheduler)
    assert (answer.device, right(answer, mlp)) == ("cpu", True)
    assert set(scheduler.lanes_down) == {"fp16 on cuda:0", "fp32 on cuda:0"}
    assert len(gpu.batches) == 2, "the batch and its probe: the other lane was not tried"
    for variant in ("fp16", "fp32"):
        assert count(metrics, "slipstream_lane_up", variant=variant, device="cuda:0") == 0
    gpu.lost = False
    await until(lambda: not scheduler.lanes_down)
    assert (await ask(scheduler)).device == "cuda:0"


async def test_batch_that_still_works_does_not_bring_a_lost_device_up(opened, gpu, cpu):
    gpu.pause_s = 0.05  # less than the pause before a lane is tried again
    scheduler, _ = opened(gpu.lane(), gpu.lane(), cpu.lane("safe"))
    first = asyncio.create_task(ask(scheduler))
    await until(lambda: len(gpu.batches) == 1)
    gpu.lost = True
    assert (await ask(scheduler)).device == "cpu"
    assert (await first).device == "cuda:0", "it ran before the device was lost"
    assert len(scheduler.lanes_down) == 2
    gpu.lost = False
    await until(lambda: not scheduler.lanes_down)


async def test_device_lost_under_load_loses_no_request(opened, mlp, gpu, cpu):
    gpu.pause_s, cpu.pause_s = 0.002, 0.01
    scheduler, metrics = opened(gpu.lane(), gpu.lane(), cpu.lane("safe"))
    stop, failed, devices = asyncio.Event(), [], Counter()

    async def client(row: int) -> None:
        while not stop.is_set():
            try:
                answer = await ask(scheduler, row)
            except SlipstreamError as exc:
                failed.append(exc)
            else:
                devices[answer.device] += 1
                assert answer.outputs["y"].shape == (1, 10)

    clients = [asyncio.create_task(client(row)) for row in range(24)]
    await until(lambda: devices["cuda:0"] > 100)
    gpu.lost = True
    lost_s = asyncio.get_running_loop().time()
    await until(lambda: bool(scheduler.lanes_down))
    assert asyncio.get_running_loop().time() - lost_s < 1
    before = devices["cpu"]
    await until(lambda: devices["cpu"] > before + 50)
    gpu.lost = False
    await until(lambda: not scheduler.lanes_down)
    before = devices["cuda:0"]
    await until(lambda: devices["cuda:0"] > before + 100)
    stop.set()
    await asyncio.gather(*clients)
    assert failed == []
    assert (count(metrics, "slipstream_retries_total") or 0) > 0


async def test_without_another_device_the_request_fails_with_the_lane(opened, gpu):
    scheduler, _ = opened(gpu.lane())
    gpu.lost = True
    with pytest.raises(SlipstreamError) as caught:
        await ask(scheduler)
    assert isinstance(caught.value, InferenceFailed) or caught.value.code == "lane_down"
    assert not scheduler.serves


# Several devices.


async def test_equal_devices_share_the_work_and_one_goes_on_alone(opened, mlp):
    first, second = Device(mlp, "cuda:0", 0.002), Device(mlp, "cuda:1", 0.002)
    scheduler, _ = opened(first.lane(), second.lane())
    devices: Counter[str] = Counter()

    async def burst(count: int) -> None:
        for answer in await asyncio.gather(*(ask(scheduler, row % 64) for row in range(count))):
            devices[answer.device] += 1

    for _ in range(10):
        await burst(64)
    assert 0.3 < devices["cuda:0"] / devices.total() < 0.7
    second.lost = True
    devices.clear()
    await burst(64)
    await burst(64)
    assert devices == {"cuda:0": 128}


async def test_fast_device_takes_the_bulk_and_the_slow_one_what_it_finishes_sooner(opened, gpu, cpu):
    gpu.pause_s, cpu.pause_s = 0.005, 0.025
    scheduler, _ = opened(gpu.lane("fp16"), cpu.lane("fp32"))
    alone = [(await ask(scheduler)).device for _ in range(10)]
    assert set(alone) == {"cuda:0"}, "an idle fast device takes everything"
    devices = Counter(
        answer.device for answer in await asyncio.gather(*(ask(scheduler, row % 64) for row in range(600)))
    )
    assert devices["cpu"] > 0
    assert devices["cuda:0"] > 2.5 * devices["cpu"]
    assert (await scheduler.submit(InferRequest({"x": X[:1]}, variant="fp32"))).device == "cpu", "a pin stays"


async def test_models_of_unequal_devices_keep_their_answers_apart(opened, tmp_path: Path):
    """Each device has a model of its own, so an answer tells where it was computed."""
    files = [models.save_mlp(tmp_path / f"{seed}.onnx", seed=seed) for seed in (1, 2)]
    first, second = Device(files[0], "cuda:0", 0.002), Device(files[1], "cuda:1", 0.002)
    scheduler, _ = opened(first.lane(), second.lane())
    answers = await asyncio.gather(*(ask(scheduler, row) for row in range(64)))
    for row, answer in enumerate(answers):
        assert right(answer, files[("cuda:0", "cuda:1").index(answer.device)], row)
