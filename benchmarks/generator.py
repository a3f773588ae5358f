"""A closed-loop load generator that costs little: prebuilt requests on raw connections, in a process of its own.

``python -m benchmarks.generator`` reads a ``Load`` as JSON from stdin and writes an ``Outcome`` as JSON to stdout.
"""

import asyncio
import sys
import time
from collections import Counter

import msgspec
import uvloop

from benchmarks.cpu import tree_cpu_s
from loadtests.connection import Answer, Connection, header_of

# Beyond this many different answers the rest is counted only.
_MOST_ANSWERS = 4096


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

    def count(self, index: int, answer: Answer, latency_s: float) -> None:
        """Take one answer."""
        self.latencies_ms.append(latency_s * 1e3)
        self.variants[header_of(answer.head, b"slipstream-variant")] += 1
        key = (index, answer.status, answer.body)
        if key not in self._json_lengths:
            if len(self._json_lengths) >= _MOST_ANSWERS:
                self.unchecked += 1
                return
            self._json_lengths[key] = header_of(answer.head, b"inference-header-content-length")
        self._answers[key] += 1

    def seen(self) -> list[SeenAnswer]:
        """Return the different answers."""
        return [
            SeenAnswer(index, status, int(length) if (length := self._json_lengths[key]) else None, body, count)
            for key, count in self._answers.items()
            for index, status, body in [key]
        ]


class Client:
    """One connection with one request in flight at a time."""

    def __init__(self) -> None:
        self.connection = Connection(self._answered, self._lost)
        self._index, self._sent_s = 0, 0.0
        self._tally: Tally | None = None
        self._idle: asyncio.Future[None] | None = None

    def start(self, tally: Tally) -> "asyncio.Future[None]":
        """Send requests until the tally has no more; the future is done with the last answer.

        It fails with ``ConnectionError`` if the server closes the connection: such a server is not measured.
        """
        self._tally = tally
        self._idle = asyncio.get_running_loop().create_future()
        self._send_next(tally)
        return self._idle

    def _answered(self, _connection: Connection, answer: Answer) -> None:
        if self._tally is not None:
            self._tally.count(self._index, answer, time.perf_counter() - self._sent_s)
            self._send_next(self._tally)

    def _lost(self, _connection: Connection, _waiting: bool) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_exception(ConnectionError("the server closed a connection"))

    def _send_next(self, tally: Tally) -> None:
        self._sent_s = time.perf_counter()
        taken = tally.take(self._sent_s)
        if taken is not None:
            self._index, request = taken
            self.connection.send(request)
        elif self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


async def generate(load: Load) -> Outcome:
    """Warm up, then measure; every phase begins and ends with nothing in flight, so that CPU time belongs to requests.

    Raises:
        ConnectionError: If the server closes a connection.
    """
    clients = [Client() for _ in range(load.connections)]
    for client in clients:
        await client.connection.open(load.host, load.port)
    if load.warm_up_s:
        await _phase(clients, Tally(load.requests, time.perf_counter() + load.warm_up_s))
    server_cpu_s, client_cpu_s, started_s = tree_cpu_s(load.server_pid), time.process_time(), time.perf_counter()
    tally = Tally(load.requests, started_s + load.seconds)
    await _phase(clients, tally)
    return Outcome(
        seconds=time.perf_counter() - started_s,
        client_cpu_s=time.process_time() - client_cpu_s,
        server_cpu_s=tree_cpu_s(load.server_pid) - server_cpu_s,
        latencies_ms=tally.latencies_ms,
        answers=tally.seen(),
        unchecked=tally.unchecked,
        variants={name.decode("latin-1"): count for name, count in tally.variants.items()},
    )


async def _phase(clients: list[Client], tally: Tally) -> None:
    await asyncio.gather(*(client.start(tally) for client in clients))


def main() -> None:
    """Run one load."""
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    outcome = uvloop.run(generate(load))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
