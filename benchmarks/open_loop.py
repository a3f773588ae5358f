"""An open-loop load generator: requests leave when they are due, however late the answers are.

``python -m benchmarks.open_loop`` reads an ``OpenLoad`` as JSON from stdin and writes an ``OpenOutcome`` to stdout.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter, deque

import msgspec
import uvloop

from benchmarks.cpu import tree_cpu_s
from loadtests.connection import Answer, Connection

_LEAST_CONNECTIONS, _MOST_CONNECTIONS = 64, 4096


class OpenLoad(msgspec.Struct, frozen=True):
    """What to send, and when.

    Attributes:
        host: Address of the server.
        port: Its TCP port.
        server_pid: The process whose CPU time is read, with its descendants.
        rate: Requests per second; the gaps between arrivals are exponential (Poisson).
        seconds: How long requests are sent; those in flight are waited for.
        connections: Most requests in flight; more wait in the generator, and their wait counts as latency.
        requests: Complete HTTP/1.1 requests, sent in turn.
        burst: Requests per arrival.
        seed: Of the arrivals.
        drain_s: How long the last answers are waited for.
    """

    host: str
    port: int
    server_pid: int
    rate: float
    seconds: float
    connections: int
    requests: list[bytes]
    burst: int = 1
    seed: int = 0
    drain_s: float = 60.0


def connections_for(rate: float, patience_s: float) -> int:
    """Return so many connections that no request of this rate waits for one before it is late by twice its patience."""
    return min(max(_LEAST_CONNECTIONS, round(2 * rate * patience_s)), _MOST_CONNECTIONS)


class OpenOutcome(msgspec.Struct, frozen=True):
    """What came back.

    Attributes:
        sent: Requests that were due.
        answered: Outcome -> requests: ``ok``, the code of the error that refused it, ``closed`` where the server closed
            the connection instead, ``unanswered``.
        ok_ms: Latency of each good answer since it was due.
        seconds: The span in which requests were due.
        server_cpu_s: CPU time of the server until the last answer; ``client_cpu_s`` that of the generator.
        late_ms: The worst delay of the generator itself in sending what was due and had a connection.
    """

    sent: int
    answered: dict[str, int]
    ok_ms: list[float]
    seconds: float
    server_cpu_s: float
    client_cpu_s: float
    late_ms: float


class _Arrivals:
    """The requests that are due and wait for a connection."""

    def __init__(self, load: OpenLoad) -> None:
        self.load, self.random = load, random.Random(load.seed)
        self.due: deque[float] = deque()
        self.idle: list[Connection] = []
        self._due_s: dict[Connection, float] = {}
        self.sent = self.open = 0
        self.late_s = 0.0
        self.answered: Counter[str] = Counter()
        self.ok_ms: list[float] = []
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over = False
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Let requests become due, then wait for the last answer."""
        start_s = at_s = time.perf_counter()
        while at_s < start_s + self.load.seconds:
            at_s += self.random.expovariate(self.load.rate / self.load.burst)
            pause_s = at_s - time.perf_counter()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            for _ in range(self.load.burst):
                self.sent += 1
                self.open += 1
                if self.idle:
                    self.late_s = max(self.late_s, time.perf_counter() - at_s)
                    self._send(self.idle.pop(), at_s)
                else:
                    self.due.append(at_s)
        self._over = True
        if self.open:
            await asyncio.wait([self.finished], timeout=self.load.drain_s)
            if self.open:
                self.answered["unanswered"] += self.open

    async def connect(self) -> None:
        """Open one connection, and use it."""
        connection = Connection(self._answered, self._lost)
        with contextlib.suppress(OSError):  # fewer connections are left; the requests wait for those
            await connection.open(self.load.host, self.load.port)
            self.use(connection)

    def use(self, connection: Connection) -> None:
        """Give a free connection the next request that is due."""
        if self.due:
            self._send(connection, self.due.popleft())
        else:
            self.idle.append(connection)

    def finish(self, outcome: str) -> None:
        """Count the end of one request."""
        self.answered[outcome] += 1
        self.open -= 1
        if self._over and not self.open and not self.finished.done():
            self.finished.set_result(None)

    def _answered(self, connection: Connection, answer: Answer) -> None:
        """Take an answer, and give its connection the next request that is due."""
        outcome = "ok" if answer.status == 200 else _code_of(answer)
        if outcome == "ok":
            self.ok_ms.append((time.perf_counter() - self._due_s[connection]) * 1e3)
        self.finish(outcome)
        self.use(connection)

    def _lost(self, connection: Connection, waiting: bool) -> None:
        """Take note of a closed connection, and open another one in its place."""
        if waiting:
            self.finish("closed")
        elif connection in self.idle:
            self.idle.remove(connection)
        self._opening.add(task := asyncio.create_task(self.connect()))
        task.add_done_callback(self._opening.discard)

    def _send(self, connection: Connection, due_s: float) -> None:
        self._due_s[connection] = due_s
        connection.send(self._next())

    def _next(self) -> bytes:
        return self.load.requests[(self.sent + len(self.ok_ms)) % len(self.load.requests)]


def _code_of(answer: Answer) -> str:
    try:
        return str(msgspec.json.decode(answer.body)["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return str(answer.status)


async def generate(load: OpenLoad) -> OpenOutcome:
    """Send the load.

    Raises:
        ConnectionError: If no connection can be opened.
    """
    arrivals = _Arrivals(load)
    for _ in range(load.connections):
        await arrivals.connect()
    if not arrivals.idle:
        raise ConnectionError(f"nothing listens on {load.host} port {load.port}")
    server_cpu_s, client_cpu_s = tree_cpu_s(load.server_pid), time.process_time()
    await arrivals.run()
    return OpenOutcome(
        sent=arrivals.sent,
        answered=dict(arrivals.answered),
        ok_ms=arrivals.ok_ms,
        seconds=load.seconds,
        server_cpu_s=tree_cpu_s(load.server_pid) - server_cpu_s,
        client_cpu_s=time.process_time() - client_cpu_s,
        late_ms=arrivals.late_s * 1e3,
    )


def main() -> None:
    """Run one load."""
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=OpenLoad)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(generate(load))))


if __name__ == "__main__":
    main()
