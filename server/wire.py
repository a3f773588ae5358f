"""Infer messages of the Open Inference Protocol v2: bytes to ``InferRequest``, ``InferResponse`` to bytes.

JSON and binary tensor data may be mixed in one message, tensor by tensor. A message with binary data is a JSON part,
whose length travels in the header ``Inference-Header-Content-Length``, followed by the bytes of the binary tensors in
the order of the JSON part. Length 0 marks a raw request: the body is nothing but the bytes of the model's only input.

Checks here concern the message alone; whether it fits the model is ``Signature.check``.

Source: Open Inference Protocol v2, REST; Triton's extensions *binary tensor data*, *parameters*, *schedule policy*.
"""

import json
from math import prod
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
import numpy as np
import orjson
from msgspec import UNSET, UnsetType

from server.errors import MalformedRequest
from server.json_numbers import LONG_BYTES, cut_out, placeholder, read_numbers, write_numbers
from server.tensor_data import element_count, from_binary, from_json, shown, to_binary, to_json
from server.tensors import (
    DATATYPE_OF_NUMPY,
    NUMPY_DTYPE,
    PRIORITIES,
    Array,
    InferRequest,
    InferResponse,
    Tensors,
    TensorSpec,
)

_MAX_TIMEOUT_US: Final = 2**63 - 1


class ReplyFormat(msgspec.Struct, frozen=True):
    """How the client wants its outputs.

    Attributes:
        binary: Whether outputs are binary that ``outputs`` does not name.
        outputs: Output name -> whether it is binary.
    """

    binary: bool = False
    outputs: dict[str, bool] = {}


class Decoded(NamedTuple):
    """A request and the form of its reply."""

    request: InferRequest
    reply: ReplyFormat


class Encoded(NamedTuple):
    """A response body.

    Attributes:
        parts: The body in pieces; memoryviews among them alias the outputs.
        json_length: Bytes of the JSON part, for ``Inference-Header-Content-Length``; ``None`` when all of it is JSON.
    """

    parts: list[bytes | memoryview]
    json_length: int | None


class _InputParameters(msgspec.Struct):
    binary_data_size: int | None = None
    shared_memory_region: Any = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: _InputParameters | None = None
    data: msgspec.Raw | UnsetType = UNSET


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: int = 0
    shared_memory_region: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool = False
    timeout: int | None = None
    priority: int = 0
    variant: str = ""
    sequence_id: Any = None
    sequence_start: Any = None
    sequence_end: Any = None


class _Message(msgspec.Struct):
    inputs: tuple[_Input, ...]
    id: str = ""
    outputs: tuple[_Output, ...] | None = None
    parameters: _Parameters | None = None


class _ParsedInput(_Input):
    data: Any = UNSET


class _ParsedMessage(_Message):
    inputs: tuple[_ParsedInput, ...]


_MESSAGE: Final = msgspec.json.Decoder(_Message)
_NO_PARAMETERS: Final = _Parameters()


def decode(
    body: bytes | bytearray | memoryview, header_length: int | None, raw_input: TensorSpec | None = None
) -> Decoded:
    """Decode an infer request. Safe to call on any thread.

    Args:
        body: The whole request body, decompressed. Arrays of the request may be views of it: it must not change.
        header_length: The value of ``Inference-Header-Content-Length``; ``None`` when the header is absent.
        raw_input: The model's input if it has exactly one; only with it can a raw request (length 0) be read.

    Raises:
        MalformedRequest: If the body is not an infer request, exact to the byte; the text says what was seen and what
            is allowed.
    """
    view = memoryview(body)
    if header_length is None:
        header_length = len(view)
    elif header_length == 0:
        return _decode_raw(view, raw_input)
    elif not 0 < header_length <= len(view):
        raise MalformedRequest(
            f"Inference-Header-Content-Length is {shown(header_length)}; it counts the bytes of the JSON part: "
            f"at most the {len(view)} of the body, or 0 for a raw request"
        )
    text = view[:header_length]
    message = (_read_long(text) if header_length >= LONG_BYTES else None) or _read_message(text)
    parameters = message.parameters or _NO_PARAMETERS
    inputs = _read_inputs(message.inputs, view, header_length)
    reply = _read_reply(message.outputs, parameters.binary_data_output)
    timeout_s, priority = _read_timeout(parameters), _read_priority(parameters)
    request = InferRequest(inputs, message.id, tuple(reply.outputs), timeout_s, parameters.variant, priority)
    return Decoded(request, reply)


def encode(response: InferResponse, reply: ReplyFormat) -> Encoded:
    """Encode an infer response.

    Returns:
        The body. The JSON part writes NaN and infinities as the bare tokens ``NaN``, ``Infinity`` and ``-Infinity``.

    Raises:
        MalformedRequest: If the client wants an output in JSON that has no JSON form (see ``to_json``).
    """
    outputs: list[dict[str, Any]] = []
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
    if response.id:
        head["id"] = response.id
    parts: list[bytes | memoryview] = [b""]
    for name, array in response.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": DATATYPE_OF_NUMPY[array.dtype], "shape": array.shape}
        if reply.outputs.get(name, reply.binary):
            data = to_binary(array)
            output["parameters"] = {"binary_data_size": len(data)}
            if data:
                parts.append(data)
        else:
            output["data"] = to_json(name, array)
        outputs.append(output)
    parts[0] = _dump(head)
    return Encoded(parts, len(parts[0]) if len(parts) > 1 else None)


def _read_long(text: memoryview) -> _Message | None:
    """Read a message whose long arrays of numbers are cut out first; ``None`` where the exact way must look."""
    cut = cut_out(bytes(text))
    if cut is None:
        return None
    try:
        message = _MESSAGE.decode(cut.rest)
    except (ValueError, RecursionError):
        return None
    left = {placeholder(index): array for index, array in enumerate(cut.arrays)}
    inputs: list[_Input] = []
    for item in message.inputs:
        array = None if item.data is UNSET else left.pop(bytes(item.data), None)
        if array is not None:
            dtype = NUMPY_DTYPE.get(item.datatype)
            numbers = None if dtype is None else read_numbers(array, dtype, prod(item.shape))
            if numbers is None:
                return None
            item = _ParsedInput(item.name, item.datatype, item.shape, parameters=item.parameters, data=numbers)
        inputs.append(item)
    # What is left belongs to no input: nothing has proven that it is valid JSON.
    return None if left else _Message(tuple(inputs), message.id, message.outputs, message.parameters)


def _read_message(text: memoryview) -> _Message:
    try:
        return _MESSAGE.decode(text)
    except msgspec.ValidationError as exc:
        raise MalformedRequest(f"not an infer request: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        loose = bytes(text)
        if b"NaN" not in loose and b"Infinity" not in loose:
            raise MalformedRequest(f"the request is not valid JSON: {exc}") from exc
        return _read_message_with_nan(loose)


def _read_message_with_nan(text: bytes) -> _Message:
    """Read JSON with the tokens NaN and Infinity, which clients of this protocol write and strict parsers refuse."""
    try:
        message = msgspec.convert(json.loads(str(text, "utf-8")), _ParsedMessage)
        # Python's parser lets lone surrogates pass; no answer could be encoded that repeats them.
        variant = message.parameters.variant if message.parameters else ""
        names = [item.name for item in message.inputs] + [item.name for item in message.outputs or ()]
        "".join((message.id, variant, *names)).encode()
    except msgspec.ValidationError as exc:
        raise MalformedRequest(f"not an infer request: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise MalformedRequest(f"the request is not valid JSON: {exc}") from exc
    return message


def _read_inputs(inputs: tuple[_Input, ...], body: memoryview, offset: int) -> Tensors:
    tensors: dict[str, Array] = {}
    for item in inputs:
        size = None
        if item.parameters is not None:
            size = item.parameters.binary_data_size
            if item.parameters.shared_memory_region is not None:
                _refuse_shared_memory("input", item.name)
        if item.name in tensors:
            raise MalformedRequest(f"input '{item.name}' already exists in request")
        if (size is None) == (item.data is UNSET):
            seen = "neither" if size is None else "both"
            raise MalformedRequest(f"input '{item.name}' has {seen} of data and binary_data_size; give exactly one")
        if size is None:
            tensors[item.name] = from_json(item.name, item.datatype, item.shape, item.data)
        else:
            tensors[item.name] = from_binary(item.name, item.datatype, item.shape, body, offset, size)
            offset += size
    if offset != len(body):
        raise MalformedRequest(
            f"{len(body) - offset} bytes are left over behind the last input; "
            "the JSON part and every binary_data_size must add up to the body"
        )
    return tensors


def _read_reply(outputs: tuple[_Output, ...] | None, binary: bool) -> ReplyFormat:
    if not outputs:
        return _ALL_BINARY if binary else _ALL_JSON
    wanted: dict[str, bool] = {}
    for item in outputs:
        if item.name in wanted:
            raise MalformedRequest(f"output '{item.name}' already exists in request")
        wanted[item.name] = binary
        if item.parameters is not None:
            if item.parameters.shared_memory_region is not None:
                _refuse_shared_memory("output", item.name)
            if item.parameters.classification:
                raise MalformedRequest(
                    f"output '{item.name}' asks for classification, which is not served; take the scores and sort them"
                )
            if item.parameters.binary_data is not None:
                wanted[item.name] = item.parameters.binary_data
    return ReplyFormat(binary, wanted)


def _read_timeout(parameters: _Parameters) -> float | None:
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if value := getattr(parameters, name):
            raise MalformedRequest(f"the request has {name} {shown(value)}; sequences are not served, send it without")
    if not parameters.timeout:
        return None
    if not 0 < parameters.timeout <= _MAX_TIMEOUT_US:
        raise MalformedRequest(
            f"the request has timeout {shown(parameters.timeout)}; it counts microseconds, "
            f"1 to {_MAX_TIMEOUT_US}, or 0 for the model's default"
        )
    return parameters.timeout / 1e6


def _read_priority(parameters: _Parameters) -> int:
    if parameters.priority and parameters.priority not in PRIORITIES:
        raise MalformedRequest(
            f"the request has priority {shown(parameters.priority)}; it is 1 (first) to 9 (last), or 0 for the default"
        )
    return parameters.priority


def _decode_raw(body: memoryview, spec: TensorSpec | None) -> Decoded:
    if spec is None:
        raise MalformedRequest(
            "Inference-Header-Content-Length is 0, which marks a raw request; "
            "that needs a model with exactly one input: send the JSON part and its length"
        )
    if not body:
        raise MalformedRequest(f"the raw request is empty; its body must be the bytes of input '{spec.name}'")
    if spec.datatype == "BYTES":  # one element: the body, without a length before it
        body = memoryview(len(body).to_bytes(4, "little") + body)
        shape = _raw_shape(spec, 1)
    else:
        shape = _raw_shape(spec, len(body) // NUMPY_DTYPE[spec.datatype].itemsize)
    array = from_binary(spec.name, spec.datatype, shape, body, 0, len(body))
    return Decoded(InferRequest({spec.name: array}), _ALL_BINARY)


def _raw_shape(spec: TensorSpec, count: int) -> list[int]:
    """Fill the variable axes of the only input so that it holds ``count`` elements, as far as that is unambiguous."""
    shape = spec.protocol_shape
    if shape.count(-1) == 2 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise MalformedRequest(
            f"input '{spec.name}' has shape {spec.protocol_shape}; a raw request can leave one axis open "
            "behind the batch axis: send the JSON part with the shape"
        )
    if -1 in shape:
        fixed = element_count(spec.name, [size for size in shape if size != -1])
        shape[shape.index(-1)] = max(count // max(fixed, 1), 1)
    return shape


def _dump(head: dict[str, Any]) -> bytes:
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" not in text:
        return text
    # orjson writes NaN and infinities as null; nothing else in the message can be null, save a word in some string.
    for output in head["outputs"]:
        data = output.get("data")
        if isinstance(data, np.ndarray) and not np.isfinite(data).all():
            output["data"] = orjson.Fragment(write_numbers(data))
    return orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)


def _refuse_shared_memory(what: str, name: str) -> NoReturn:
    raise MalformedRequest(
        f"{what} '{name}' names a shared_memory_region; shared memory is not served: use data or binary_data_size"
    )


_ALL_BINARY: Final = ReplyFormat(True)
_ALL_JSON: Final = ReplyFormat(False)
