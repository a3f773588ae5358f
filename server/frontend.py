"""A front-end process: HTTP and the protocol for its share of the connections; the work is the engine's.

All front ends accept from one listening socket, which they inherit: a connection that the kernel has accepted is served
by whichever of them is there, also when one dies or all of them stop. Inference requests are decoded and encoded here;
whatever else is asked for, but for whether the process lives, is answered by the engine's application.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial

import orjson
import uvloop
from starlette.types import Receive, Scope, Send

from server import channel
from server.errors import SlipstreamError, StartupError, Unavailable
from server.http import JSON, RETRY_UNAVAILABLE_S, Answer, ClientLeft, answer_of, read_body, send_answer
from server.infer import InferBranch, infer_target
from server.listener import Listener
from server.logs import configure
from server.messages import HttpAnswer, HttpRequest
from server.orders import Line, Note, Word
from server.remote import RemoteCache, RemoteCounters, RemoteEngine, RemoteModels
from server.settings import Settings, settings_from_text

# How many connections a front end takes before it leaves the next ones to others, and for how long.
_ACCEPTED_AT_ONCE = 4
_ACCEPT_PAUSE_S = 0.001
_LIVE, _READY = "/v2/health/live", "/v2/health/ready"


class FrontEnd:
    """The ASGI application of a front end.

    Args:
        settings: What the server was told.
        report: Tells the supervisor how the start and the end go on.

    Attributes:
        engine: The engine; connect it.
    """

    def __init__(self, settings: Settings, report: Callable[[Word], None]) -> None:
        self.settings, self.draining = settings, False
        self.engine = RemoteEngine(settings.slab_bytes, self._check_open, lambda: report("lost"))
        self._report = report
        self._is_listening = False
        self._models = RemoteModels(self.engine, gathers=not settings.cache_bytes)
        self.infer = InferBranch(
            self._models,
            RemoteCounters(self.engine),
            settings,
            RemoteCache(),
            self._models.look_up,
            cached_by_models=True,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._live_through(receive, send)
            return
        target = infer_target(scope["path"])
        if target is not None:
            await self.infer(scope, receive, send, *target)
            return
        try:
            answer = await self._ask(scope, receive)
        except ClientLeft:
            return
        except SlipstreamError as exc:
            answer = answer_of(exc)
        await send_answer(send, answer)

    def listens_on(self, url: str, fail: Callable[[BaseException], None]) -> None:  # noqa: ARG002  (of all applications)
        """Learn that connections are accepted."""
        self._is_listening = True
        self._check_open()

    async def _ask(self, scope: Scope, receive: Receive) -> Answer:
        """Have the engine's application answer."""
        path, method = scope["path"], scope["method"]
        if path == _LIVE and method == "GET":
            return _json(200, {"live": True})
        if path == _READY and self.engine.reason:
            return _json(503, {"ready": False, "error": self.engine.reason, "code": Unavailable.code})
        body = bytes(await read_body(receive, self.settings.max_body_bytes))
        asked = HttpRequest(
            scope["http_version"],
            method,
            scope["scheme"],
            path,
            scope["raw_path"],
            scope["query_string"],
            scope["headers"],
            scope["client"],
            scope["server"],
            body,
        )
        self.engine.tell_finished()  # so that metrics that are asked for count what was answered before
        answer: HttpAnswer = await self.engine.call(channel.HTTP, self.engine.codecs.http.encode(asked))
        return Answer(answer.status, answer.headers, [answer.body])

    async def _live_through(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        # The requests of this process are done. The engine ends once that is so everywhere, and refuses what is left.
        self._report("finished")
        await self.engine.wait_for_end()
        await send({"type": "lifespan.shutdown.complete"})

    def _check_open(self) -> None:
        if self._is_listening and not self.engine.reason:
            self._report("connected")


class FrontEndListener(Listener):
    """A listener that shares its socket with other processes, and that the supervisor stops instead of signals."""

    shares_socket = True

    def __init__(self, app: FrontEnd, listening: socket.socket, report: Callable[[Word], None]) -> None:
        super().__init__(app, listening)
        self._report = report
        self._accepting: set[asyncio.Task[object]] = set()
        self._is_closing = False

    async def serve_on_loop(self) -> None:
        """Serve until stopped."""
        await self.serve(sockets=[self._listening])

    def stop(self, failure: BaseException | None = None) -> None:
        """Begin to stop; at once if there is a failure."""
        self.failure = failure
        self.should_exit = True
        self._stop.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  (uvicorn's signature)
        """Start to accept connections, a few at a time, with a pause after each time.

        A front end that took all that wait, as event loops do, would leave none to the others.
        """
        await super().startup(sockets=[])
        self._loop = asyncio.get_running_loop()
        self._watch_socket()

    def _watch_socket(self) -> None:
        if self._loop is not None and not self._is_closing:
            self._loop.add_reader(self._listening, self._accept, self._loop)

    def _accept(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):  # another front end has it, or there are no descriptors left
            for _ in range(_ACCEPTED_AT_ONCE):
                accepted, _ = self._listening.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                task = loop.create_task(loop.connect_accepted_socket(self._make_protocol, accepted))
                self._accepting.add(task)
                task.add_done_callback(self._accepting.discard)
        loop.remove_reader(self._listening)
        loop.call_later(_ACCEPT_PAUSE_S, self._watch_socket)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Ignore signals: a terminal or a service manager may send them to every process of the server."""

    def _close_connections_after_their_answer(self) -> None:
        super()._close_connections_after_their_answer()
        self._report("draining")

    async def _close_socket(self) -> None:
        self._is_closing = True
        asyncio.get_running_loop().remove_reader(self._listening)
        await super()._close_socket()
        self._report("closed")


class FrontEndProcess:
    """The process around a front end: its orders."""

    def __init__(self, connection: socket.socket) -> None:
        self._started: asyncio.Future[tuple[FrontEnd, FrontEndListener]] = asyncio.get_running_loop().create_future()
        self._line = Line(connection, self._obey, partial(os._exit, 1))  # nobody is left who could say when to stop

    async def run(self) -> None:
        """Serve until told to stop."""
        app, listener = await self._started
        await listener.serve_on_loop()
        app.engine.close()
        await asyncio.to_thread(app.infer.close)
        self._line.close()

    def _obey(self, note: Note, files: list[int]) -> None:
        if note.word == "serve":
            self._start(settings_from_text(note.text), socket.socket(fileno=files[0]))
            return
        app, listener = self._started.result()
        if note.word == "connect":
            app.engine.connect(socket.socket(fileno=files[0]))
        elif note.word == "drain":
            listener.stop()
        elif note.word == "abort":
            listener.stop(StartupError(note.text))

    def _start(self, settings: Settings, listening: socket.socket) -> None:
        configure(settings.log_format, settings.log_level)
        logging.getLogger(Listener.__module__).setLevel(logging.WARNING)  # how the server stops, its supervisor tells
        app = FrontEnd(settings, self._line.send)
        self._started.set_result((app, FrontEndListener(app, listening, self._line.send)))


def main(line: int) -> None:
    """Be a front-end process.

    Args:
        line: Descriptor of the line to the supervisor.
    """
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)  # the supervisor says when

    async def run() -> None:
        await FrontEndProcess(socket.socket(fileno=line)).run()

    uvloop.run(run())


def _json(status: int, body: dict[str, object]) -> Answer:
    text = orjson.dumps(body)
    headers = [(b"content-type", JSON), (b"content-length", b"%d" % len(text))]
    if status == Unavailable.status:
        headers.append((b"retry-after", b"%d" % RETRY_UNAVAILABLE_S))
    return Answer(status, headers, [text])
