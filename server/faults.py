"""What a failed run says of its device: no memory left, the device lost, or neither.

onnxruntime raises a few classes for hundreds of causes, so the cause is read in the text. The texts are those of
onnxruntime's allocators and of CUDA, cuBLAS and cuDNN; an error of CUDA that spoils its context is *sticky*: from then
on every call of the process to that device fails.

Source: the messages in onnxruntime's ``bfc_arena.cc`` and ``cuda_call.cc``; CUDA's list of ``cudaError``.
"""

import re

from server.errors import DeviceLost, InferenceFailed, OutOfMemory

_NO_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|available memory of \d+ is smaller than requested|bad_?alloc"
    r"|CUDA (failure|error)[ :]+2\b|CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# 46 all devices busy, 214 memory with an uncorrectable error, 700 to 720 what spoils a context, 999 unknown
_LOST = re.compile(
    r"CUDA (failure|error)[ :]+(46|214|7(00|02|09|1[0-9]|20)|999)\b|illegal memory access|unspecified launch failure"
    r"|device-side assert|uncorrectable|CU(BLAS|DNN)_STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR)"
    r"|GPU has fallen off the bus",
    re.IGNORECASE,
)


def fault_of(error: BaseException) -> type[InferenceFailed]:
    """Return the error to raise for what a session raised: ``OutOfMemory``, ``DeviceLost`` or ``InferenceFailed``."""
    text = str(error)
    if _LOST.search(text):
        return DeviceLost
    return OutOfMemory if isinstance(error, MemoryError) or _NO_MEMORY.search(text) else InferenceFailed
