"""The socket, and the parts of stopping that no clock should decide; the rest is tested end to end."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import listener
from server.app import create_app, served_models
from server.errors import StartupError
from server.listener import Listener, bind, drop_new_connections, url_of
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fakes import FakeRepository


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
