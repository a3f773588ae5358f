"""HTTP bodies in and answers out, and the one form of every error answer.

Source: RFC 9110 (content codings, Retry-After, Allow), RFC 9659 (window of zstd as a content coding).
"""

import asyncio
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
import orjson
from starlette.types import Receive, Send

from server.errors import (
    BodyTooLarge,
    MalformedRequest,
    NotFound,
    Refused,
    RequestTimeout,
    SlipstreamError,
    Unavailable,
    UnsupportedEncoding,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

logger = logging.getLogger(__name__)

JSON = b"application/json"
# Parts of an answer up to this size are joined: one small copy is cheaper than another ``send``.
JOINED_BYTES = 64 * 1024
RETRY_UNAVAILABLE_S = 1
METHOD_NOT_ALLOWED = "method_not_allowed"
# RFC 9659: a zstd window beyond 8 MiB is refused; it would be allocated whatever the size of the content.
_ZSTD_OPTIONS: Final = {int(zstd.DecompressionParameter.window_log_max): 23}
# Decompressors that stop after as many bytes as they are asked for.
_DECOMPRESSORS: Final[dict[bytes, Callable[[], Any]]] = {
    b"gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    b"x-gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    b"deflate": zlib.decompressobj,
    b"zstd": lambda: zstd.ZstdDecompressor(options=_ZSTD_OPTIONS),
}
_IDENTITY = b"identity"
_Headers = list[tuple[bytes, bytes]]


class Answer(msgspec.Struct, frozen=True):
    """A complete HTTP answer; ``parts`` are sent one after the other."""

    status: int
    headers: _Headers
    parts: list[bytes | memoryview]


class ClientLeft(Exception):
    """The client closed its connection before it was answered; nobody reads an answer."""


def check_head(headers: Mapping[bytes, bytes], limit_bytes: int) -> None:
    """Check what the headers of a request say of its body, before it is read.

    Raises:
        BodyTooLarge: If ``Content-Length`` exceeds the limit.
        UnsupportedEncoding: If ``Content-Encoding`` is none of gzip, deflate, zstd and identity.
    """
    length = headers.get(b"content-length")
    if length is not None and int(length) > limit_bytes:
        raise _too_large(f"is {int(length)} bytes", limit_bytes)
    if b"content-encoding" in headers:
        _encoding(headers)


def _encoding(headers: Mapping[bytes, bytes]) -> bytes:
    encoding = headers.get(b"content-encoding", _IDENTITY).strip().lower()
    if encoding != _IDENTITY and encoding not in _DECOMPRESSORS:
        raise UnsupportedEncoding(
            f"Content-Encoding is {encoding.decode('latin-1')!r}; use gzip, deflate, zstd or none"
        )
    return encoding


async def decompressed(body: bytes | bytearray, headers: Mapping[bytes, bytes], limit_bytes: int) -> bytes | bytearray:
    """Return a body as it was before it was compressed as the header ``Content-Encoding`` says.

    Raises:
        BodyTooLarge: As soon as the decompressed size exceeds the limit.
        MalformedRequest: If the compressed bytes are damaged.
    """
    encoding = _encoding(headers)
    if encoding == _IDENTITY:
        return body
    # In a thread: a few compressed kilobytes may hold many megabytes, and decompression releases the GIL.
    return await asyncio.get_running_loop().run_in_executor(None, _decompress, body, encoding, limit_bytes)


async def read_body(receive: Receive, limit_bytes: int) -> bytes | bytearray:
    """Read the body of an ASGI request.

    Raises:
        BodyTooLarge: As soon as it exceeds the limit.
        ClientLeft: If the client closed the connection before the end.
    """
    body = Body(limit_bytes)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body.add(message.get("body", b""))
        if not message.get("more_body", False):
            return body.whole


class Body:
    """A request body while it comes.

    Attributes:
        whole: What has come so far.
    """

    __slots__ = ("_limit_bytes", "whole")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.whole: bytes | bytearray = b""

    def add(self, chunk: bytes) -> None:
        """Add what came.

        Raises:
            BodyTooLarge: If it is more than the limit.
        """
        whole = self.whole
        if len(whole) + len(chunk) > self._limit_bytes:
            raise _too_large(f"has {len(whole) + len(chunk)} bytes so far", self._limit_bytes)
        if not whole:
            self.whole = chunk
        elif isinstance(whole, bytearray):
            # Grown in place: chunks that are kept and joined take fresh pages each, at ten times the time.
            whole += chunk
        else:
            self.whole = bytearray(whole) + chunk


def _decompress(body: bytes | bytearray, encoding: bytes, limit_bytes: int) -> bytes:
    decompressor = _DECOMPRESSORS[encoding]()
    try:
        plain: bytes = decompressor.decompress(body, limit_bytes + 1)
    except (zlib.error, zstd.ZstdError) as exc:
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
        headers.append((b"retry-after", b"%d" % max(RETRY_UNAVAILABLE_S, math.ceil(error.retry_after_s))))
    if expects_continue or isinstance(error, RequestTimeout):
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
