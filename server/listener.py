"""The listening process: its socket, its signals, and a stop that loses no request.

How it stops, after SIGTERM or SIGINT:

1. ``ready`` answers 503, so that load balancers look elsewhere, and every answer carries ``connection: close``, so that
   clients do too. Requests are served as before, for ``shutdown_grace_s``.
2. The listening socket closes; connections that the kernel had accepted before are served.
3. What is queued or running is finished, for at most ``drain_timeout_s``.
4. The lifespan ends, which closes the models.

A second signal ends the process at once.
"""

import asyncio
import contextlib
import ctypes
import functools
import gc
import logging
import os
import socket
import struct
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.connection import Connection
from server.errors import StartupError
from server.infer import Application
from server.intake import Intake

logger = logging.getLogger(__name__)

# What an open connection without a request gets to send one once the socket is closed.
IDLE_CONNECTION_S = 0.25
# What requests that the closing models refused get to send their answers.
LAST_ANSWERS_S = 1.0
# What handshakes under way get to finish after new ones are dropped.
HANDSHAKE_S = 0.05
_STEP_S = 0.02
_SO_ATTACH_FILTER = 26


def bind(host: str, port: int) -> socket.socket:
    """Bind the listening socket.

    Args:
        host: Name or address; an IPv6 address without brackets.
        port: TCP port; 0 picks a free one.

    Raises:
        StartupError: If the address is taken or is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # create_server sets SO_REUSEADDR: a restart need not wait for old connections to time out.
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        # create_server puts the address into the text once more.
        reason = exc.strerror if isinstance(exc, socket.gaierror) else os.strerror(exc.errno or 0)
        raise StartupError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host or --port"
        ) from exc
    listening.setblocking(False)
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the base URL at which a listening socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def drop_new_connections(listening: socket.socket) -> bool:
    """Let the kernel drop every request for a new connection from here on; return whether it can (Linux).

    Between the last ``accept`` and the closing of a socket there would otherwise be an instant in which the kernel
    accepts a connection that nobody takes. A dropped client tries again after a second and finds the port closed.

    Source: Linux, ``SO_ATTACH_FILTER``; the filter sees the TCP header, whose byte 13 holds the flags.
    """
    if sys.platform != "linux":
        return False
    load_flags, jump_if_syn, drop, keep = (0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in (load_flags, jump_if_syn, drop, keep))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:  # a sandbox that does not know the option
        return False
    return True


class Listener(uvicorn.Server):
    """Uvicorn with this process's own way to start and to stop.

    Attributes:
        failure: Why the server stopped by itself; ``None`` when it was told to.
        shares_socket: Whether other processes accept from the same socket: it is closed here, but not shut down.
    """

    shares_socket = False

    def __init__(self, app: Application, listening: socket.socket) -> None:
        self._connection = functools.partial(Connection, intake=Intake())
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=self._connection,  # type: ignore[arg-type]  # it is called, no more
                ws="none",
                interface="asgi3",
                lifespan="on",
                log_config=None,
                # Its life-cycle lines repeat ours.
                log_level=logging.WARNING,
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self.failure: BaseException | None = None
        self._app, self._listening = app, listening
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_forever(self) -> None:
        """Serve until a signal comes or no model can be served.

        Raises:
            StartupError: If no model of the repository can be served; also any other error of opening it.
        """
        self.run(sockets=[self._listening])
        if self.failure is not None:
            raise self.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen; the models load meanwhile."""
        self._loop = asyncio.get_running_loop()
        # What lives as long as the process need not be looked through again: a full collection takes 15 ms else.
        gc.collect()
        gc.freeze()
        await super().startup(sockets=sockets)
        self._app.listens_on(url_of(self._listening), self._fail)

    async def main_loop(self) -> None:
        """Wait for the stop; at least once a second, renew the Date header and look for what does not come."""
        timeout_s = self._app.settings.body_timeout_s
        while not self._stop.is_set():
            await self.on_tick(0)
            self._look(timeout_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1, timeout_s)):
                    await self._stop.wait()

    def _look(self, timeout_s: float) -> None:
        # A function of its own, so that no variable keeps the last connection alive until the next look.
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.look(timeout_s)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  (uvicorn's signature)
        """Begin to stop at the first signal, exit at once at the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  (uvicorn's signature)
        """Stop as the module describes."""
        settings = self._app.settings
        self._app.draining = True
        if self.failure is None:
            logger.info("stopping: not ready, still serving for %g s", settings.shutdown_grace_s)
            self._close_connections_after_their_answer()
            await asyncio.sleep(settings.shutdown_grace_s)
        await self._close_socket()
        logger.info("stopping: socket closed, finishing %d connections", len(self.server_state.connections))
        if not await self._finish_requests(settings.drain_timeout_s):
            logger.warning("%d requests did not finish in %g s", len(self.server_state.tasks), settings.drain_timeout_s)
        await self.lifespan.shutdown()
        await self._finish_requests(LAST_ANSWERS_S)
        for task in self.server_state.tasks:
            task.cancel()
        logger.info("stopped")

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True
        self._stop.set()

    def _close_connections_after_their_answer(self) -> None:
        # Uvicorn builds the headers of an answer from this list, which it renews from the config.
        self.config.encoded_headers.append((b"connection", b"close"))
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        for connection in self.server_state.connections:
            cycle = connection.cycle if isinstance(connection, HttpToolsProtocol) else None
            if cycle is not None and not cycle.response_complete:
                cycle.keep_alive = False

    async def _close_socket(self) -> None:
        """Close the listening socket, after taking every connection that the kernel has already accepted.

        Closing it alone would reset them, although their clients may have sent requests.
        """
        if drop_new_connections(self._listening):
            await asyncio.sleep(HANDSHAKE_S)
        waiting: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting.append(self._listening.accept()[0])
        if not self.shares_socket:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
        for server in self.servers:
            server.close()
        self._listening.close()
        loop = asyncio.get_running_loop()
        for accepted in waiting:
            accepted.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._make_protocol, accepted)

    def _make_protocol(self) -> asyncio.Protocol:
        return self._connection(self.config, self.server_state, self.lifespan.state)

    async def _finish_requests(self, timeout_s: float) -> bool:
        """Wait until every connection is closed and every request answered; return whether that came true in time."""
        loop, state = asyncio.get_running_loop(), self.server_state
        started_s = loop.time()
        while state.connections or state.tasks:
            elapsed_s = loop.time() - started_s
            if elapsed_s >= timeout_s:
                return False
            if elapsed_s >= IDLE_CONNECTION_S:
                for connection in list(state.connections):
                    connection.shutdown()  # closes it if it is idle
            await asyncio.sleep(_STEP_S)
        return True
