import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.core import GaugeMetricFamily

from server import opening
from server.artifact import LatencyTable
from server.libraries import Obstacle
from server.metrics import Metrics
from server.model import Model
from server.opening import Opener
from server.providers import CPU, Device, Devices
from server.settings import Settings
from server.split import Finding, Split, Trial
from server.tensors import InferRequest
from tests import models
from tests.artifacts import write_plain

TABLE = LatencyTable((1,), (1.0,), (1.0,), (1.0,), (1.0,))


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every comparison of splits find two threads best; returns the cores of each that was made."""
    made: list[int] = []

    def compare(bench: object, cores: int) -> Finding:
        made.append(cores)
        return Finding((Trial(Split(1, 2), TABLE, 1.0),))

    monkeypatch.setattr("server.lanes.compare", compare)
    monkeypatch.setattr("server.lanes.usable_cores", lambda: 2)
    monkeypatch.setattr("server.lanes.INLINE_LANE_S", 0.0)
    return made


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch):
    """Make an opener; it and the models that it opened are closed after the test."""
    made: list[Opener] = []
    loaded: list[Model] = []
    load = Model.load

    def recorded(*args: object) -> Model:
        loaded.append(load(*args))
        return loaded[-1]

    monkeypatch.setattr(Model, "load", recorded)

    async def opener(**settings: object) -> Opener:
        made.append(Opener(Settings(gpu="off", **settings), Metrics()))
        await made[-1].find_devices()
        return made[-1]

    yield opener
    for model in loaded:
        model.close()
    for each in made:
        each.background.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def add(folder: Path, version: str) -> Path:
    return write_plain(folder, "cnn", version, models.save_cnn(folder.parent / f"{version}.onnx"))


def lanes(model: Model) -> list[tuple[int, int]]:
    return [(group["instances"], group["threads"]) for group in model.metadata()["lanes"]]


async def ask(model: Model) -> None:
    response = await model.infer(InferRequest({"image": np.zeros((1, 3, 16, 16), np.float32)}))
    assert response.outputs["logits"].shape == (1, 10)


async def open_and_start(opener: Opener, folder: Path) -> Model:
    model = await opener.open(folder)
    opener.start(model)
    return model


def threads_of_the_process() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}


async def test_split_is_measured_until_a_request_is_served(folder: Path, make, comparisons: list[int]):
    opener = await make()
    first = await open_and_start(opener, add(folder, "1"))
    assert (lanes(first), comparisons) == ([(1, 2)], [2])
    await open_and_start(opener, add(folder, "2"))
    assert comparisons == [2, 2]
    await ask(first)
    third = await opener.open(add(folder, "3"))
    assert (lanes(third), comparisons) == ([(1, 2)], [2, 2])
    other = await opener.open(write_plain(folder, "other", "1", models.save_cnn(folder.parent / "other.onnx")))
    assert (lanes(other), comparisons) == ([(2, 1)], [2, 2])


async def test_number_of_instances_that_was_set_is_opened_unmeasured(
    folder: Path, make, comparisons: list[int], monkeypatch: pytest.MonkeyPatch
):
    names = []
    load = opening._load
    monkeypatch.setattr(opening, "_load", lambda *args: (names.append(threading.current_thread().name), load(*args))[1])
    opener = await make(cpu_instances=3)
    model = await opener.open(add(folder, "1"))
    assert (lanes(model), comparisons) == ([(3, 1)], [])
    assert names == ["background_0"]  # the one of low priority: no session gets threads of its own


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
@pytest.mark.parametrize("version", ["1", "2"])
async def test_threads_of_a_measured_split_have_normal_priority(folder: Path, make, comparisons, version: str):
    opener = await make()
    for number in range(1, int(version) + 1):
        before = threads_of_the_process()
        model = await open_and_start(opener, add(folder, str(number)))
        new = threads_of_the_process() - before
        await ask(model)
    background = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("background_")}
    assert len(new - background) >= 2  # the lane's, and the session's own beside it
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in new - background} == {mine}


@pytest.mark.parametrize(("gpu", "told"), [("prefer", 1.0), ("off", None)])
async def test_metric_says_that_the_cpu_serves_though_a_gpu_is_preferred(monkeypatch: pytest.MonkeyPatch, gpu, told):
    absent = Devices((CPU,), {"gpu": Obstacle("no_driver", "no NVIDIA driver")})
    monkeypatch.setattr(opening, "find_devices", lambda gpu, *_: absent if gpu != "off" else Devices((CPU,)))
    metrics = Metrics()
    opener = Opener(Settings(gpu=gpu), metrics)
    await opener.find_devices()
    assert metrics.registry.get_sample_value("slipstream_gpu_fallback", {"reason": "no_driver"}) == told
    opener.background.close()


async def test_gpus_in_use_are_read_at_each_scrape(monkeypatch: pytest.MonkeyPatch):
    class Collector:
        def __init__(self, indices: list[int]) -> None:
            self._indices = indices

        def collect(self):
            yield GaugeMetricFamily("gpus", "", float(len(self._indices)))

    found = Devices((Device("tensorrt", 1), Device("cuda"), Device("cuda", 1), CPU))
    monkeypatch.setattr(opening, "find_devices", lambda *_: found)
    monkeypatch.setattr(opening, "GpuCollector", Collector)
    metrics = Metrics()
    opener = Opener(Settings(), metrics)
    await opener.find_devices()
    assert b"gpus 2.0" in metrics.render()[0]
    assert b"slipstream_gpu_fallback{" not in metrics.render()[0]
    opener.background.close()


def test_tensorrt_of_its_own_is_a_device_where_onnxruntime_has_none(monkeypatch: pytest.MonkeyPatch):
    missing, absent = Obstacle("missing_library", "TensorRT 10 is not installed"), Obstacle("failed", "no runtime")
    names = ("tensorrt:0", "tensorrt:1")
    found = Devices((Device("cuda"), Device("cuda", 1), CPU), dict.fromkeys(names, missing))
    monkeypatch.setattr(opening, "find_devices", lambda *_: found)
    monkeypatch.setattr(opening, "obstacle_of", lambda device: absent if device.index else None)
    seen = opening._find_devices(Settings())
    assert [device.name for device in seen.usable] == ["tensorrt:0", "cuda:0", "cuda:1", "cpu"]
    assert seen.unused == {"tensorrt:1": absent}
    monkeypatch.setattr(opening, "find_devices", lambda *_: Devices((Device("tensorrt"), Device("cuda"), CPU)))
    monkeypatch.setattr(opening, "obstacle_of", lambda _: pytest.fail("asked"))
    assert [device.name for device in opening._find_devices(Settings()).usable] == ["tensorrt:0", "cuda:0", "cpu"]
