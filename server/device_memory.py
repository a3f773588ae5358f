"""Memory of a device and of the host beside it: where bound tensors lie, and how elements get there.

onnxruntime's Python interface allocates on a device, but offers no pinned host memory of its CUDA provider. So staging
buffers are numpy's, pinned with the CUDA runtime that the provider has loaded. Unverified on GPU.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.providers import Device
from server.tensors import NUMPY_DTYPE, Array, TensorSpec

with suppress(ImportError):  # check_environment() tells the user which form of it to install
    import onnxruntime

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_CUDA_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")


@dataclass(frozen=True, slots=True)
class Memory:
    """Where bound tensors lie.

    Attributes:
        kind: The device's name in onnxruntime: ``cpu`` or ``cuda``.
        index: Number of the device.
        pin: Called with each new staging buffer, UINT8; may let the device read it without a further copy.
    """

    kind: str
    index: int = 0
    pin: Callable[[Array], None] = lambda _buffer: None

    def tensor(self, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
        """Allocate a tensor; return onnxruntime's ``OrtValue``."""
        dtype = NUMPY_DTYPE[spec.datatype]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.kind, self.index)


class CudaPin:
    """Pins host memory with the CUDA runtime, until the array is gone; where that fails, copies are only slower.

    Args:
        runtime: The CUDA runtime; ``None`` when it is not installed.
        index: Number of the GPU.
    """

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime, self._index = runtime, index

    def __call__(self, buffer: Array) -> None:
        """Pin a buffer."""
        if self._runtime is None:
            return
        address = ctypes.c_void_p(buffer.ctypes.data)
        code = self._runtime.cudaSetDevice(self._index) or self._runtime.cudaHostRegister(
            address, ctypes.c_size_t(buffer.nbytes), _PORTABLE
        )
        if code:
            logger.warning(
                "cannot pin %d bytes for cuda:%d (CUDA error %d): copies to it are slower; raise the memory lock limit",
                buffer.nbytes,
                self._index,
                code,
            )
            return
        weakref.finalize(buffer, self._runtime.cudaHostUnregister, address).atexit = False


def cuda_runtime(names: Sequence[str] = _CUDA_RUNTIMES) -> Any:
    """Return the CUDA runtime library that the provider has loaded, or ``None`` when there is none."""
    for name in names:
        with suppress(OSError):
            return ctypes.CDLL(name)
    logger.warning("none of %s can be loaded: memory is not pinned and copies to the GPU are slower", ", ".join(names))
    return None


def memory_of(device: Device) -> Memory:
    """Return where bound tensors of sessions on a device lie; TensorRT's are CUDA's."""
    if device.kind == "cpu":
        return Memory("cpu")
    return Memory("cuda", device.index, CudaPin(cuda_runtime(), device.index))


class Staging:
    """Host memory from which inputs are copied to the device, one after the other; it grows to the largest."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._buffer: Array = np.empty(0, np.uint8)

    def filled(self, array: Array) -> Array:
        """Return a contiguous copy of an array, valid until the next call."""
        if array.nbytes > self._buffer.nbytes:
            self._buffer = np.empty(1 << (array.nbytes - 1).bit_length(), np.uint8)
            self._memory.pin(self._buffer)
        view = self._buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(view, array)
        return view
