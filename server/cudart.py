"""The CUDA runtime, as far as an engine needs it: streams, memory of the device and of the host, copies between them.

Source: CUDA Runtime API, the pages on device, stream and memory management. Unverified on GPU.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

from server.errors import InferenceFailed
from server.faults import fault_of

LIBRARIES = ("libcudart.so.13", "libcudart.so.12")
_TO_DEVICE, _TO_HOST = 1, 2
_NON_BLOCKING = 1
_PORTABLE = 1


class Cudart:
    """The library, bound to one device; every method may be called from any thread, after ``use`` there.

    Args:
        index: Number of the device.

    Raises:
        OSError: If none of ``LIBRARIES`` can be loaded.
    """

    def __init__(self, index: int) -> None:
        self._library, self._index = _load(LIBRARIES), index
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def use(self) -> None:
        """Make the device that of the calling thread; CUDA keeps this per thread."""
        self._call("cudaSetDevice", self._index)

    def stream(self) -> int:
        """Create a stream that does not wait for the default one; return its handle."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        return handle.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Block until everything on a stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def allocate(self, n_bytes: int) -> int:
        """Allocate memory of the device; return its address."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value or 0

    def free(self, address: int) -> None:
        """Release memory of the device."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def allocate_host(self, n_bytes: int) -> int:
        """Allocate pinned memory of the host, which the device reads and writes by itself; return its address."""
        address = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(n_bytes), _PORTABLE)
        return address.value or 0

    def free_host(self, address: int) -> None:
        """Release pinned memory."""
        self._call("cudaFreeHost", ctypes.c_void_p(address))

    def copy_in(self, device: int, host: int, n_bytes: int, stream: int) -> None:
        """Begin to copy from the host to the device."""
        self._copy(device, host, n_bytes, _TO_DEVICE, stream)

    def copy_out(self, host: int, device: int, n_bytes: int, stream: int) -> None:
        """Begin to copy from the device to the host."""
        self._copy(host, device, n_bytes, _TO_HOST, stream)

    def _copy(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(n_bytes),
            kind,
            ctypes.c_void_p(stream),
        )

    def _call(self, function: str, *args: Any) -> None:
        """Call a function.

        Raises:
            InferenceFailed: If it fails; ``OutOfMemory`` or ``DeviceLost`` where CUDA says so.
        """
        code = getattr(self._library, function)(*args)
        if code:
            reason = (self._library.cudaGetErrorString(code) or b"").decode(errors="replace")
            error = InferenceFailed(f"CUDA failure {code}: {reason} ; GPU={self._index} ; {function}")
            raise fault_of(error)(str(error))


def _load(names: Sequence[str]) -> Any:
    failures = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as exc:
            failures.append(str(exc))
    raise OSError("; ".join(failures))
