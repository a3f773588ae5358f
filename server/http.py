"""HTTP bodies in and answers out, and the one form of every error answer.

Source: RFC 9110 (content codings, Retry-After, Allow).
"""

import asyncio
import logging
import math
import zlib
from collections.abc import Iterable, Mapping

import msgspec
import orjson
from starlette.types import Receive, Send

from server.errors import (
    BodyTooLarge,
    MalformedRequest,
    NotFound,
    Refused,
    SlipstreamError,
    Unavailable,
    UnsupportedEncoding,
)

logger = logging.getLogger(__name__)

JSON = b"application/json"
# Parts of an answer up to this size are joined: one small copy is cheaper than another ``send``.
JOINED_BYTES = 64 * 1024
RETRY_UNAVAILABLE_S = 1
METHOD_NOT_ALLOWED = "method_not_allowed"
_ENCODINGS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_Headers = list[tuple[bytes, bytes]]


class Answer(msgspec.Struct, frozen=True):
    """A complete HTTP answer; ``parts`` are sent one after the other."""

    status: int
    headers: _Headers
    parts: list[bytes | memoryview]


class ClientLeft(Exception):
    """The client closed its connection before it was answered; nobody reads an answer."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int) -> bytes:
    """Read a request body, decompressed.

    Raises:
        BodyTooLarge: As soon as ``Content-Length``, the bytes that came, or their decompressed size exceed the limit.
        UnsupportedEncoding: If ``Content-Encoding`` is none of gzip, deflate and identity.
        MalformedRequest: If the compressed bytes are damaged.
        ClientLeft: If the client closed the connection before the end.
    """
    length = headers.get(b"content-length")
    if length is not None and int(length) > limit_bytes:
        raise _too_large(f"is {int(length)} bytes", limit_bytes)
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity" and encoding not in _ENCODINGS:
        raise UnsupportedEncoding(f"Content-Encoding is {encoding.decode('latin-1')!r}; use gzip, deflate or none")
    body = await _read_all(receive, limit_bytes)
    if encoding == b"identity":
        return body
    # In a thread: a few compressed kilobytes may hold many megabytes, and zlib releases the GIL.
    return await asyncio.get_running_loop().run_in_executor(None, _decompress, body, encoding, limit_bytes)


async def _read_all(receive: Receive, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    seen_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk: bytes = message.get("body", b"")
        seen_bytes += len(chunk)
        if seen_bytes > limit_bytes:
            raise _too_large(f"has {seen_bytes} bytes so far", limit_bytes)
        if not message.get("more_body", False):
            if not chunks:
                return chunk
            chunks.append(chunk)
            return b"".join(chunks)
        chunks.append(chunk)


def _decompress(body: bytes, encoding: bytes, limit_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(_ENCODINGS[encoding])
    try:
        plain = decompressor.decompress(body, limit_bytes + 1)
    except zlib.error as exc:
        raise MalformedRequest(f"the body is not valid {encoding.decode()} data: {exc}") from exc
    if len(plain) > limit_bytes:
        raise _too_large(f"decompresses to more than {limit_bytes} bytes", limit_bytes)
    if not decompressor.eof or decompressor.unused_data:
        wrong = "goes on after its end" if decompressor.eof else "is truncated"
        raise MalformedRequest(f"the {encoding.decode()} body {wrong}")
    return plain


def _too_large(seen: str, limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body {seen}; this server takes {limit_bytes} (set --max-body-bytes)")


async def send_answer(send: Send, answer: Answer) -> None:
    """Send an answer, small parts in one piece and large ones without another copy."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    parts = answer.parts
    if len(parts) > 1 and sum(len(part) for part in parts) <= JOINED_BYTES:
        parts = [b"".join(parts)]
    last = len(parts) - 1
    for index, part in enumerate(parts):
        await send({"type": "http.response.body", "body": part, "more_body": index < last})


def error_answer(status: int, code: str, text: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Answer:
    """Make the answer that every error has: ``{"error": text, "code": code}``."""
    # The text may repeat what a client sent; a lone surrogate in it has no UTF-8 form.
    body = orjson.dumps({"error": text.encode(errors="replace").decode(), "code": code})
    return Answer(status, [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), *headers], [body])


def answer_of(error: Exception, *, expects_continue: bool = False) -> Answer:
    """Make the answer to an exception; one that is no ``SlipstreamError`` is logged and its text kept from the client.

    Args:
        error: What was raised.
        expects_continue: The client waits for ``100 Continue`` and, refused, may or may not send the body: then the
            connection cannot be used again.
    """
    if not isinstance(error, SlipstreamError):
        logger.error("internal error", exc_info=error)
        return internal_error()
    headers: _Headers = []
    if isinstance(error, Refused):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    elif isinstance(error, Unavailable):
        headers.append((b"retry-after", b"%d" % RETRY_UNAVAILABLE_S))
    if expects_continue:
        headers.append((b"connection", b"close"))
    return error_answer(error.status, error.code, str(error), headers)


def internal_error() -> Answer:
    """Make the answer to a defect of the server, whose text stays in the log."""
    return error_answer(SlipstreamError.status, SlipstreamError.code, "internal error; see the server log")


def method_not_allowed(allowed: str) -> Answer:
    """Make the answer to a wrong method."""
    text = f"method not allowed; this path takes {allowed}"
    return error_answer(405, METHOD_NOT_ALLOWED, text, [(b"allow", allowed.encode())])


def not_found(path: str) -> Answer:
    """Make the answer to an unknown path."""
    return error_answer(404, NotFound.code, f"no such path: {path}; see /docs")
