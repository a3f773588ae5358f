"""Long arrays of numbers in JSON text, read and written apart from the rest and without a Python object each.

A JSON parser walks a message byte by byte to find the end of an array that it leaves for later; here that end is the
next bracket, found at the speed of memory. What was cut out is proven to be a flat array of numbers when it is read, so
that the rest with placeholders is valid exactly when the whole is. Anything in doubt is left to the parser.

Both simdjson and orjson hold the GIL, so both work in slices, between which other threads get their turn.
"""

import json
import re
import threading
import time
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import orjson
import simdjson

from server.tensors import Array

# Shorter arrays stay in the message: cutting them out takes longer than it saves.
LONG_BYTES: Final = 6144
# A slice takes about 0.3 ms to read, and as long to write.
SLICE_BYTES: Final = 192 * 1024
SLICE_NUMBERS: Final = 16 * 1024

# How simdjson is asked for each kind of number, and the dtype in which it answers.
WIDE: Final[dict[str, tuple[Literal["d", "i", "u"], np.dtype[Any]]]] = {
    "f": ("d", np.dtype(np.float64)),
    "i": ("i", np.dtype(np.int64)),
    "u": ("u", np.dtype(np.uint64)),
}
_KEY: Final = b'"data"'
_OPENING: Final = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\[')
_MARK: Final = b'{"cut":'


class Cut(NamedTuple):
    """JSON text without its long arrays.

    Attributes:
        rest: The text with ``placeholder(i)`` in the place of array ``i``.
        arrays: What stands between the brackets of each array.
    """

    rest: bytes
    arrays: list[bytes]


def placeholder(index: int) -> bytes:
    """Return what stands for an array that was cut out: JSON that is no tensor data."""
    return b"%b%d}" % (_MARK, index)


def cut_out(text: bytes) -> Cut | None:
    """Cut the long flat arrays behind keys ``data`` out of a JSON text.

    Returns:
        ``None`` if there are none, or if the text itself holds something like a placeholder.
    """
    pieces: list[bytes] = []
    arrays: list[bytes] = []
    position = kept = 0
    while (position := text.find(_KEY, position)) >= 0:
        opening = _OPENING.match(text, position)
        if opening is None:
            position += len(_KEY)
            continue
        start = opening.end()
        position = text.find(b"]", start)
        if position < 0:
            return None
        if position - start >= LONG_BYTES:
            pieces += (text[kept : start - 1], placeholder(len(arrays)))
            arrays.append(text[start:position])
            kept = position + 1
    rest = b"".join((*pieces, text[kept:]))
    return Cut(rest, arrays) if arrays and rest.count(_MARK) == len(arrays) else None


def read_numbers(text: bytes, dtype: np.dtype[Any], count: int) -> Array | None:
    """Read the numbers between the brackets of a JSON array.

    Args:
        text: What stands between the brackets, as cut out: arrays in it are not closed and so are no JSON.
        dtype: A numeric dtype.
        count: How many there should be.

    Returns:
        A new flat array, or ``None`` if the text is not exactly so many numbers that the dtype can hold.
    """
    if dtype.kind not in WIDE or not 0 < count <= len(text):
        return None
    numbers = np.empty(count, dtype)
    filled = start = 0
    while start <= len(text):
        stop = len(text)
        if stop - start > SLICE_BYTES:
            stop = text.rfind(b",", start, start + SLICE_BYTES)
        parsed = None if stop < 0 else parse_array(b"[%b]" % text[start:stop])
        part = None if parsed is None else flattened(parsed, dtype)
        # A slice without a number is a comma too many.
        if part is None or not len(part) or filled + len(part) > count:
            return None
        del parsed
        numbers[filled : filled + len(part)] = part
        filled, start = filled + len(part), stop + 1
        if start <= len(text):
            time.sleep(0)
    return numbers if filled == count else None


def write_numbers(numbers: Array) -> bytes:
    """Write a flat array as JSON, NaN and infinities as the bare tokens ``NaN``, ``Infinity`` and ``-Infinity``."""
    parts: list[bytes] = []
    for start in range(0, len(numbers), SLICE_NUMBERS):
        if start:
            time.sleep(0)
        part = numbers[start : start + SLICE_NUMBERS]
        text = orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)
        if b"null" in text:  # what orjson makes of them
            text = json.dumps(part.tolist()).encode()
        parts.append(text[1:-1])
    return b"[%b]" % b",".join(parts)


def parse_array(text: bytes) -> simdjson.Array | None:
    """Parse a JSON array; ``None`` if it is none, or holds integers beyond 64 bits.

    The result must be dropped before the thread parses the next array, and must not go to another thread.
    """
    parser = _reused.parser if len(text) <= SLICE_BYTES else simdjson.Parser()
    try:
        parsed = parser.parse(text)
    except (ValueError, RuntimeError):
        return None
    return parsed if isinstance(parsed, simdjson.Array) else None


def flattened(parsed: simdjson.Array, dtype: np.dtype[Any]) -> Array | None:
    """Return all numbers of an array and its arrays; ``None`` if there is anything that the dtype cannot hold."""
    kind, wide_dtype = WIDE[dtype.kind]
    try:
        wide: Array = np.frombuffer(parsed.as_buffer(of_type=kind), wide_dtype)
    except (ValueError, TypeError, RuntimeError):
        return None
    return wide if dtype == wide_dtype else _narrow(wide, dtype)


class _Reused(threading.local):
    """A parser for each thread, whose buffers stay for the next array: fresh pages would cost half of the time."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_reused: Final = _Reused()


def _narrow(wide: Array, dtype: np.dtype[Any]) -> Array | None:
    if dtype.kind == "f":
        try:
            with np.errstate(over="raise"):
                return wide.astype(dtype)
        except FloatingPointError:
            return None
    narrow = wide.astype(dtype)
    return narrow if (narrow == wide).all() else None
