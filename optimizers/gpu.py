"""The GPU that TensorRT builds for: what its driver says, without a CUDA context and without any package."""

import ctypes
from pathlib import Path
from typing import Any

import msgspec

_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_MODULE_VERSION = Path("/sys/module/nvidia/version")


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU and its driver.

    Attributes:
        name: Product name, e.g. ``NVIDIA L4``.
        capability: Compute capability, e.g. ``8.9``.
        cuda: CUDA version of the driver as the driver writes it, e.g. 13000 for 13.0.
        driver: Version of the kernel module, e.g. ``580.65.06``; empty when it cannot be read.
    """

    name: str
    capability: str
    cuda: int
    driver: str


def read_gpu(library: str = "libcuda.so.1", module_version: Path = _MODULE_VERSION) -> GpuFacts | None:
    """Return the facts of CUDA's device 0, the one that an engine is built on; nothing without a driver or a GPU.

    Args:
        library: The driver's library, as the dynamic loader takes it.
        module_version: File with the version of the driver's kernel module.
    """
    try:
        driver: Any = ctypes.CDLL(library)
    except OSError:
        return None
    device, cuda = ctypes.c_int(0), ctypes.c_int(0)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    # In this order: every call but the first needs the first, and the last three need the device.
    if (
        driver.cuInit(0)
        or driver.cuDriverGetVersion(ctypes.byref(cuda))
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, _NAME_BYTES, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    ):
        return None
    try:
        module = module_version.read_text(encoding="ascii").strip()
    except OSError:
        module = ""
    return GpuFacts(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", cuda.value, module)
