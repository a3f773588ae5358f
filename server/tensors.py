"""Tensors as they cross layers: datatypes, specs, signatures, requests and responses.

Datatype names are those of the Open Inference Protocol. ``BYTES`` tensors are numpy arrays of dtype ``object`` that
hold ``bytes``; every other datatype is a C-contiguous, little-endian numpy array.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from server.errors import SignatureMismatch, UnsupportedModel

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

# Protocol datatype -> (numpy dtype, onnxruntime type). BF16 has no numpy dtype of its own and is not served.
_DATATYPES: dict[str, tuple[npt.DTypeLike, str]] = {
    "BOOL": (np.bool_, "tensor(bool)"),
    "UINT8": (np.uint8, "tensor(uint8)"),
    "UINT16": (np.uint16, "tensor(uint16)"),
    "UINT32": (np.uint32, "tensor(uint32)"),
    "UINT64": (np.uint64, "tensor(uint64)"),
    "INT8": (np.int8, "tensor(int8)"),
    "INT16": (np.int16, "tensor(int16)"),
    "INT32": (np.int32, "tensor(int32)"),
    "INT64": (np.int64, "tensor(int64)"),
    "FP16": (np.float16, "tensor(float16)"),
    "FP32": (np.float32, "tensor(float)"),
    "FP64": (np.float64, "tensor(double)"),
    "BYTES": (np.object_, "tensor(string)"),
}
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for name, (dtype, _) in _DATATYPES.items()}
DATATYPE_OF_ORT: dict[str, str] = {ort: name for name, (_, ort) in _DATATYPES.items()}
DATATYPE_OF_NUMPY: dict[np.dtype[Any], str] = {dtype: name for name, dtype in NUMPY_DTYPE.items()}

Dimension = int | str | None
"""A fixed size, the name of a variable axis, or ``None`` for a variable axis without a name."""


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, datatype and shape of one model input or output.

    Attributes:
        name: The tensor's name in the ONNX graph.
        datatype: A protocol datatype, a key of ``NUMPY_DTYPE``.
        shape: One ``Dimension`` per axis.
    """

    name: str
    datatype: str
    shape: tuple[Dimension, ...]

    @property
    def protocol_shape(self) -> list[int]:
        """The shape with -1 for every variable axis, as protocol metadata spells it."""
        return [size if isinstance(size, int) else -1 for size in self.shape]

    def check(self, array: Array) -> None:
        """Check that an array fits this spec.

        Raises:
            SignatureMismatch: If the dtype, the rank, or the size of a fixed axis differs.
        """
        if array.dtype != NUMPY_DTYPE[self.datatype]:
            seen = DATATYPE_OF_NUMPY.get(array.dtype, str(array.dtype))
            raise SignatureMismatch(f"input '{self.name}' has datatype {seen}; the model takes {self.datatype}")
        if len(array.shape) == len(self.shape):
            for seen_size, size in zip(array.shape, self.shape, strict=True):
                if isinstance(size, int) and seen_size != size:
                    break
            else:
                return
        raise SignatureMismatch(
            f"unexpected shape for input '{self.name}': got {list(array.shape)}, "
            f"the model takes {self.protocol_shape} (-1 = any size)"
        )


class Signature(msgspec.Struct, frozen=True):
    """Inputs and outputs of a model, in the order of its graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def shares_batch_axis(self) -> bool:
        """Whether axis 0 of every input *and* output is one and the same named variable axis.

        This is what lets a plain ONNX file be batched. It is false for a model whose output or state carries the batch
        on another axis, and for axes without a name, which may be unrelated.
        """
        first = {spec.shape[0] if spec.shape else None for spec in (*self.inputs, *self.outputs)}
        return len(first) == 1 and isinstance(first.pop(), str)

    def check(self, inputs: Tensors) -> None:
        """Check that the inputs are exactly the declared ones and that each fits its spec.

        Raises:
            SignatureMismatch: If an input is missing or unknown, or if one does not fit (see ``TensorSpec.check``).
        """
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if array is None:
                names = [s.name for s in self.inputs]
                raise SignatureMismatch(f"missing input '{spec.name}'; the model takes {names}")
            spec.check(array)
        if len(inputs) != len(self.inputs):
            names = [s.name for s in self.inputs]
            unknown = next(name for name in inputs if name not in names)
            raise SignatureMismatch(f"unexpected inference input '{unknown}'; the model takes {names}")

    def check_outputs(self, names: tuple[str, ...]) -> None:
        """Check that every requested output exists.

        Raises:
            SignatureMismatch: If a name is not an output of the model.
        """
        for name in names:
            known = [spec.name for spec in self.outputs]
            if name not in known:
                raise SignatureMismatch(f"unexpected inference output '{name}'; the model gives {known}")


PRIORITIES = range(1, 10)
"""Priorities of requests, the first to go first."""


class InferRequest(msgspec.Struct, frozen=True):
    """One inference request, decoded and free of any transport.

    Attributes:
        inputs: Name -> array. The arrays may be views of the request body and are never written to.
        id: The client's request id, echoed in the response; empty when not given.
        outputs: Names of the wanted outputs; empty means all.
        timeout_s: Seconds from arrival until the deadline; ``None`` means the model's default.
        variant: The pinned variant; empty lets the router choose.
        priority: 1 goes first, 9 last; 0 means the default, 5.
        client: Whom the work counts for, so that one client cannot crowd out others; empty for nobody.
    """

    inputs: Tensors
    id: str = ""
    outputs: tuple[str, ...] = ()
    timeout_s: float | None = None
    variant: str = ""
    priority: int = 0
    client: str = ""


class InferResponse(msgspec.Struct, frozen=True):
    """One inference response with its account.

    Attributes:
        outputs: Name -> array in the order of the signature; arrays may be views of a batch's output.
        variant: The variant that answered.
        device: The device it ran on, e.g. ``cpu`` or ``cuda:0``.
        batch_rows: Rows of the batch that the request travelled in.
        queue_s: Seconds from admission until the batch was dispatched.
        compute_s: Seconds of the batch's run, including assembly; ``assemble_s`` of them were that.
    """

    model: str
    version: str
    id: str
    outputs: Tensors
    variant: str
    device: str
    batch_rows: int
    queue_s: float
    compute_s: float
    assemble_s: float = 0.0


def spec_of_ort(name: str, ort_type: str, shape: list[Any]) -> TensorSpec:
    """Make the spec of an onnxruntime input or output.

    Raises:
        UnsupportedModel: If the type is not a dense tensor of a served datatype.
    """
    datatype = DATATYPE_OF_ORT.get(ort_type)
    if datatype is None:
        raise UnsupportedModel(f"'{name}' is a {ort_type}; served types are {sorted(DATATYPE_OF_ORT)}")
    return TensorSpec(name, datatype, tuple(size if isinstance(size, int | str) else None for size in shape))
