"""Connections of a real listener with a fake model: what is read, refused, answered, and given up."""

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response

from server import connection
from server.app import Application, create_app
from server.connection import MAX_HEAD_BYTES, Connection
from server.listener import Listener, bind
from server.metrics import Metrics
from server.settings import Settings
from server.tensors import InferRequest, InferResponse
from tests.server.fakes import FakeRepository, double

HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
LAST = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


@contextlib.asynccontextmanager
async def serving(
    repository: FakeRepository | None = None,
    prepare: Callable[[Application], None] = lambda app: None,
    **settings: Any,
) -> AsyncIterator[int]:
    """A real listener with a fake model; yields its port."""
    with bind("127.0.0.1", 0) as listening:
        given = Settings(shutdown_grace_s=0, **settings)
        app = create_app(given, repository or FakeRepository(), Metrics())  # type: ignore[arg-type]
        prepare(app)
        server = Listener(app, listening)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[listening])
        looking = asyncio.create_task(server.main_loop())
        try:
            yield listening.getsockname()[1]
        finally:
            server._stop.set()
            await looking
            await server.shutdown()


async def said_to(port: int, *sent: bytes) -> bytes:
    """Everything that the server says until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in sent:
        writer.write(part)
        await writer.drain()
    async with asyncio.timeout(30):
        said = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return said


async def until(holds: Callable[[], bool]) -> None:
    """Return when something holds."""
    while not holds():  # noqa: ASYNC110  (nothing tells of it)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("sent", [(), (b"POST /v2/mod",), (HEAD, b"Accept: */*\r\n")])
async def test_headers_that_do_not_come_are_answered_and_the_connection_closed(sent: tuple[bytes, ...]) -> None:
    async with serving(body_timeout_s=0.05) as port:
        said = await said_to(port, *sent)
    assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert said.count(b"connection: close") == 1
    assert b'"code":"request_timeout"' in said


@pytest.mark.parametrize("length", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_body_that_does_not_come_is_answered_and_the_connection_closed(length: bytes) -> None:
    async with serving(body_timeout_s=0.05) as port:
        said = await said_to(port, HEAD + length + b"\r\n\r\n", b"5\r\n12345\r\n")
    assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close" in said
    assert b"the request body did not come within 0.05 s" in said


async def test_headers_without_end_are_refused() -> None:
    async with serving() as port:
        said = await said_to(port, HEAD + b"x: " + b"y" * (MAX_HEAD_BYTES + 1))
    assert said.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in said


async def test_large_body_does_not_count_as_headers() -> None:
    async with serving() as port:
        body = BODY + b" " * (2 * MAX_HEAD_BYTES)
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert b"200 OK" in await said_to(port, HEAD + length, body)
        assert b"200 OK" in await said_to(port, HEAD + length + body)


async def test_what_is_no_http_is_answered_in_the_one_error_form() -> None:
    async with serving() as port:
        said = await said_to(port, b"hello\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"code":"malformed_request"' in said


async def test_client_that_waits_for_leave_to_send_too_much_is_refused_without_leave() -> None:
    async with serving(max_body_bytes=10) as port:
        said = await said_to(port, HEAD + b"Expect: 100-continue\r\nContent-Length: 11\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in said


async def test_client_that_waits_for_leave_to_send_gets_it() -> None:
    async with serving() as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        writer.write(HEAD + b"Expect: 100-continue\r\n" + length)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def test_chunked_body_over_the_limit_is_refused_before_its_end() -> None:
    async with serving(max_body_bytes=10) as port:
        said = await said_to(
            port, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n123456\r\n6\r\n123456\r\n"
        )
    assert said.startswith(b"HTTP/1.1 413 ")


async def test_requests_follow_one_another_on_a_connection() -> None:
    async with serving() as port:
        said = await said_to(port, WHOLE, WHOLE, LAST)
    assert said.count(b"HTTP/1.1 200 OK") == 3
    assert said.count(b"connection: close") == 1
    assert said.count(b"\r\ndate: ") == 3


async def test_requests_that_do_not_wait_for_answers_are_answered_in_their_order() -> None:
    repository = FakeRepository()
    delays = iter((0.05, 0.0, 0.0))

    async def slower_first(request: InferRequest) -> InferResponse:
        await asyncio.sleep(next(delays))
        return await double(request)

    repository.models["2"].answer = slower_first
    bodies = [BODY.replace(b"{", b'{"id": "%d", ' % number, 1) for number in range(3)]
    requests = [HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with serving(repository) as port:
        said = await said_to(port, requests[0] + requests[1] + live + requests[2] + last)
    places = [said.index(mark) for mark in (b'"id":"0"', b'"id":"1"', b'"live":true', b'"id":"2"')]
    assert places == sorted(places)
    assert said.count(b"HTTP/1.1 200 OK") == 5


async def test_body_may_come_in_pieces() -> None:
    async with serving() as port:
        assert b'"data":[2.0,4.0,6.0,8.0]' in await said_to(port, LAST[:-50], LAST[-50:-20], LAST[-20:])
        chunked = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b"200 OK" in await said_to(port, chunked, b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", [b"/v2/models/%6D/infer", b"/v2/models/m/infer?x=1", b"/v2/models/m/versions/2/infer"])
async def test_path_may_be_written_in_other_ways(path: bytes) -> None:
    async with serving() as port:
        assert b"200 OK" in await said_to(port, LAST.replace(b"/v2/models/m/infer", path))


async def test_http_1_0_closes_after_the_answer() -> None:
    async with serving() as port:
        said = await said_to(port, WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b" 200 OK\r\n" in said
    assert said.count(b"connection: close") == 1


async def test_unknown_model_is_told_before_its_body_has_come() -> None:
    async with serving() as port:
        head = HEAD.replace(b"models/m", b"models/ghost")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"Content-Length: 1000\r\n\r\n")
        async with asyncio.timeout(30):
            assert b" 404 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"}")
            # The rest of the body is read over, and the next request answered.
            writer.write(b"x" * 1000 + LAST)
            assert b"200 OK" in await reader.read()
        writer.close()


async def test_client_that_waits_for_leave_is_told_of_an_unknown_model_without_it() -> None:
    async with serving() as port:
        head = HEAD.replace(b"models/m", b"models/ghost")
        said = await said_to(port, head + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" in said


async def test_other_methods_on_the_path_are_named() -> None:
    async with serving() as port:
        said = await said_to(port, b"GET /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 405 ")
    assert b"allow: POST" in said


async def test_client_that_leaves_cancels_its_request() -> None:
    repository = FakeRepository()
    started, left = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def wait(request: InferRequest) -> InferResponse:
        started.set()
        return await left  # type: ignore[no-any-return]

    repository.models["2"].answer = wait
    async with serving(repository) as port, asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WHOLE)
        await started.wait()
        writer.close()
        await until(left.cancelled)


async def test_client_that_leaves_in_its_body_leaves_no_task_behind() -> None:
    async with serving() as port, asyncio.timeout(30):
        before = len(asyncio.all_tasks())
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LAST[:-10])
        await until(lambda: len(asyncio.all_tasks()) > before)
        writer.close()
        await until(lambda: len(asyncio.all_tasks()) == before)


async def test_client_that_reads_nothing_gets_no_second_answer_into_memory() -> None:
    repository = FakeRepository()
    large = np.ones((1, 4_000_000), np.float32)

    async def much(request: InferRequest) -> InferResponse:
        return InferResponse("m", "2", "", {"y": large}, "fp32", "cpu", 1, 0.0, 0.0)

    repository.models["2"].answer = much
    binary = BODY.replace(b'"inputs"', b'"parameters": {"binary_data_output": true}, "inputs"')
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(binary) + binary
    async with serving(repository) as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(request * 3)
        await until(lambda: bool(repository.models["2"].requests))
        await asyncio.sleep(0.05)
        assert len(repository.models["2"].requests) == 1
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            assert body.endswith(large.tobytes())
        assert len(repository.models["2"].requests) == 3
        writer.close()


async def test_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.05)
    async with serving(body_timeout_s=0.05) as port:
        said = await said_to(port, WHOLE)
    assert said.count(b"HTTP/1.1 200 OK") == 1
    assert said.endswith(b"}")


async def test_request_that_takes_long_is_neither_late_nor_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.02)
    repository = FakeRepository()

    async def slow(request: InferRequest) -> InferResponse:
        await asyncio.sleep(0.2)
        return await double(request)

    repository.models["2"].answer = slow
    async with serving(repository, body_timeout_s=0.02) as port:
        assert b"200 OK" in await said_to(port, LAST)


async def test_body_of_another_path_that_does_not_come_is_refused() -> None:
    async def read(request: Request) -> Response:
        return Response(await request.body())

    repository = FakeRepository()
    async with serving(
        repository, lambda app: app.add_api_route("/read", read, methods=["POST"]), body_timeout_s=0.05
    ) as port:
        said = await said_to(port, b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"the request body did not come" in said


async def test_known_targets_stay_few() -> None:
    async with serving() as port:
        for number in range(3):
            Connection._targets.update({b"%d/%d" % (number, i): None for i in range(connection._MOST_TARGETS)})
            assert b"200 OK" in await said_to(port, LAST.replace(b"infer", b"infer?%d" % number))
    assert len(Connection._targets) <= connection._MOST_TARGETS + 3


async def test_failed_answer_says_why_in_json() -> None:
    async with serving() as port:
        said = await said_to(port, LAST.replace(b'"x"', b'"z"'))
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["code"] == "signature_mismatch"


async def test_open_connection_keeps_nothing_of_what_was_answered() -> None:
    repository, kept = FakeRepository(), []

    async def watched(request: InferRequest) -> InferResponse:
        output = np.ones((1, 4), np.float32)
        kept.extend([weakref.ref(output), weakref.ref(request.inputs["x"])])
        return InferResponse("m", "2", "", {"y": output}, "fp32", "cpu", 1, 0.0, 0.0)

    repository.models["2"].answer = watched
    async with serving(repository) as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WHOLE)
        await reader.readuntil(b"}]}")
        repository.models["2"].requests.clear()
        gc.collect()
        assert [reference() for reference in kept] == [None, None]
        writer.close()
