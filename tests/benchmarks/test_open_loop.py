"""The open-loop generator against servers that answer, refuse, leave and keep silent."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest

from benchmarks.open_loop import OpenLoad, OpenOutcome, generate

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
REFUSED = b'HTTP/1.1 429 Too Many Requests\r\ncontent-length: 21\r\n\r\n{"code":"queue_full"}'
BARE_ERROR = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
CLOSE, SILENCE = b"close", b""


@pytest.fixture
async def serve() -> AsyncIterator[Callable]:
    """Starts a server that answers its n-th request with ``answers[n % len(answers)]``."""
    servers = []

    async def start(*answers: bytes) -> int:
        count = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            try:
                while True:
                    await reader.readexactly(len(REQUEST))
                    answer = answers[count % len(answers)]
                    count += 1
                    if answer == CLOSE:
                        break
                    writer.write(answer)
            except asyncio.IncompleteReadError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        servers.append(server)
        return server.sockets[0].getsockname()[1]

    yield start
    for server in servers:
        server.close()


async def run(port: int, *, connections: int = 4, burst: int = 1, drain_s: float = 5.0) -> OpenOutcome:
    load = OpenLoad("127.0.0.1", port, os.getpid(), 2000.0, 0.05, connections, [REQUEST], burst, drain_s=drain_s)
    return await generate(load)


async def test_every_request_is_accounted_for(serve: Callable) -> None:
    outcome = await run(await serve(OK, REFUSED, BARE_ERROR))
    assert sum(outcome.answered.values()) == outcome.sent > 0
    assert set(outcome.answered) == {"ok", "queue_full", "503"}
    assert len(outcome.ok_ms) == outcome.answered["ok"]


async def test_bursts_come_together(serve: Callable) -> None:
    outcome = await run(await serve(OK), burst=8)
    assert outcome.sent % 8 == 0


async def test_closed_connection_is_counted_and_replaced(serve: Callable) -> None:
    outcome = await run(await serve(OK, CLOSE), connections=1)
    assert outcome.answered["closed"] > 1
    assert outcome.answered["ok"] > 1
    assert sum(outcome.answered.values()) == outcome.sent


async def test_silence_ends_with_the_drain(serve: Callable) -> None:
    outcome = await run(await serve(OK, SILENCE), connections=2, drain_s=0.01)
    assert outcome.answered["unanswered"] == outcome.sent - outcome.answered["ok"] > 0
