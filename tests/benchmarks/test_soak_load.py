"""The soak's load against servers that answer as they should, or do not."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import numpy as np
import pytest

from benchmarks.soak import load as loading
from benchmarks.soak.load import SoakLoad, SoakOutcome, generate
from benchmarks.soak.mix import Item

X, Y = np.array([1, -2], np.float32), np.array([3, 5, -7], np.float32)
GOOD = Item(1, b"POST /m HTTP/1.1\r\n", b"{}", ("ok",), X.tobytes(), Y.tobytes(), takes_options=False)
Answer = Callable[[bytes], Awaitable[bytes]]


def answer(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, headers, len(body), body)


async def scaled(body: bytes) -> bytes:
    scale = np.frombuffer(body[2:], np.float32)[0] / X[0]
    return answer(b"[]" + (Y * scale).tobytes(), headers=b"inference-header-content-length: 2\r\n")


class Fake:
    """A server that notes how its clients left: requests that came whole and were answered, and connections."""

    def __init__(self, by: Answer) -> None:
        self.by, self.whole, self.connections, self.cut = by, 0, 0, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                self.whole += 1
                reply = await self.by(body)
                if not reply:
                    break
                writer.write(reply)
                await writer.drain()
        except asyncio.IncompleteReadError as exc:
            self.cut += bool(exc.partial)
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Answer], Awaitable[tuple[Fake, int]]]]:
    servers = []

    async def start(by: Answer) -> tuple[Fake, int]:
        fake = Fake(by)
        servers.append(await asyncio.start_server(fake, "127.0.0.1", 0))
        return fake, servers[-1].sockets[0].getsockname()[1]

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


async def run(port: int, item: Item = GOOD, requests: int = 60, leaving: float = 0.0) -> SoakOutcome:
    return await generate(SoakLoad("127.0.0.1", port, requests, leaving, 3, [item], 10))


async def test_right_answers_are_counted_and_reported(serve: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    fake, port = await serve(scaled)
    outcome = await run(port)
    assert (outcome.answered, outcome.checked, outcome.faulty, outcome.left) == ({"ok": 60}, 60, 0, {})
    assert (fake.whole, fake.connections) == (60, 3)
    assert capsys.readouterr().out.split() == ["10", "20", "30", "40", "50", "60"]


async def wrong(body: bytes) -> bytes:
    return answer(b"[]" + (Y + 1).tobytes(), headers=b"inference-header-content-length: 2\r\n")


async def short(body: bytes) -> bytes:
    return answer(b"[]" + Y[:2].tobytes(), headers=b"inference-header-content-length: 2\r\n")


async def broken(body: bytes) -> bytes:
    return answer(b'{"code":"internal"}', b"500 Internal Server Error")


async def closing(body: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (wrong, "a wrong answer"),
        (short, "a wrong answer"),
        (broken, "internal for "),
        (closing, "the server closed a connection"),
    ],
)
async def test_wrong_answers_and_closed_connections_are_faults(serve: Callable, by: Answer, says: str) -> None:
    _, port = await serve(by)
    outcome = await run(port, requests=30)
    assert outcome.faulty == 30
    assert len(outcome.faults) == 20
    assert all(fault.startswith(says) for fault in outcome.faults)


async def test_request_without_an_answer_is_a_fault(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ANSWER_TIMEOUT_S", 0.01)
    never = asyncio.Event()

    async def silent(_: bytes) -> bytes:
        await never.wait()
        return b""

    _, port = await serve(silent)
    outcome = await run(port, requests=3)
    never.set()
    assert (outcome.faulty, outcome.faults[0]) == (3, "no answer in 0.01 s")


async def test_answer_that_closes_its_connection_is_followed_by_another_one(serve: Callable) -> None:
    async def last(body: bytes) -> bytes:
        return (await scaled(body)).replace(b"\r\n", b"\r\nconnection: close\r\n", 1)

    fake, port = await serve(last)
    outcome = await run(port, requests=9)
    assert (outcome.answered, outcome.faulty, fake.connections) == ({"ok": 9}, 0, 9)


@pytest.mark.parametrize("point", loading.LEAVING_POINTS)
async def test_clients_leave_where_they_should(serve: Callable, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setattr(loading, "LEAVING_POINTS", (point,))
    held = asyncio.Event()

    async def by(body: bytes) -> bytes:
        if point == "wait":
            await held.wait()
        return await scaled(body)

    fake, port = await serve(by)
    outcome = await run(port, requests=30, leaving=1.0)
    held.set()
    assert (outcome.left, outcome.answered, outcome.faulty) == ({point: 30}, {}, 0)
    assert fake.connections >= 30
    assert fake.whole == (0 if point == "body" else 30)


async def test_early_refusal_of_half_a_request_is_not_its_answer(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LEAVING_POINTS", ("body",))

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"code":"unknown_model"}', b"404 Not Found"))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hasty, "127.0.0.1", 0)
    async with server:
        outcome = await run(server.sockets[0].getsockname()[1], requests=30, leaving=1.0)
    assert (outcome.left, outcome.answered, outcome.faulty) == ({"body": 30}, {}, 0)


async def test_everything_that_is_sent_differs_and_bears_options(serve: Callable) -> None:
    bodies, heads = set(), []

    async def by(body: bytes) -> bytes:
        bodies.add(body)
        return await scaled(body)

    _, port = await serve(by)
    item = msgspec.structs.replace(GOOD, start=b"POST /%d HTTP/1.1\r\n", takes_options=True)
    outcome = await run(port, item, requests=300)
    assert (len(bodies), outcome.faulty) == (300, 0)
    soak = loading.Soak(SoakLoad("", 0, 300, 0.0, 1, [item], 1000))
    while (made := soak.next()) is not None:
        heads.append(made[1])
    for option in (b"client: client-", b"priority: ", b"timeout-ms: ", b"variant: unoptimized"):
        assert 0 < sum(b"slipstream-" + option in head for head in heads) < 300
    assert len({head.split()[1] for head in heads}) == 300
