"""A light load generator without Locust: raw connections in one event loop, for ``slipstream bench``."""

import asyncio
import contextlib
import itertools
import math
import ssl
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from loadtests.connection import Answer, Connection, header_of
from loadtests.objectives import Objective
from loadtests.payloads import PayloadError, difference, read_outputs
from loadtests.shapes import Phase, expovariate, next_arrival
from loadtests.tallies import FAILED, OK, UNANSWERED, Recording, outcome_of
from loadtests.traffic import Exchange, Prepared

DRAIN_S = 10.0
"""How long the last answers of a phase are waited for."""
TOLERANCE = 0.25
"""Allowed deviation of an answer as a share of its magnitude: an INT8 model's answers move with the batch."""
_CHECK_EVERY_S = 0.05
_MOST_CONNECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens.

    Attributes:
        host: Its name or address.
        port: Its TCP port.
        tls: Whether to speak HTTPS.
    """

    host: str
    port: int
    tls: bool

    @classmethod
    def of(cls, url: str) -> "Target":
        """Read it from a URL.

        Raises:
            PayloadError: If it is none of HTTP.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as exc:
            raise PayloadError(f"{url}: {exc}") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PayloadError(f"{url!r} is no address; it looks like http://127.0.0.1:8000")
        return cls(parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https")

    def request(self, path: str, exchange: Exchange) -> bytes:
        """Return a whole HTTP request."""
        payload = exchange.payload
        headers = {"Host": f"{self.host}:{self.port}", **payload.headers, "Content-Length": str(len(payload.body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + payload.body


class Generator:
    """Sends phases of load, one after the other, and counts the answers.

    Args:
        target: The server.
        prepared: What to send.
        objective: By when an answer is in time.

    Attributes:
        recording: What was counted.
        wrong: How answers differed from those before the test, and how connections were lost.
    """

    def __init__(self, target: Target, prepared: Prepared, objective: Objective) -> None:
        self.target, self._objective, self._timeout_ms = target, objective, prepared.kind.timeout_ms
        self.deadline_s = objective.deadline_ms / 1e3
        path = f"{prepared.kind.path}/infer"
        self._requests = itertools.cycle([(target.request(path, each), each) for each in prepared.exchanges])
        self.recording = Recording()
        self.wrong: set[str] = set()
        self._check_at_s = 0.0

    async def run(self, phase: Phase, clients: int) -> None:
        """Send one phase and wait for its answers.

        Args:
            phase: At its rate; as a closed loop if it has none.
            clients: Connections of a closed loop.

        Raises:
            OSError: If the server cannot be reached.
        """
        run = _Open(self, phase) if phase.rate_per_s else _Closed(self, phase, clients)
        try:
            await run.send()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(run.until_idle(), DRAIN_S)
        finally:
            run.end()

    def next(self) -> tuple[bytes, Exchange]:
        """Return the next request."""
        return next(self._requests)

    def count(self, due_s: float, exchange: Exchange, answer: Answer, latency_ms: float) -> None:
        """Count an answer."""
        outcome = outcome_of(answer.status)
        if outcome == OK and (wrong := self._wrong(exchange, answer)):
            outcome = FAILED
            self.wrong.add(wrong)
        elif outcome == FAILED:
            self.wrong.add(f"status {answer.status}: {answer.body[:200].decode('utf-8', 'replace')}")
        tally = self.recording.at(due_s, 0)
        tally.add(outcome, latency_ms, in_time=self._objective.is_in_time(latency_ms, self._timeout_ms))
        if outcome == OK:
            tally.queue_ms += float(header_of(answer.head, b"slipstream-queue-ms") or 0)
            tally.compute_ms += float(header_of(answer.head, b"slipstream-compute-ms") or 0)

    def count_lost(self, due_s: float, outcome: str) -> None:
        """Count a request that got no answer."""
        self.recording.at(due_s, 0).add(outcome, 0.0, in_time=False)
        if outcome == FAILED:
            self.wrong.add("the server closed a connection with a request under way, or answered without a length")

    def _wrong(self, exchange: Exchange, answer: Answer) -> str:
        """Compare an answer now and then; each one would make the generator the bottleneck."""
        if (now := time.perf_counter()) < self._check_at_s:
            return ""
        self._check_at_s = now + _CHECK_EVERY_S
        length = header_of(answer.head, b"inference-header-content-length").decode()
        try:
            return difference(exchange.expected, read_outputs(answer.body, length or None), TOLERANCE)
        except PayloadError as exc:
            return str(exc)


@dataclass(slots=True)
class _Asked:
    """A request under way: when it was due, in seconds of the test, and what it was."""

    due_s: float
    exchange: Exchange


class _Run:
    """What a closed and an open loop share: connections, requests under way, the clock of a phase."""

    def __init__(self, generator: Generator, phase: Phase) -> None:
        self.generator, self.phase = generator, phase
        self.under_way: dict[Connection, _Asked] = {}
        self._connections: set[Connection] = set()
        self._began_s = time.perf_counter()
        self._over = False
        self._idle = asyncio.Event()
        self._opening: set[asyncio.Task[None]] = set()

    def now_s(self) -> float:
        """Return the time on the clock of the test."""
        return self.phase.start_s + time.perf_counter() - self._began_s

    def start(self) -> None:
        """Begin the phase now."""
        self._began_s = time.perf_counter()

    async def open(self, count: int) -> list[Connection]:
        """Open connections."""
        made = [Connection(self._answered, self._lost) for _ in range(count)]
        target = self.generator.target
        tls = ssl.create_default_context() if target.tls else None
        await asyncio.gather(*(connection.open(target.host, target.port, tls) for connection in made))
        self._connections.update(made)
        return made

    async def until_idle(self) -> None:
        """Wait until no request is under way or due."""
        while self.under_way or self.is_behind():
            self._idle.clear()
            await self._idle.wait()

    def end(self) -> None:
        """Close all connections and count what is without an answer."""
        self._over = True
        for asked in self.under_way.values():
            self.generator.count_lost(asked.due_s, UNANSWERED)
        self.under_way.clear()
        for connection in list(self._connections):
            connection.close()

    def send_on(self, connection: Connection, due_s: float) -> None:
        """Send the next request."""
        request, exchange = self.generator.next()
        self.under_way[connection] = _Asked(due_s, exchange)
        connection.send(request)

    def is_behind(self) -> bool:
        """Whether requests are due that no connection was free for."""
        return False

    async def send(self) -> None:
        """Send requests until the phase is over."""
        raise NotImplementedError

    def free(self, connection: Connection) -> None:
        """Use a connection that has nothing to do."""
        raise NotImplementedError

    def _answered(self, connection: Connection, answer: Answer) -> None:
        asked = self.under_way.pop(connection, None)
        if asked is None:
            return
        self.generator.count(asked.due_s, asked.exchange, answer, (self.now_s() - asked.due_s) * 1e3)
        self.free(connection)
        self._idle.set()

    def _lost(self, connection: Connection, _waiting: bool) -> None:
        self._connections.discard(connection)
        if (asked := self.under_way.pop(connection, None)) is not None:
            self.generator.count_lost(asked.due_s, FAILED)
        self._idle.set()
        if not self._over:
            self._opening.add(task := asyncio.create_task(self._replace()))
            task.add_done_callback(self._opening.discard)

    async def _replace(self) -> None:
        # A server that is gone is seen by what is not answered; the pause keeps the loop from spinning meanwhile.
        await asyncio.sleep(_CHECK_EVERY_S)
        with contextlib.suppress(OSError):
            for connection in await self.open(1):
                self.free(connection)


class _Closed(_Run):
    """Each connection sends again as soon as it is answered."""

    def __init__(self, generator: Generator, phase: Phase, clients: int) -> None:
        super().__init__(generator, phase)
        self._clients = clients

    async def send(self) -> None:
        connections = await self.open(self._clients)
        self.start()
        for connection in connections:
            self.free(connection)
        await asyncio.sleep(self.phase.end_s - self.now_s())

    def free(self, connection: Connection) -> None:
        now_s = self.now_s()
        if now_s < self.phase.end_s and not self._over:
            self.send_on(connection, now_s)


class _Open(_Run):
    """Requests leave when they are due; those that find no free connection wait, and their wait counts."""

    def __init__(self, generator: Generator, phase: Phase) -> None:
        super().__init__(generator, phase)
        self._unused: list[Connection] = []
        self._due: deque[float] = deque()

    async def send(self) -> None:
        patience_s = min(self.generator.deadline_s, 2.0)
        count = min(max(32, round(2 * self.phase.rate_per_s * patience_s)), _MOST_CONNECTIONS)
        self._unused.extend(await self.open(count))
        self.start()
        at_s = self.phase.start_s
        while (due_s := next_arrival(at_s, [self.phase], 1.0, expovariate)) < math.inf:
            at_s = due_s
            if (pause_s := due_s - self.now_s()) > 0:
                await asyncio.sleep(pause_s)
            if self._unused:
                self.send_on(self._unused.pop(), due_s)
            else:
                self._due.append(due_s)

    def free(self, connection: Connection) -> None:
        if self._due:
            self.send_on(connection, self._due.popleft())
        else:
            self._unused.append(connection)

    def is_behind(self) -> bool:
        return bool(self._due)

    def end(self) -> None:
        for due_s in self._due:
            self.generator.count_lost(due_s, UNANSWERED)
        self._due.clear()
        super().end()
