"""Tensor elements on the wire: JSON arrays and binary data to numpy arrays, and back.

Numbers in JSON go through simdjson straight into a buffer: no Python object per element. Whatever that fast way does
not take (booleans, strings, integers beyond 64 bits, NaN tokens, anything wrong) goes element by element, which is
exact and can name the culprit.

Source: Open Inference Protocol v2, "Tensor Data"; Triton's binary tensor data extension for the binary layout.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from math import prod
from operator import mul
from typing import Any, Final

import msgspec
import numpy as np
import orjson
import simdjson

from server.errors import MalformedRequest
from server.json_numbers import SLICE_NUMBERS, WIDE, flattened, parse_array, write_numbers
from server.tensors import NUMPY_DTYPE, Array

MAX_RANK: Final = 32
MAX_DIMENSION: Final = 2**31 - 1
_BYTES_PREFIX: Final = 4
_SHOWN_CHARACTERS: Final = 60
_SHOWN_BITS: Final = 128

# Element types of parsed JSON that each kind of dtype takes: integers pass as floats, nothing else is converted.
_PYTHON_TYPES: Final[dict[str, frozenset[type]]] = {
    "f": frozenset((int, float)),
    "i": frozenset((int,)),
    "u": frozenset((int,)),
    "b": frozenset((bool,)),
    "O": frozenset((str,)),
}
_JSON_WORDS: Final = {
    "f": "numbers",
    "i": "integers",
    "u": "integers of 0 or more",
    "b": "true or false",
    "O": "strings",
}


def element_count(name: str, shape: Sequence[int]) -> int:
    """Return the number of elements of a shape, after checking that the shape can be real.

    Raises:
        MalformedRequest: If it has more than ``MAX_RANK`` axes, or a size outside 0 to ``MAX_DIMENSION``.
    """
    if len(shape) > MAX_RANK:
        raise MalformedRequest(f"input '{name}' has a shape of {len(shape)} axes; at most {MAX_RANK} are allowed")
    for size in shape:
        if not 0 <= size <= MAX_DIMENSION:
            raise MalformedRequest(
                f"input '{name}' has the size {shown(size)} in its shape; sizes go from 0 to {MAX_DIMENSION}"
            )
    return prod(shape)


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a protocol datatype.

    Raises:
        MalformedRequest: If there is no such datatype.
    """
    dtype = NUMPY_DTYPE.get(datatype)
    if dtype is None:
        raise MalformedRequest(f"input '{name}' has datatype {shown(datatype)}; served are {', '.join(NUMPY_DTYPE)}")
    return dtype


def from_binary(name: str, datatype: str, shape: Sequence[int], body: memoryview, offset: int, size: int) -> Array:
    """Read a tensor of ``size`` bytes at ``offset`` of ``body``.

    Returns:
        An array of ``shape``. It is a view of ``body`` (and then maybe not aligned to its item size), except for BYTES.

    Raises:
        MalformedRequest: If datatype or shape are not valid, if the body ends too early, or if ``size`` is not exactly
            what datatype and shape need.
    """
    dtype = dtype_of(name, datatype)
    count = element_count(name, shape)
    if not 0 <= size <= len(body) - offset:
        raise MalformedRequest(
            f"input '{name}' has binary_data_size {shown(size)}; the body holds {len(body) - offset} more bytes "
            "behind the JSON part, whose length the header Inference-Header-Content-Length gives"
        )
    if datatype == "BYTES":
        return _shaped(name, shape, _split_bytes(name, body[offset : offset + size], count))
    if size != count * dtype.itemsize:
        raise MalformedRequest(
            f"input '{name}' has binary_data_size {size}; "
            f"shape {list(shape)} of {datatype} takes exactly {count * dtype.itemsize} bytes"
        )
    if datatype == "BOOL" and size and max(body[offset : offset + size]) > 1:
        raise MalformedRequest(f"input '{name}' is BOOL and holds a byte other than 0 and 1")
    try:
        return np.ndarray(shape, dtype, body, offset)
    except ValueError as exc:
        raise _impossible(name, shape, exc) from exc


def from_json(name: str, datatype: str, shape: Sequence[int], data: object) -> Array:
    """Read a tensor from its JSON ``data``.

    ``data`` is ``msgspec.Raw`` holding the JSON text, or a parsed value: one flat array in row-major order, or arrays
    nested exactly as ``shape``; or it is what ``read_numbers`` made of it.

    Returns:
        An array of ``shape``.

    Raises:
        MalformedRequest: If datatype or shape are not valid, if the datatype has no JSON form (FP16), if the elements
            are not exactly as many as ``shape`` says, or if one has another type or is out of range.
    """
    dtype = dtype_of(name, datatype)
    count = element_count(name, shape)
    if datatype == "FP16":
        raise MalformedRequest(f"input '{name}' is FP16, which JSON cannot carry; send it as binary data")
    if isinstance(data, np.ndarray):
        return _shaped(name, shape, data)
    if isinstance(data, msgspec.Raw):
        if dtype.kind in WIDE and (numbers := _numbers(bytes(data), dtype, shape, count)) is not None:
            return _shaped(name, shape, numbers)
        data = _parsed(name, data)
    elements = _flat(name, data, shape, count)
    _check_types(name, datatype, elements, dtype.kind)
    return _shaped(name, shape, _array(name, datatype, elements, dtype))


def to_json(name: str, array: Array) -> Array | list[str] | orjson.Fragment:
    """Return a tensor's elements, flat and row-major, for orjson to write; long arrays are written already.

    Raises:
        MalformedRequest: If the tensor has no JSON form: FP16, or BYTES that are no UTF-8.
    """
    if array.dtype.kind == "O":
        try:
            return [element.decode() for element in array.ravel().tolist()]
        except UnicodeDecodeError as exc:
            raise MalformedRequest(
                f"output '{name}' holds bytes that are no UTF-8, which JSON cannot carry; "
                "ask for it with binary_data true"
            ) from exc
    if array.dtype == np.float16:
        raise MalformedRequest(f"output '{name}' is FP16, which JSON cannot carry; ask for it with binary_data true")
    flat = array.ravel()
    return flat if len(flat) <= SLICE_NUMBERS else orjson.Fragment(write_numbers(flat))


def to_binary(array: Array) -> bytes | memoryview:
    """Write a tensor's elements, row-major and little-endian; a view of ``array`` where it is contiguous."""
    if array.dtype.kind == "O":
        elements: list[bytes] = array.ravel().tolist()
        return b"".join(chain.from_iterable((len(e).to_bytes(_BYTES_PREFIX, "little"), e) for e in elements))
    if not array.size:
        return b""
    return array.ravel().data.cast("B")


def shown(value: object) -> str:
    """Return a value as an error message shows it: short, whatever the client sent."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _split_bytes(name: str, buffer: memoryview, count: int) -> Array:
    if len(buffer) < count * _BYTES_PREFIX:  # before anything of that many elements is allocated
        raise MalformedRequest(
            f"input '{name}' has {len(buffer)} bytes for {count} elements, each with a 4-byte length"
        )
    elements = np.empty(count, np.object_)
    position = 0
    for index in range(count):
        start = position + _BYTES_PREFIX
        position = start + int.from_bytes(buffer[start - _BYTES_PREFIX : start], "little")
        if start > len(buffer) or position > len(buffer):
            raise MalformedRequest(
                f"element {index} of input '{name}' ends behind the {len(buffer)} bytes of the tensor"
            )
        elements[index] = bytes(buffer[start:position])
    if position != len(buffer):
        raise MalformedRequest(
            f"input '{name}' has {len(buffer) - position} bytes left over behind its {count} elements"
        )
    return elements


def _numbers(text: bytes, dtype: np.dtype[Any], shape: Sequence[int], count: int) -> Array | None:
    """Read numbers without a Python object each; ``None`` where the exact way must look."""
    parsed = parse_array(text)
    if parsed is None or not _is_regular(text, parsed, shape):
        return None
    numbers = flattened(parsed, dtype)
    return numbers if numbers is not None and len(numbers) == count else None


def _is_regular(text: bytes, parsed: simdjson.Array, shape: Sequence[int]) -> bool:
    # simdjson flattens whatever it finds, so count the brackets and measure every row.
    if text.find(b"[", 1) < 0:  # much faster than counting
        return True
    return text.count(b"[") == sum(accumulate(shape[:-1], mul, initial=1)) and _is_nested(parsed, shape)


def _is_nested(rows: simdjson.Array, shape: Sequence[int]) -> bool:
    if len(rows) != shape[0]:
        return False
    return len(shape) == 1 or all(isinstance(row, simdjson.Array) and _is_nested(row, shape[1:]) for row in rows)


def _parsed(name: str, text: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as exc:
        raise MalformedRequest(f"the data of input '{name}' cannot be read: {exc}") from exc


def _flat(name: str, data: object, shape: Sequence[int], count: int) -> list[Any]:
    if isinstance(data, list) and len(data) == count and list not in set(map(type, data)):
        return data
    rows: list[Any] = [data]
    for size in shape:
        for row in rows:
            if not isinstance(row, list) or len(row) != size:
                seen = f"{len(row)} elements" if isinstance(row, list) else shown(row)
                raise MalformedRequest(
                    f"the data of input '{name}' has {seen} where shape {list(shape)} wants {size}; "
                    f"give {count} elements in one flat array, or nested exactly as the shape"
                )
        rows = list(chain.from_iterable(rows))
    return rows


def _check_types(name: str, datatype: str, elements: list[Any], kind: str) -> None:
    allowed = _PYTHON_TYPES[kind]
    if set(map(type, elements)) <= allowed:
        return
    index, element = next((i, e) for i, e in enumerate(elements) if type(e) not in allowed)
    raise MalformedRequest(
        f"element {index} of input '{name}' is {shown(element)}; {datatype} takes {_JSON_WORDS[kind]}"
    )


def _array(name: str, datatype: str, elements: list[Any], dtype: np.dtype[Any]) -> Array:
    try:
        if dtype.kind == "O":
            array: Array = np.empty(len(elements), dtype)
            array[:] = [element.encode() for element in elements]
            return array
        with np.errstate(over="raise"):
            return np.array(elements, dtype)
    except (OverflowError, FloatingPointError) as exc:
        limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        raise MalformedRequest(
            f"input '{name}' has an element out of the range of {datatype}, {limits.min} to {limits.max}"
        ) from exc
    except UnicodeEncodeError as exc:
        raise MalformedRequest(f"input '{name}' has a string that is not valid Unicode: {exc.reason}") from exc


def _shaped(name: str, shape: Sequence[int], elements: Array) -> Array:
    try:
        return elements.reshape(shape)
    except ValueError as exc:
        raise _impossible(name, shape, exc) from exc


def _impossible(name: str, shape: Sequence[int], reason: Exception) -> MalformedRequest:
    # Without elements any sizes pass for a shape, until their product is beyond what numpy can hold.
    return MalformedRequest(f"input '{name}' has the impossible shape {list(shape)}: {reason}")
