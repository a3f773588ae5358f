"""Metrics of GPUs, read through a management library that stands for the driver's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server import gpus
from server.gpus import GpuCollector
from tests.server import stubs

ROOT = Path(__file__).parents[2]
SCRAPE = """
import json, logging, sys
from prometheus_client import CollectorRegistry, generate_latest
from server.gpus import GpuCollector
logging.basicConfig(stream=sys.stderr, format="%(message)s")
registry = CollectorRegistry()
registry.register(GpuCollector(json.loads(sys.argv[1])))
generate_latest(registry)
print(generate_latest(registry).decode())
"""


def scrape(folder: Path, *indices: int) -> tuple[list[str], list[str]]:
    """Return the samples of a second scrape, and the lines that were logged until then."""
    given = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), "STUB_COUNT": "4"}
    command = [sys.executable, "-c", SCRAPE, json.dumps(indices)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True, timeout=60)
    samples = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    return samples, done.stderr.splitlines()


def test_gpu_is_read_and_what_it_cannot_tell_is_left_out(tmp_path: Path):
    stubs.build(tmp_path, "libcuda.so.1", "cuda.c")
    stubs.build(tmp_path, "libnvidia-ml.so.1", "nvml.c")
    samples, logged = scrape(tmp_path, 1)  # CUDA's number 1 is the UUID that the library knows
    assert samples == [
        'slipstream_gpu_utilization_ratio{device="cuda:1"} 0.75',
        'slipstream_gpu_memory_used_bytes{device="cuda:1"} 400.0',
        'slipstream_gpu_memory_bytes{device="cuda:1"} 1000.0',
        'slipstream_gpu_temperature_celsius{device="cuda:1"} 65.0',
        'slipstream_gpu_throttled{device="cuda:1"} 1.0',
    ]
    assert logged == ["cannot read slipstream_gpu_power_watts of cuda:1: Not Supported"], "once, not at each scrape"


@pytest.mark.parametrize(
    ("libraries", "told"),
    [
        ({}, "NVML Shared Library Not Found"),
        ({"libnvidia-ml.so.1": "nvml.c"}, "libcuda.so.1: cannot open shared object file"),
        ({"libnvidia-ml.so.1": "nvml.c", "libcuda.so.1": "cuda.c"}, "Not Found"),
    ],
)
def test_gpu_that_cannot_be_found_drops_out_with_one_line(tmp_path: Path, libraries: dict[str, str], told: str):
    for library, source in libraries.items():
        stubs.build(tmp_path, library, source)
    samples, logged = scrape(tmp_path, 0)
    assert samples == []
    assert len(logged) == 1
    assert logged[0].startswith("no metrics of the GPU: ")
    assert told in logged[0]


def test_missing_package_drops_out(monkeypatch: pytest.MonkeyPatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(gpus, "pynvml", None)
    registry = CollectorRegistry()
    registry.register(GpuCollector([0]))
    assert generate_latest(registry) == b""
    assert "no metrics of the GPU: pip install nvidia-ml-py" in caplog.text
