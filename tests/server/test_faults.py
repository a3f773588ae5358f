"""Which device fault the text of an error tells; the texts are those of onnxruntime, CUDA, cuBLAS and cuDNN."""

from pathlib import Path

import numpy as np
import pytest

from server.artifact import SessionOptions
from server.errors import DeviceLost, InferenceFailed, OutOfMemory
from server.faults import fault_of
from server.providers import CPU
from server.session import Session

NO_MEMORY = (
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; file=cuda_call.cc ; expr=cudaMalloc((void**)&p, size);",
    "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 Available memory of 1024 is smaller than requested "
    "bytes of 4096",
    "Non-zero status code returned while running MatMul node. Failed to allocate memory for requested buffer of size 9",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
LOST = (
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream);",
    "CUDA error 719: unspecified launch failure",
    "CUDA failure 999: unknown error",
    "CUDA failure 46: all CUDA-capable devices are busy or unavailable",
    "CUDA failure 710: device-side assert triggered",
    "CUDA failure 214: uncorrectable ECC error encountered",
    "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN failure 1: CUDNN_STATUS_NOT_INITIALIZED",
)
OTHER = (
    "indices element out of data bounds, idx=30522 must be within the inclusive range [-30522,30521]",
    "CUDA failure 1: invalid argument",
    "CUDA failure 200: device kernel image is invalid",
    "Got invalid dimensions for input: x for the following indices\n index: 1 Got: 3 Expected: 64",
    "",
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, OutOfMemory) for text in NO_MEMORY),
        *((text, DeviceLost) for text in LOST),
        *((text, InferenceFailed) for text in OTHER),
    ],
)
def test_cause_is_read_in_the_text(text: str, kind: type[InferenceFailed]):
    assert fault_of(RuntimeError(text)) is kind


def test_pythons_own_error_is_one_of_memory():
    assert fault_of(MemoryError()) is OutOfMemory


@pytest.mark.parametrize(
    ("text", "kind"), [(NO_MEMORY[0], OutOfMemory), (LOST[0], DeviceLost), (OTHER[0], InferenceFailed)]
)
def test_session_raises_it_with_its_own_name(mlp: Path, text: str, kind: type[InferenceFailed]):
    session = Session(mlp, CPU, SessionOptions())

    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError(text)

    session._session = Broken()
    with pytest.raises(InferenceFailed, match=r"mlp.onnx on cpu: ") as caught:
        session.run({"x": np.zeros((1, 64), np.float32)})
    assert type(caught.value) is kind
