"""A raw HTTP/1.1 connection for load generators: prebuilt requests out, answers in, one at a time."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

_END_OF_HEAD = b"\r\n\r\n"
_MOST_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a request.

    Attributes:
        status: HTTP status.
        head: Status line and headers.
        body: The body.
    """

    status: int
    head: bytes
    body: bytes


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        answered: Called with each answer.
        lost: Called once when the connection is gone, with whether a request was under way.
    """

    def __init__(self, answered: "Callable[[Connection, Answer], None]", lost: "Callable[[Connection, bool], None]"):
        self._answered, self._lost = answered, lost
        self._transport: asyncio.WriteTransport | None = None
        self._buffer = bytearray()
        self._waiting = False

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Connect to a server.

        Raises:
            OSError: If it cannot be reached.
        """
        await asyncio.get_running_loop().create_connection(lambda: self, host, port, ssl=tls)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # Not checked: uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def send(self, request: bytes) -> None:
        """Send a complete request; the one before must have been answered."""
        if self._transport is not None:
            self._waiting = True
            self._transport.write(request)

    def close(self) -> None:
        """Close it; a request under way counts as lost."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Collect an answer."""
        self._buffer += data
        end = self._buffer.find(_END_OF_HEAD)
        if end < 0:
            if len(self._buffer) > _MOST_HEAD_BYTES:
                self.close()
            return
        head = bytes(self._buffer[:end])
        start = end + len(_END_OF_HEAD)
        total = start + int(header_of(head, b"content-length") or b"0")
        if len(self._buffer) < total:
            return
        answer = Answer(int(head[9:12]), head, bytes(self._buffer[start:total]))
        del self._buffer[:total]
        self._waiting = False
        self._answered(self, answer)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (the protocol's interface)
        """Tell that it is gone."""
        self._transport = None
        self._lost(self, self._waiting)


def header_of(head: bytes, name: bytes) -> bytes:
    """Return the value of a header, empty when it is missing.

    Args:
        head: Status line and headers.
        name: In lower case.
    """
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        start = head.lower().find(b"\r\n" + name + b":")
        if start < 0:
            return b""
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else len(head)].strip()
