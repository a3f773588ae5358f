"""Metrics of the GPUs, read from the driver's management library when they are asked for.

Nothing is read on the path of a request. The label ``device`` is that of the lanes on the CUDA provider, ``cuda:0``; a
lane ``tensorrt:0`` is on the same GPU.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.libraries import uuid_of

try:
    import pynvml
except ImportError:  # the gpu extra brings it; without it there are no such metrics
    pynvml = None

logger = logging.getLogger(__name__)

KINDS = {
    "slipstream_gpu_utilization_ratio": "Share of the last sampling period in which a kernel ran, 0 to 1.",
    "slipstream_gpu_memory_used_bytes": "Memory in use, of all processes.",
    "slipstream_gpu_memory_bytes": "Memory of the GPU.",
    "slipstream_gpu_power_watts": "Power draw.",
    "slipstream_gpu_temperature_celsius": "Temperature of the die.",
    "slipstream_gpu_throttled": "1 while the clocks are held back by power, heat or a brake of the hardware.",
}
"""Name -> help text of every gauge."""

# nvmlClocksEventReasons: idle clocks (0x1) and clocks that an operator set (0x2, 0x100) hold nothing back.
_HELD_BACK = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class GpuCollector(Collector):
    """Reads the GPUs of the lanes at each scrape; one that cannot be read drops out, with one line in the log.

    Args:
        indices: Numbers of the GPUs, as CUDA counts them: only those that this process may see.
    """

    def __init__(self, indices: Iterable[int]) -> None:
        self._handles: dict[str, Any] = {}
        self._silent: set[str] = set()
        if pynvml is None:
            logger.info("no metrics of the GPU: pip install nvidia-ml-py")
            return
        try:
            pynvml.nvmlInit()
            for index in indices:
                self._handles[f"cuda:{index}"] = pynvml.nvmlDeviceGetHandleByUUID(uuid_of(index))
        except (OSError, pynvml.NVMLError) as exc:
            logger.warning("no metrics of the GPU: %s", exc)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of every GPU that answers."""
        families = {name: GaugeMetricFamily(name, text, labels=["device"]) for name, text in KINDS.items()}
        for device, handle in self._handles.items():
            for name, read in _READERS.items():
                value = self._value(f"{name} of {device}", read, handle)
                if value is not None:
                    families[name].add_metric([device], value)
        yield from (family for family in families.values() if family.samples)

    def _value(self, what: str, read: Callable[[Any], float], handle: Any) -> float | None:
        try:
            return read(handle)
        except pynvml.NVMLError as exc:
            if what not in self._silent:
                self._silent.add(what)
                logger.warning("cannot read %s: %s", what, exc)
            return None


_READERS: dict[str, Callable[[Any], float]] = {
    "slipstream_gpu_utilization_ratio": lambda handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    "slipstream_gpu_memory_used_bytes": lambda handle: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
    "slipstream_gpu_memory_bytes": lambda handle: float(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    "slipstream_gpu_power_watts": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    "slipstream_gpu_temperature_celsius": lambda handle: float(pynvml.nvmlDeviceGetTemperature(handle, 0)),
    "slipstream_gpu_throttled": lambda handle: float(
        bool(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) & _HELD_BACK)
    ),
}
