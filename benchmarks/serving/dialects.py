"""What each server is asked with, and how its answers are read."""

import json
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from benchmarks.generator import SeenAnswer
from benchmarks.workloads import (
    Row,
    Workload,
    binary_request,
    flat_answer,
    json_request,
    plain_request,
    post,
    with_header,
)
from server.tensors import Array

PREDICT = "/predict"
Request = Callable[[Workload, Row], bytes]
Read = Callable[[SeenAnswer, Mapping[str, Array]], Array]


class Dialect(msgspec.Struct, frozen=True):
    """One kind of messages.

    Attributes:
        kind: ``json`` or ``binary``.
        request: Makes a complete request of a row.
        read: Takes an answer and the expected outputs; returns all numbers of the answer in their order.
    """

    kind: str
    request: Request
    read: Read = flat_answer


def stacked_request(workload: Workload, row: Row) -> bytes:  # noqa: ARG001  (the interface)
    """Return a row as one array, its inputs side by side on axis 1, for methods that take one argument."""
    rows = np.stack(list(row.values()), axis=1)
    return post(PREDICT, json.dumps({"rows": rows.tolist()}).encode())


def read_stacked(answer: SeenAnswer, expected: Mapping[str, Array]) -> Array:  # noqa: ARG001  (the interface)
    """Read an answer whose outputs lie side by side."""
    return np.array(json.loads(answer.body), np.float64).ravel()


def bytes_request(workload: Workload, row: Row) -> bytes:  # noqa: ARG001  (the interface)
    """Return a row as the bytes of its inputs, one after another."""
    body = b"".join(array.tobytes() for array in row.values())
    return post(PREDICT, body, content_type="application/octet-stream")


def read_bytes(answer: SeenAnswer, expected: Mapping[str, Array]) -> Array:
    """Read the bytes of the outputs, one after another.

    Raises:
        ValueError: If there are more or fewer than expected.
    """
    if len(answer.body) != sum(array.nbytes for array in expected.values()):
        raise ValueError(f"{len(answer.body)} bytes were answered instead of those of {list(expected)}")
    parts, offset = [], 0
    for array in expected.values():
        part = np.frombuffer(answer.body, array.dtype, array.size, offset)
        parts.append(part.astype(np.float64))
        offset += array.nbytes
    return np.concatenate(parts)


def _plain(workload: Workload, row: Row) -> bytes:  # noqa: ARG001  (the interface)
    return plain_request(row)


PROTOCOL_JSON = Dialect("json", json_request)
PROTOCOL_BINARY = Dialect("binary", binary_request)
PLAIN_JSON = Dialect("json", _plain)
STACKED_JSON = Dialect("json", stacked_request, read_stacked)
PLAIN_BYTES = Dialect("binary", bytes_request, read_bytes)


def with_deadline(request: Request, way: str, deadline_ms: float) -> Request:
    """Return what makes the same requests with a deadline.

    Args:
        request: Makes them without.
        way: ``header`` is this server's header, ``parameter`` Triton's request parameter; otherwise there is none.
        deadline_ms: From the arrival.
    """
    if way == "header":
        line = f"slipstream-timeout-ms: {deadline_ms:g}"
        return lambda workload, row: with_header(request(workload, row), line)
    if way == "parameter":
        make: Callable[..., bytes] = request
        return lambda workload, row: make(workload, row, timeout=round(deadline_ms * 1e3))
    return request
