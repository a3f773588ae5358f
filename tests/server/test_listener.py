"""The socket, and the parts of stopping that no clock should decide; the rest is tested end to end."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import listener
from server.app import create_app, served_models
from server.errors import StartupError
from server.listener import MAX_HEAD_BYTES, Listener, bind, drop_new_connections, url_of
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fakes import FakeRepository

HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}'


class Connection:
    """An open connection that answers nothing until it is told to close."""

    def __init__(self, server: Listener) -> None:
        self._connections = server.server_state.connections
        self._connections.add(self)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        self._connections.discard(self)


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def server(repository: FakeRepository) -> Iterator[Listener]:
    with bind("127.0.0.1", 0) as listening:
        yield Listener(create_app(Settings(), repository, Metrics()), listening)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[int]:
    """A real listener with a fake model; yields its port."""
    with bind("127.0.0.1", 0) as listening:
        given = Settings(shutdown_grace_s=0, **settings)
        app = create_app(given, FakeRepository(), Metrics())  # type: ignore[arg-type]
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


async def test_idle_connection_that_has_been_answered_is_not_late() -> None:
    connection = listener._Protocol.__new__(listener._Protocol)
    connection.refuse_late_head(0)  # would need a loop and a transport if it were


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
    async with serving() as port:
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        said = await said_to(port, HEAD + b"Expect: 100-continue\r\n" + length, BODY)
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_chunked_body_over_the_limit_is_refused_before_its_end() -> None:
    async with serving(max_body_bytes=10) as port:
        said = await said_to(
            port, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n123456\r\n6\r\n123456\r\n"
        )
    assert said.startswith(b"HTTP/1.1 413 ")


async def test_open_connection_gets_time_to_send_its_request(server: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_STEP_S", 0)
    monkeypatch.setattr(listener, "IDLE_CONNECTION_S", 3600)
    Connection(server)
    finishing = asyncio.create_task(server._finish_requests(3600))
    for _ in range(10):
        await asyncio.sleep(0)
    assert server.server_state.connections
    monkeypatch.setattr(listener, "IDLE_CONNECTION_S", 0)
    async with asyncio.timeout(10):
        assert await finishing
    assert not server.server_state.connections


async def test_requests_that_never_end_are_given_up(server: Listener) -> None:
    hanging = asyncio.create_task(asyncio.Event().wait())
    server.server_state.tasks.add(hanging)  # type: ignore[arg-type]
    assert not await server._finish_requests(0)
    hanging.cancel()


async def test_connections_close_with_their_next_answer(server: Listener) -> None:
    server.config.load()
    waiting = HttpToolsProtocol(server.config, server.server_state, {})
    waiting.cycle = SimpleNamespace(response_complete=False, keep_alive=True)  # type: ignore[assignment]
    idle = HttpToolsProtocol(server.config, server.server_state, {})
    server.server_state.connections |= {waiting, idle}
    server._close_connections_after_their_answer()
    await server.on_tick(0)
    assert not waiting.cycle.keep_alive
    assert (b"connection", b"close") in server.server_state.default_headers


def test_second_signal_ends_the_process(server: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, codes) == (True, [])
    server.handle_exit(signal.SIGTERM, None)
    assert codes == [128 + signal.SIGTERM]


def test_no_connection_is_made_once_new_ones_are_dropped() -> None:
    with bind("127.0.0.1", 0) as listening, socket.socket() as before, socket.socket() as after:
        before.connect(listening.getsockname())
        if not drop_new_connections(listening):
            pytest.skip("this system has no socket filters")
        after.setblocking(False)
        with pytest.raises(BlockingIOError):
            after.connect(listening.getsockname())
        before.sendall(b"still open")
        with listening.accept()[0] as accepted:
            accepted.settimeout(10)
            assert accepted.recv(100) == b"still open"
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_served_models_leaves_out_what_failed(repository: FakeRepository) -> None:
    assert served_models(repository) == ["m"]  # type: ignore[arg-type]
    repository.failures = {("m", ""): "its digest differs"}
    assert served_models(repository) == []  # type: ignore[arg-type]


def test_bind_picks_a_free_port_and_names_it() -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert port > 0
        assert url_of(listening) == f"http://127.0.0.1:{port}"


def test_url_of_an_ipv6_socket_has_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        listening = bind("::1", 0)
    except StartupError:
        pytest.skip("this machine has no IPv6 loopback address")
    with listening:
        assert url_of(listening).startswith("http://[::1]:")


def test_taken_port_and_foreign_address_are_startup_errors() -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1 port {port}: .*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(StartupError, match=r"cannot listen on no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)
