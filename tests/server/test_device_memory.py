import ctypes
import gc

import numpy as np
import pytest

from server.device_memory import CudaPin, Memory, Staging, cuda_runtime, memory_of
from server.providers import CPU, Device
from server.tensors import TensorSpec


class FakeRuntime:
    """The three calls of the CUDA runtime, as its manual declares them: 0 is success."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.device = code, -1
        self.pinned: dict[int | None, int] = {}

    def cudaSetDevice(self, index: int) -> int:  # noqa: N802  (NVIDIA's name)
        self.device = index
        return 0

    def cudaHostRegister(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:  # noqa: N802
        assert flags == 1
        if not self.code:
            self.pinned[address.value] = size.value
        return self.code

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        del self.pinned[address.value]
        return 0


def test_buffer_is_pinned_as_long_as_it_is_there() -> None:
    runtime = FakeRuntime()
    buffer = np.empty(4096, np.uint8)
    CudaPin(runtime, 1)(buffer)
    assert runtime.device == 1
    assert runtime.pinned == {buffer.ctypes.data: 4096}
    view = buffer[:8]
    del buffer
    assert runtime.pinned
    del view
    gc.collect()
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_logged_and_used(caplog: pytest.LogCaptureFixture) -> None:
    buffer = np.empty(16, np.uint8)
    CudaPin(FakeRuntime(code=2), 0)(buffer)
    assert "cannot pin 16 bytes for cuda:0 (CUDA error 2)" in caplog.text
    del buffer
    gc.collect()
    CudaPin(None, 0)(np.empty(16, np.uint8))


def test_missing_cuda_runtime_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert cuda_runtime(("libnot-there.so.1",)) is None
    assert "none of libnot-there.so.1 can be loaded" in caplog.text


def test_memory_follows_the_device() -> None:
    assert memory_of(CPU).kind == "cpu"
    for kind in ("cuda", "tensorrt"):
        memory = memory_of(Device(kind, 2))
        assert (memory.kind, memory.index) == ("cuda", 2)
        assert isinstance(memory.pin, CudaPin)


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP32", "FP64"])
def test_tensors_hold_what_is_copied_into_them(datatype: str) -> None:
    memory = Memory("cpu")
    tensor = memory.tensor(TensorSpec("x", datatype, ("n", 3)), (2, 3))
    wanted = (np.arange(12).reshape(2, 6) % 2).astype(np.float64)[:, ::2]
    array = wanted.astype(tensor.numpy().dtype)
    assert list(tensor.shape()) == [2, 3]
    tensor.update_inplace(Staging(memory).filled(array))
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_staging_copies_are_contiguous_and_share_one_buffer() -> None:
    buffers: list[np.ndarray] = []
    staging = Staging(Memory("cpu", 0, buffers.append))
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    first = staging.filled(wide[:, ::2])
    assert first.flags.c_contiguous
    assert first.tolist() == wide[:, ::2].tolist()
    second = staging.filled(np.arange(3, dtype=np.int64))
    assert second.tolist() == [0, 1, 2]
    assert [buffer.nbytes for buffer in buffers] == [32]
    assert np.shares_memory(first, second)
    assert np.shares_memory(second, buffers[0])
