"""Opening version folders in the background, so that the requests in service do not notice."""

import asyncio
import logging
import re
from pathlib import Path

from server.artifact import Artifact, read_artifact
from server.background import Background
from server.building import Building
from server.cores import usable_cores
from server.errors import Draining, StartupError
from server.gpus import GpuCollector
from server.metrics import Metrics
from server.model import Model
from server.native import obstacle_of
from server.providers import CPU, Device, Devices, find_devices
from server.scheduler import Cores
from server.settings import Settings
from server.split import Splits

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]+")


class Opener:
    """Opens one version after the other.

    Args:
        settings: How to serve.
        metrics: The process's metrics.

    Attributes:
        devices: What there is to run on, once it was looked for.
        background: Where it works; comparisons of new versions take turns with it.
        is_stopping: Set it when nothing more may be opened.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.devices = Devices(())
        self.background = Background()
        self._building = Building(settings, metrics, self.background)
        self._cores = Cores(usable_cores())
        # A device is busy for the first time when the first request is served, and stays in ``busy`` from then on.
        self._splits = Splits(lambda: not self._cores.busy)
        self.is_stopping = False

    async def find_devices(self) -> None:
        """Find out which devices really work; before the first ``open``.

        Raises:
            ProviderUnavailable: If a GPU is required and none works.
        """
        settings = self._settings
        self.devices = found = await asyncio.to_thread(_find_devices, settings)
        gpus = sorted({device.index for device in found.usable if device.kind != CPU.kind})
        if gpus:
            self._metrics.registry.register(GpuCollector(gpus))
        elif settings.gpu == "prefer":
            for obstacle in found.unused.values():
                self._metrics.gpu_fallback.labels(obstacle.code).set(1)

    async def open(self, folder: Path) -> Model:
        """Read, verify, open and warm up a version; it is not started.

        Raises:
            StartupError: If it cannot be served.
            OSError: If a file cannot be read.
            Draining: If the server is stopping.
        """
        self._require_not_stopping()
        artifact = await self.background.run(_read, folder)
        self._require_not_stopping()
        low_priority = self._has_no_threads(artifact)
        model = await self.background.run(
            _load, artifact, self._devices_at_once, self._settings, self._metrics, self._splits, low=low_priority
        )
        if self.is_stopping:
            model.close()
        self._require_not_stopping()
        return model

    def start(self, model: Model) -> None:
        """Start an opened model, and begin to build the engines that it could use."""
        model.start(self._cores)
        self._building.begin(model, self.devices.usable)

    async def stop(self) -> None:
        """Open nothing more, and end the build of engines."""
        self.is_stopping = True
        await self._building.stop()

    def _require_not_stopping(self) -> None:
        if self.is_stopping:
            raise Draining("the server is stopping; ask another replica")

    @property
    def _devices_at_once(self) -> tuple[Device, ...]:
        """The devices on which a model can serve as soon as it is opened; engines take their time."""
        builds = self._settings.engines == "build"
        return tuple(device for device in self.devices.usable if not (builds and device.kind == "tensorrt"))

    def _has_no_threads(self, artifact: Artifact) -> bool:
        # Threads of a session's pool, and those of a GPU driver, inherit the priority of the thread that opens it.
        may_split = not self._settings.cpu_instances and self._splits.may_start_threads(artifact.name)
        has_one_each = all(variant.options.intra_op_threads == 1 for variant in artifact.variants)
        return self.devices.usable == (CPU,) and has_one_each and not may_split


def _find_devices(settings: Settings) -> Devices:
    """Find the devices, TensorRT's also where it is not onnxruntime that runs it."""
    cache = str(settings.engine_cache.absolute())
    found = find_devices(settings.gpu, settings.gpu_memory_bytes, cache)
    there, unused = set(found.usable), dict(found.unused)
    added = []
    for gpu in (device for device in found.usable if device.kind == "cuda"):
        device = Device("tensorrt", gpu.index, gpu.memory_bytes, gpu.cache)
        if device in there:
            continue
        if (obstacle := obstacle_of(device)) is None:
            unused.pop(device.name, None)
            added.append(device)
        else:
            unused[device.name] = obstacle
            logger.info("not used: %s: %s", device.name, obstacle.text)
    return Devices((*added, *found.usable), unused)


def _read(folder: Path) -> Artifact:
    if not _NAME.fullmatch(folder.parent.name):
        raise StartupError(f"the name {folder.parent.name!r} has characters other than letters, digits, '.', '_', '-'")
    return read_artifact(folder)


def _load(
    artifact: Artifact, devices: tuple[Device, ...], settings: Settings, metrics: Metrics, splits: Splits
) -> Model:
    return Model.load(artifact, devices, settings, metrics, splits)
