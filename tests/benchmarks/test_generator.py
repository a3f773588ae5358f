"""The load generator against a server that answers in ways that real ones do."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest

from benchmarks.generator import Load, Outcome, SeenAnswer, Tally, generate
from loadtests.connection import Answer

REQUESTS = [b"POST /%d HTTP/1.1\r\nContent-Length: 2\r\n\r\nab" % i for i in range(3)]


@pytest.fixture
async def serve() -> AsyncIterator[Callable]:
    """Starts a server whose answer to request i is ``answer(i)``, in the given pieces."""
    servers = []

    async def start(answer: Callable[[int], list[bytes]]) -> int:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(2)
                    pieces = answer(int(head[6:7]))
                    if not pieces:
                        break
                    for piece in pieces:
                        writer.write(piece)
                        await asyncio.sleep(0)
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


async def run(port: int, connections: int = 2) -> Outcome:
    return await generate(Load("127.0.0.1", port, os.getpid(), connections, 0.05, 0.01, REQUESTS))


def count(answers: list[SeenAnswer]) -> int:
    return sum(answer.count for answer in answers)


async def test_answers_are_matched_to_their_requests(serve: Callable) -> None:
    def answer(i: int) -> list[bytes]:
        body = b"r%d" % i
        return [b"HTTP/1.1 200 OK\r\nSlipstream-Variant: int8\r\ncontent-length: 2\r\n\r\n" + body]

    outcome = await run(await serve(answer))
    assert {(a.request, a.status, a.json_length, a.body) for a in outcome.answers} == {
        (i, 200, None, b"r%d" % i) for i in range(3)
    }
    assert count(outcome.answers) == len(outcome.latencies_ms) > 0
    assert outcome.unchecked == 0
    assert outcome.variants == {"int8": len(outcome.latencies_ms)}
    assert min(outcome.latencies_ms) > 0
    assert 0.05 <= outcome.seconds < 5


async def test_answer_in_pieces_is_joined(serve: Callable) -> None:
    def answer(i: int) -> list[bytes]:
        return [
            b"HTTP/1.1 200 OK\r\nConte",
            b"nt-Length: 6\r\nInference-Header-Content-Length: 4\r\n\r\nab",
            b"cd",
            b"ef",
        ]

    outcome = await run(await serve(answer))
    assert {(a.json_length, a.body) for a in outcome.answers} == {(4, b"abcdef")}


async def test_errors_are_answers_too(serve: Callable) -> None:
    outcome = await run(await serve(lambda i: [b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"]))
    assert {(a.status, a.body) for a in outcome.answers} == {(429, b"")}


async def test_closed_connection_fails_the_run(serve: Callable) -> None:
    with pytest.raises(ConnectionError, match="closed a connection"):
        await run(await serve(lambda i: []))


def test_tally_sends_the_requests_in_turn_until_the_time_is_over() -> None:
    tally = Tally(REQUESTS, until_s=10.0)
    assert [tally.take(now)[0] for now in (0.0, 1.0, 2.0, 9.9)] == [0, 1, 2, 0]
    assert tally.take(10.0) is None


def test_equal_answers_are_counted_once_each() -> None:
    tally = Tally(REQUESTS, until_s=10.0)
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    for index, body in ((0, b"a"), (0, b"a"), (1, b"a"), (0, b"b")):
        tally.count(index, Answer(200, head, body), 0.002)
    assert [(a.request, a.body, a.count) for a in tally.seen()] == [(0, b"a", 2), (1, b"a", 1), (0, b"b", 1)]
    assert tally.latencies_ms == [2.0] * 4
