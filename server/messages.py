"""What travels between a front end and the engine: values as bytes, with their large tensors behind them.

A message is a *head*, the value in msgpack, and the tensors of more than ``SMALL_TENSOR_BYTES``, each at a multiple of
``ALIGNMENT`` bytes. In the head a tensor is ``[datatype, shape, offset]``, and with its elements in place of the offset
if it is small or of datatype BYTES. A message knows nothing of the fields of a request: whatever ``InferRequest`` holds
travels.
"""

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar, cast

import msgspec
import numpy as np

from server.errors import SlipstreamError
from server.serving import How
from server.tensors import DATATYPE_OF_NUMPY, NUMPY_DTYPE, Array, InferRequest, InferResponse, Signature

ALIGNMENT = 16
# Copied with the head: cheaper than a place of its own.
SMALL_TENSOR_BYTES = 2048
_Value = TypeVar("_Value")
Buffer = bytes | np.ndarray[Any, np.dtype[np.uint8]]


class Encoded(NamedTuple):
    """A value that is ready to be written.

    Attributes:
        head: The value in msgpack; the whole message if there are no large tensors.
        tensors: Offset from the start of the message, and tensor; ascending.
        size_bytes: Of the whole message.
    """

    head: bytes
    tensors: list[tuple[int, Array]]
    size_bytes: int

    def write(self, memory: memoryview) -> None:
        """Write the message to ``memory``, which holds at least ``size_bytes``; the one copy of the tensors."""
        memory[: len(self.head)] = self.head
        for offset, array in self.tensors:
            np.copyto(np.ndarray(array.shape, array.dtype, memory, offset), array)


class Codec(Generic[_Value]):
    """Writes and reads values of one type. Not for more than one thread at a time.

    Args:
        kind: A type that msgspec knows; numpy arrays anywhere in it travel as tensors.
    """

    def __init__(self, kind: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._put)
        self._decoder: msgspec.msgpack.Decoder[_Value] = msgspec.msgpack.Decoder(kind, dec_hook=self._get)
        self._tensors: list[tuple[int, Array]] = []
        self._end = 0
        self._message: Buffer = b""
        self._start = 0

    def encode(self, value: _Value) -> Encoded:
        """Encode a value; its large arrays are referred to, not copied."""
        self._tensors, self._end = [], 0
        head = self._encoder.encode(value)
        if not self._tensors:
            return Encoded(head, self._tensors, len(head))
        start = _aligned(len(head))
        return Encoded(head, [(start + offset, array) for offset, array in self._tensors], start + self._end)

    def decode(self, message: Buffer, head_bytes: int) -> _Value:
        """Decode a value; its large arrays are views of ``message``, none is to be written to.

        Raises:
            ValueError: If tensors lie outside of the message; ``TypeError`` or ``msgspec.DecodeError`` if it is no such
                value.
        """
        if head_bytes == len(message):
            return self._decoder.decode(cast(bytes, message))
        self._message, self._start = message, _aligned(head_bytes)
        try:
            return self._decoder.decode(memoryview(cast(bytes, message))[:head_bytes])
        finally:
            self._message = b""

    def _put(self, array: Any) -> tuple[str, tuple[int, ...], Any]:
        datatype = DATATYPE_OF_NUMPY[array.dtype]
        if datatype == "BYTES":
            return datatype, array.shape, array.ravel().tolist()
        if array.nbytes <= SMALL_TENSOR_BYTES:
            return datatype, array.shape, array.tobytes()
        offset = _aligned(self._end)
        self._tensors.append((offset, array))
        self._end = offset + array.nbytes
        return datatype, array.shape, offset

    def _get(self, _: type, tensor: tuple[str, list[int], Any]) -> Array:
        datatype, shape, where = tensor
        if type(where) is bytes:
            return np.ndarray(shape, NUMPY_DTYPE[datatype], where)
        if datatype == "BYTES":
            array = np.empty(len(where), np.object_)
            array[:] = where
            return array.reshape(shape)
        return np.ndarray(shape, NUMPY_DTYPE[datatype], self._message, self._start + where)


class Found(msgspec.Struct, frozen=True):
    """What a front end must know of a model.

    Attributes:
        target: The engine's number for the name and version that were asked for.
        name: The model's name, ``version`` its version, also where none was asked for.
    """

    target: int
    name: str
    version: str
    signature: Signature


class HttpRequest(msgspec.Struct, frozen=True):
    """Any request but for inference, for the engine's application; all but the body as ASGI spells it."""

    http_version: str
    method: str
    scheme: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    body: bytes


class HttpAnswer(msgspec.Struct, frozen=True):
    """The application's answer to an ``HttpRequest``."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Inferred(msgspec.Struct, frozen=True):
    """An infer response, and how the response cache came by it."""

    response: InferResponse
    how: How


class Finished(msgspec.Struct, frozen=True):
    """Requests that a front end has answered: (model, version, code, trace or "", seconds since arrival of each)."""

    requests: list[tuple[str, str, str, str, list[float]]]


class Failure(msgspec.Struct, frozen=True):
    """A ``SlipstreamError`` on its way to the process that answers it.

    Attributes:
        kind: Name of its class.
        text: Its message.
        fields: Its attributes, such as ``retry_after_s``.
    """

    kind: str
    text: str
    fields: dict[str, Any] = {}

    @classmethod
    def of(cls, error: SlipstreamError) -> "Failure":
        """Describe an error."""
        return cls(type(error).__name__, str(error), dict(vars(error)))

    def to_error(self) -> SlipstreamError:
        """Make the error again, with status, code, message and attributes."""
        kind = {known.__name__: known for known in _error_types(SlipstreamError)}.get(self.kind, SlipstreamError)
        error = kind.__new__(kind, self.text)
        vars(error).update(self.fields)
        return error


class Codecs:
    """One codec for each type of message."""

    def __init__(self) -> None:
        self.infer: Codec[InferRequest] = Codec(InferRequest)
        self.inferred: Codec[Inferred] = Codec(Inferred)
        self.look_up: Codec[tuple[str, str]] = Codec(tuple[str, str])
        self.found: Codec[Found] = Codec(Found)
        self.http: Codec[HttpRequest] = Codec(HttpRequest)
        self.http_answer: Codec[HttpAnswer] = Codec(HttpAnswer)
        self.finished: Codec[Finished] = Codec(Finished)
        self.failure: Codec[Failure] = Codec(Failure)


def _error_types(root: type[SlipstreamError]) -> Iterator[type[SlipstreamError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _error_types(kind)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
