"""A closed-loop load generator that costs little: prebuilt requests on raw connections, in a process of its own.

``python -m benchmarks.generator`` reads a ``Load`` as JSON from stdin and writes an ``Outcome`` as JSON to stdout.
"""

import asyncio
import sys
import time
from collections import Counter
from typing import cast

import msgspec
import uvloop

from benchmarks.cpu import tree_cpu_s

# Beyond this many different answers the rest is counted only.
_MOST_ANSWERS = 4096
_END_OF_HEAD = b"\r\n\r\n"


class Load(msgspec.Struct, frozen=True):
    """What to send.

    Attributes:
        host: Address of the server.
        port: Its TCP port.
        server_pid: The process whose CPU time is read, with its descendants.
        connections: Requests in flight.
        seconds: How long new requests are sent; those in flight are waited for.
        warm_up_s: The same before it, not counted.
        requests: Complete HTTP/1.1 requests, sent in turn.
    """

    host: str
    port: int
    server_pid: int
    connections: int
    seconds: float
    warm_up_s: float
    requests: list[bytes]


class SeenAnswer(msgspec.Struct, frozen=True):
    """One of the different answers to one request.

    Attributes:
        request: Its index in ``Load.requests``.
        status: HTTP status.
        json_length: The Inference-Header-Content-Length of the answer; ``None`` without one.
        body: The body.
        count: How often it came.
    """

    request: int
    status: int
    json_length: int | None
    body: bytes
    count: int


class Outcome(msgspec.Struct, frozen=True):
    """What came back.

    Attributes:
        seconds: From the first request to the last answer.
        server_cpu_s: CPU time of the server in that span, ``client_cpu_s`` that of the generator.
        latencies_ms: One per request.
        answers: The different answers; ``unchecked`` more requests were answered with yet other ones.
        variants: Variant named in the answer's headers -> requests.
    """

    seconds: float
    server_cpu_s: float
    client_cpu_s: float
    latencies_ms: list[float]
    answers: list[SeenAnswer]
    unchecked: int
    variants: dict[str, int]


class Tally:
    """Hands out requests until the time is over and collects the answers of one phase."""

    def __init__(self, requests: list[bytes], until_s: float) -> None:
        self._requests, self._until_s = requests, until_s
        self._next = 0
        self.latencies_ms: list[float] = []
        self.unchecked = 0
        self.variants: Counter[bytes] = Counter()
        self._answers: Counter[tuple[int, int, bytes]] = Counter()
        self._json_lengths: dict[tuple[int, int, bytes], bytes] = {}

    def take(self, now: float) -> tuple[int, bytes] | None:
        """Return the next request with its index, or ``None`` when the time is over."""
        if now >= self._until_s:
            return None
        index = self._next % len(self._requests)
        self._next += 1
        return index, self._requests[index]

    def count(self, index: int, head: bytes, body: bytes, latency_s: float) -> None:
        """Take one answer."""
        self.latencies_ms.append(latency_s * 1e3)
        self.variants[header_of(head, b"slipstream-variant")] += 1
        key = (index, int(head[9:12]), body)
        if key not in self._json_lengths:
            if len(self._json_lengths) >= _MOST_ANSWERS:
                self.unchecked += 1
                return
            self._json_lengths[key] = header_of(head, b"inference-header-content-length")
        self._answers[key] += 1

    def seen(self) -> list[SeenAnswer]:
        """Return the different answers."""
        return [
            SeenAnswer(index, status, int(length) if (length := self._json_lengths[key]) else None, body, count)
            for key, count in self._answers.items()
            for index, status, body in [key]
        ]


class Connection(asyncio.Protocol):
    """One connection with one request in flight at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head_bytes = self._total_bytes = 0
        self._index, self._sent_s = 0, 0.0
        self._transport: asyncio.WriteTransport | None = None
        self._tally: Tally | None = None
        self.idle: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # Not checked: uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the phase: a server that closes connections is not measured."""
        if self.idle is not None and not self.idle.done():
            self.idle.set_exception(ConnectionError(f"the server closed a connection: {exc}"))

    def start(self, tally: Tally) -> "asyncio.Future[None]":
        """Send requests until the tally has no more; the future is done with the last answer."""
        self._tally = tally
        self.idle = asyncio.get_running_loop().create_future()
        self._send_next(tally)
        return self.idle

    def data_received(self, data: bytes) -> None:
        """Collect one answer; then send the next request."""
        buffer = self._buffer
        buffer += data
        if not self._total_bytes:
            end = buffer.find(_END_OF_HEAD)
            if end < 0:
                return
            self._head_bytes = end + len(_END_OF_HEAD)
            self._total_bytes = self._head_bytes + int(header_of(bytes(buffer[:end]), b"content-length") or b"0")
        if len(buffer) < self._total_bytes or self._tally is None:
            return
        head, body = bytes(buffer[: self._head_bytes]), bytes(buffer[self._head_bytes : self._total_bytes])
        del buffer[: self._total_bytes]
        self._total_bytes = 0
        self._tally.count(self._index, head, body, time.perf_counter() - self._sent_s)
        self._send_next(self._tally)

    def _send_next(self, tally: Tally) -> None:
        self._sent_s = time.perf_counter()
        taken = tally.take(self._sent_s)
        if taken is None or self._transport is None:
            if self.idle is not None and not self.idle.done():
                self.idle.set_result(None)
            return
        self._index, request = taken
        self._transport.write(request)


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


async def generate(load: Load) -> Outcome:
    """Warm up, then measure; every phase begins and ends with nothing in flight, so that CPU time belongs to requests.

    Raises:
        ConnectionError: If the server closes a connection.
    """
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, load.host, load.port))[1] for _ in range(load.connections)]
    if load.warm_up_s:
        await _phase(connections, Tally(load.requests, time.perf_counter() + load.warm_up_s))
    server_cpu_s, client_cpu_s, started_s = tree_cpu_s(load.server_pid), time.process_time(), time.perf_counter()
    tally = Tally(load.requests, started_s + load.seconds)
    await _phase(connections, tally)
    return Outcome(
        seconds=time.perf_counter() - started_s,
        client_cpu_s=time.process_time() - client_cpu_s,
        server_cpu_s=tree_cpu_s(load.server_pid) - server_cpu_s,
        latencies_ms=tally.latencies_ms,
        answers=tally.seen(),
        unchecked=tally.unchecked,
        variants={name.decode("latin-1"): count for name, count in tally.variants.items()},
    )


async def _phase(connections: list[Connection], tally: Tally) -> None:
    await asyncio.gather(*(connection.start(tally) for connection in connections))


def main() -> None:
    """Run one load."""
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    outcome = uvloop.run(generate(load))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
