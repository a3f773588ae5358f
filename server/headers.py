"""What this server's own headers say: read from requests, and written to answers.

Source: the Open Inference Protocol's binary tensor data extension for ``Inference-Header-Content-Length``; W3C Server
Timing.
"""

import math
from collections.abc import Mapping

import msgspec

from server.errors import MalformedRequest
from server.http import JSON
from server.serving import How
from server.tensors import PRIORITIES, InferRequest, InferResponse
from server.wire import Encoded


def header_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return the length of a request's JSON part; ``None`` when all of it is JSON.

    Raises:
        MalformedRequest: If it is not a number of bytes.
    """
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 10:
        seen = text.decode("latin-1")
        raise MalformedRequest(f"Inference-Header-Content-Length is {seen!r}; it must be a number of bytes")
    return int(text)


def with_headers(request: InferRequest, headers: Mapping[bytes, bytes]) -> InferRequest:
    """Fill in what the body leaves open from the headers ``slipstream-variant``, ``-timeout-ms``, ``-priority``.

    ``slipstream-client`` names whom the work counts for.

    Raises:
        MalformedRequest: If a header's value is not of its kind.
    """
    variant = headers.get(b"slipstream-variant")
    if variant is not None and not request.variant:
        request = msgspec.structs.replace(request, variant=variant.decode("latin-1"))
    if request.timeout_s is None and (timeout_s := timeout_of(headers)) is not None:
        request = msgspec.structs.replace(request, timeout_s=timeout_s)
    priority = headers.get(b"slipstream-priority")
    if priority is not None and not request.priority:
        request = msgspec.structs.replace(request, priority=_priority(priority))
    client = headers.get(b"slipstream-client")
    if client is not None:
        request = msgspec.structs.replace(request, client=client.decode("latin-1"))
    return request


def _priority(text: bytes) -> int:
    if not text.isdigit() or int(text) not in PRIORITIES:
        raise MalformedRequest(f"slipstream-priority is {text.decode('latin-1')!r}; it is 1 (first) to 9 (last)")
    return int(text)


def timeout_of(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the seconds that ``slipstream-timeout-ms`` gives; ``None`` without one.

    Raises:
        MalformedRequest: If it is no time.
    """
    value = headers.get(b"slipstream-timeout-ms")
    if value is None:
        return None
    text = value.decode("latin-1")
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise MalformedRequest(f"slipstream-timeout-ms is {text!r}; it must be a number of milliseconds above 0")
    return milliseconds / 1e3


def answer_headers(response: InferResponse, encoded: Encoded, how: How, total_s: float) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer: its kind and length, and the account of its run."""
    queue_ms, compute_ms = b"%.3f" % (response.queue_s * 1e3), b"%.3f" % (response.compute_s * 1e3)
    headers = [
        (b"content-type", JSON if encoded.json_length is None else b"application/octet-stream"),
        (b"content-length", b"%d" % sum(map(len, encoded.parts))),
        (b"slipstream-variant", response.variant.encode("latin-1", "replace")),
        (b"slipstream-device", response.device.encode("latin-1", "replace")),
        (b"slipstream-batch-rows", b"%d" % response.batch_rows),
        (b"slipstream-queue-ms", queue_ms),
        (b"slipstream-compute-ms", compute_ms),
        (b"server-timing", b"queue;dur=%b, compute;dur=%b, total;dur=%.3f" % (queue_ms, compute_ms, total_s * 1e3)),
    ]
    if encoded.json_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % encoded.json_length))
    if how != "miss":
        headers.append((b"slipstream-cache", how.encode()))
    return headers
