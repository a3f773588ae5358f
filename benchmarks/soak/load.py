"""The soak's load generator: a closed loop on raw connections, of which a share leaves at a random point.

``python -m benchmarks.soak.load`` reads a ``SoakLoad`` as msgpack from stdin. It writes lines of JSON to stdout: how
many requests are done, whenever another ``SoakLoad.report_every`` are, and a ``SoakOutcome`` at the end.
"""

import asyncio
import contextlib
import random
import socket
import sys
import time
from bisect import bisect
from collections import Counter
from itertools import accumulate
from typing import cast

import msgspec
import numpy as np
import uvloop

from benchmarks.soak.mix import Item
from loadtests.connection import header_of

NAMES = 100_000
OPTION_SHARES = {"client": 0.3, "priority": 0.1, "timeout": 0.05, "variant": 0.03}
LEAVING_POINTS = ("body", "wait", "answer")
# Until it leaves after its request; the last is longer than the server takes to look whether a waiting client left.
LEAVING_AFTER_S = (0.0002, 0.0002, 0.001, 0.12)
ANSWER_TIMEOUT_S = 60.0
# One connection of so many reads through a small window: large answers wait in the server.
_NARROW_EVERY, _NARROW_BYTES = 4, 16 * 1024
_TOLERANCE = 1e-4
# At first every item comes so many times: what a server makes for the first request of a kind is made in the warm-up.
_ROUNDS = 4
_MOST_FAULTS = 20
_END_OF_HEAD = b"\r\n\r\n"


class SoakLoad(msgspec.Struct, frozen=True):
    """What to send.

    Attributes:
        host: Address of the server.
        port: Its TCP port.
        requests: How many.
        leaving: Share of them whose client leaves.
        connections: How many are in flight.
        items: What they are made of.
        report_every: Requests between two reports.
        seed: Of all choices.
    """

    host: str
    port: int
    requests: int
    leaving: float
    connections: int
    items: list[Item]
    report_every: int
    seed: int = 0


class SoakOutcome(msgspec.Struct, frozen=True):
    """What came back.

    Attributes:
        seconds: From the first connection to the last answer.
        answered: Code -> answers.
        left: Point -> clients that left there; those whose answer came first are counted as answered.
        checked: Answers whose numbers were compared.
        faulty: Answers that were wrong, or not what the request may get; connections that were closed; no answer.
        faults: The first of them.
    """

    seconds: float
    answered: dict[str, int]
    left: dict[str, int]
    checked: int
    faulty: int
    faults: list[str]


class _Asked(msgspec.Struct):
    """A request that is under way; ``leaves`` is the point at which its client does, empty if it stays."""

    item: Item
    scale: float
    codes: tuple[str, ...]
    leaves: str


class Soak:
    """Makes the requests of one load and takes their answers."""

    def __init__(self, load: SoakLoad) -> None:
        self.load, self.random = load, random.Random(load.seed)
        self.begun = self.done = self.checked = self.faulty = 0
        self.answered: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.faults: list[str] = []
        self.finished = asyncio.get_running_loop().create_future()
        self._shares = list(accumulate(item.share for item in load.items))
        self._right: set[tuple[int, bytes]] = set()

    def next(self) -> tuple[_Asked, bytes] | None:
        """Make a request; ``None`` when there have been enough."""
        if self.begun == self.load.requests:
            return None
        self.begun += 1
        draw = self.random.random
        items = self.load.items
        if self.begun <= _ROUNDS * len(items):
            item = items[self.begun % len(items)]
        else:
            item = items[bisect(self._shares, draw() * self._shares[-1], hi=len(self._shares) - 1)]
        start, codes = item.start, item.codes
        if b"%d" in start:
            start %= self.begun
        if item.takes_options:
            start, codes = self._with_options(start, codes)
        body, scale = item.body, 1.0
        if item.tensor:
            scale = 0.5 + draw()
            body += (np.frombuffer(item.tensor, np.float32) * np.float32(scale)).tobytes()
        leaves = self.random.choice(LEAVING_POINTS) if draw() < self.load.leaving else ""
        return _Asked(item, scale, codes, leaves), b"%bContent-Length: %d\r\n\r\n%b" % (start, len(body), body)

    def _with_options(self, start: bytes, codes: tuple[str, ...]) -> tuple[bytes, tuple[str, ...]]:
        draw, choose = self.random.random, self.random.randrange
        if draw() < OPTION_SHARES["client"]:
            start += b"slipstream-client: client-%d\r\n" % choose(NAMES)
        if draw() < OPTION_SHARES["priority"]:
            start += b"slipstream-priority: %d\r\n" % (1 + choose(9))
        if draw() < OPTION_SHARES["variant"]:
            start += b"slipstream-variant: unoptimized\r\n"
        if draw() < OPTION_SHARES["timeout"]:
            start += b"slipstream-timeout-ms: %.1f\r\n" % 10 ** (-0.5 + 2.5 * draw())  # 0.3 to 100
            codes = (*codes, "deadline_unmeetable", "deadline_expired")
        return start, codes

    def take(self, asked: _Asked, head: bytes, body: bytes) -> None:
        """Take an answer."""
        code = "ok" if head[9:12] == b"200" else _code_of(body)
        self.answered[code] += 1
        if code not in asked.codes:
            self.fault(f"{code} for {asked.item.start[:100]!r}: {head[9:12]!r} {body[:300]!r}")
        elif code == "ok" and asked.item.expected:
            self._check(asked, head, body)
        self.count()

    def leave(self, asked: _Asked) -> None:
        """Count a client that left."""
        self.left[asked.leaves] += 1
        self.count()

    def fault(self, text: str) -> None:
        """Note what must not happen."""
        self.faulty += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(text)

    def count(self) -> None:
        """Count a request that is over, one way or the other."""
        self.done += 1
        if self.done % self.load.report_every == 0:
            sys.stdout.write(f"{self.done}\n")
            sys.stdout.flush()
        if self.done == self.load.requests and not self.finished.done():
            self.finished.set_result(None)

    def _check(self, asked: _Asked, head: bytes, body: bytes) -> None:
        self.checked += 1
        key = (id(asked.item), body)
        if not asked.item.tensor and key in self._right:
            return
        expected = np.frombuffer(asked.item.expected, np.float32)
        got = _output_of(head, body)
        scale = np.float32(asked.scale)
        if got.size != expected.size or np.abs(got / scale - expected).max() > _TOLERANCE * np.abs(expected).max():
            self.fault(f"a wrong answer to {asked.item.start[:100]!r}: {body[:300]!r}")
        elif not asked.item.tensor:
            self._right.add(key)


class _Client(asyncio.Protocol):
    """One connection with one request in flight at a time; when it has left, another one takes its place."""

    def __init__(self, soak: Soak, number: int) -> None:
        self._soak, self._number = soak, number
        self._buffer = bytearray()
        self._total_bytes = self._head_bytes = 0
        self._asked: _Asked | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's do not derive from asyncio's
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._asked is not None:
            self._soak.fault(f"the server closed a connection on {self._asked.item.start[:100]!r}: {exc}")
            self._soak.count()
            self._asked = None
        self._end()

    def data_received(self, data: bytes) -> None:
        asked = self._asked
        if asked is None or asked.leaves == "body":  # an early refusal does not make half a request a whole one
            return
        if asked.leaves == "answer":
            self._leave_later(LEAVING_AFTER_S[0])
            return
        buffer = self._buffer
        buffer += data
        if not self._total_bytes:
            end = buffer.find(_END_OF_HEAD)
            if end < 0:
                return
            self._head_bytes = end + len(_END_OF_HEAD)
            self._total_bytes = self._head_bytes + int(header_of(bytes(buffer[:end]), b"content-length") or b"0")
        if len(buffer) < self._total_bytes:
            return
        head, body = bytes(buffer[: self._head_bytes]), bytes(buffer[self._head_bytes : self._total_bytes])
        del buffer[: self._total_bytes]
        self._total_bytes = 0
        self._asked = None
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self._soak.take(asked, head, body)
        if header_of(head, b"connection") == b"close":
            self._close(abort=False)
        else:
            self._send()

    def _send(self) -> None:
        taken = self._soak.next()
        if taken is None or self._transport is None:
            self._close(abort=False)
            return
        self._asked, request = taken
        leaves, draw = self._asked.leaves, self._soak.random
        if leaves == "body":
            request = request[: draw.randrange(1, len(request))]
        self._transport.write(request)
        if leaves == "body":
            self._leave_later(LEAVING_AFTER_S[0])
        elif leaves == "wait":
            self._leave_later(draw.choice(LEAVING_AFTER_S))

    def _leave_later(self, delay_s: float) -> None:
        if self._leaving is None and self._transport is not None:
            if self._asked is not None and self._asked.leaves == "answer":
                cast(asyncio.ReadTransport, self._transport).pause_reading()
            self._leaving = asyncio.get_running_loop().call_later(delay_s, self._leave)

    def _leave(self) -> None:
        if self._asked is not None:
            self._soak.leave(self._asked)
            self._asked = None
            self._close(abort=self._soak.random.random() < 0.5)

    def _close(self, abort: bool) -> None:
        """Close with a reset, or in the usual way, which tells the server less."""
        if self._transport is not None:
            if abort:
                self._transport.abort()
            else:
                self._transport.close()

    def _end(self) -> None:
        if not self.is_over:
            self.is_over = True
            if self._soak.begun < self._soak.load.requests:
                task = asyncio.get_running_loop().create_task(connect(self._soak, self._number))
                _connecting.add(task)
                task.add_done_callback(_connecting.discard)


_connecting: set["asyncio.Task[None]"] = set()


async def connect(soak: Soak, number: int) -> None:
    """Open a connection, which begins to send."""
    load = soak.load
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setblocking(False)
    if number % _NARROW_EVERY == 0:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW_BYTES)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(opened, (load.host, load.port))
    await loop.create_connection(lambda: _Client(soak, number), sock=opened)


async def generate(load: SoakLoad) -> SoakOutcome:
    """Send the load and wait for the last answer.

    Raises:
        OSError: If the server cannot be reached.
    """
    started_s = time.perf_counter()
    soak = Soak(load)
    await asyncio.gather(*(connect(soak, number) for number in range(load.connections)))
    done = -1
    while not soak.finished.done() and done != soak.done:
        done = soak.done
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await asyncio.shield(soak.finished)
    for _ in range(load.requests - soak.done):
        soak.fault(f"no answer in {ANSWER_TIMEOUT_S:g} s")
    seconds = time.perf_counter() - started_s
    return SoakOutcome(seconds, dict(soak.answered), dict(soak.left), soak.checked, soak.faulty, soak.faults)


def _code_of(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unreadable"


def _output_of(head: bytes, body: bytes) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Return the only output of an answer, flat."""
    length = header_of(head, b"inference-header-content-length")
    if length:
        return np.frombuffer(body, np.float32, offset=int(length))
    return np.array(msgspec.json.decode(body)["outputs"][0]["data"], np.float32)


def main() -> None:
    """Run one load."""
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=SoakLoad)
    outcome = uvloop.run(generate(load))
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    main()
