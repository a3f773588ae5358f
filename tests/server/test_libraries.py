"""What is said of drivers and libraries that are missing or do not fit, with libraries that stand for them.

Each look happens in a process of its own, through the system's dynamic linker.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server import libraries
from tests.server import stubs

ROOT = Path(__file__).parents[2]
CUDA_13 = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
LOOK = """
import json, sys
from importlib import metadata
from server import libraries
version = sys.argv[1]
def found(name):
    if name != "onnxruntime-gpu" or not version: raise metadata.PackageNotFoundError(name)
    return version
libraries.metadata.version = found
def told(obstacle): return [obstacle.code, obstacle.text] if obstacle else None
count, obstacle = libraries.count_gpus()
print(json.dumps([count, told(obstacle), told(libraries.missing_cuda()), told(libraries.missing_tensorrt())]))
"""


def look(folder: Path, version: str = "1.31.1", **environment: str) -> tuple:
    """Return the count of GPUs, and what is said of the driver, of CUDA and of TensorRT."""
    given = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, version], env=given, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return tuple(json.loads(done.stdout))


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a driver."""
    stubs.build(tmp_path, "libcuda.so.1", "cuda.c")
    return tmp_path


def test_no_driver(tmp_path: Path):
    assert look(tmp_path)[:2] == (
        0,
        ["no_driver", "no NVIDIA driver (libcuda.so.1: cannot open shared object file: No such file or directory)"],
    )


def test_driver_without_a_gpu(driver: Path):
    assert look(driver, STUB_INIT="100")[:2] == (
        0,
        ["no_device", "the NVIDIA driver offers no GPU (CUDA error 100)"],
    )
    assert look(driver, STUB_COUNT="0")[:2] == (0, ["no_device", "the NVIDIA driver offers no GPU"])


def test_driver_with_gpus(driver: Path):
    assert look(driver, STUB_COUNT="2")[:2] == (2, None)


@pytest.mark.parametrize(
    ("version", "cuda", "told"),
    [
        ("1.31.1", "13010", None),
        ("1.31.1", "12080", "supports CUDA 12.8, onnxruntime-gpu needs CUDA 13: update the driver to 580 or newer"),
        ("1.26.0", "12080", None),
        ("1.26.0", "11080", "supports CUDA 11.8, onnxruntime-gpu needs CUDA 12: update the driver to 525 or newer"),
        ("", "12080", "needs CUDA 13"),
    ],
)
def test_driver_that_is_too_old(driver: Path, version: str, cuda: str, told: str | None):
    seen = look(driver, version, STUB_CUDA=cuda)[1]
    assert seen is None if told is None else (seen[0] == "old_driver" and told in seen[1])


def test_cuda_libraries_that_are_missing_are_named_with_the_command_that_installs_them(driver: Path):
    for library in CUDA_13[:2]:
        stubs.build(driver, library)
    code, text = look(driver)[2]
    assert code == "missing_library"
    assert text == (
        "libcublas.so.13, libcurand.so.10 not found. onnxruntime-gpu 1.31.1 needs CUDA 13: "
        "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"
    )
    for library in CUDA_13[2:]:
        stubs.build(driver, library)
    assert look(driver)[2] is None


def test_other_version_of_cuda_is_named(driver: Path):
    stubs.build(driver, "libcudart.so.12")
    assert "not found; CUDA 12 is installed, which is another version. onnxruntime-gpu 1.31.1" in look(driver)[2][1]
    for library in CUDA_13:
        stubs.build(driver, library)
    assert "CUDA 13 is installed, which is another version. onnxruntime-gpu 1.26.0" in look(driver, "1.26.0")[2][1]


def test_tensorrt_10_is_needed_and_11_does_not_do(driver: Path):
    code, text = look(driver)[3]
    assert code == "missing_library"
    assert text.startswith("TensorRT 10 is not installed (libnvinfer.so.10: cannot open shared object file")
    assert text.endswith("): pip install 'tensorrt-cu13>=10.13,<11'")
    stubs.build(driver, "libnvinfer.so.11")
    assert "; TensorRT 11 is, which onnxruntime's provider does not take: pip install" in look(driver)[3][1]
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        stubs.build(driver, library)
    assert look(driver)[3] is None


def test_tensorrt_of_a_package_is_found_without_a_path(driver: Path):
    package = driver / "packages" / "tensorrt_libs"
    package.mkdir(parents=True)
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        stubs.build(package, library)
    assert look(driver, PYTHONPATH=f"{ROOT}:{package.parent}")[3] is None


def test_uuid_names_the_gpu_as_the_management_library_does(driver: Path):
    code = "from server.libraries import uuid_of; print(uuid_of(0), uuid_of(1))"
    given = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(ROOT), "STUB_COUNT": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"GPU-00000000-0000-0000-0000-00000000000{number}" for number in (1, 2)]


def test_uuid_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, driver: Path):
    load = libraries.ctypes.CDLL
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda name: load(str(driver / name)))
    with pytest.raises(OSError, match=r"does not tell the UUID of GPU 3 \(CUDA error 101\)"):
        libraries.uuid_of(3)
