"""The engine process: the models, and everything else that is not HTTP, for the front ends of one machine.

It serves one channel per front end. Large tensors of a request lie in memory that the front end wrote once, and the
batch is assembled from there. A front end that dies takes only its own requests along: those that wait are cancelled,
and its memory is unmapped once no run reads from it any more.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import uvloop
from starlette.types import Message, Scope

from server import channel
from server.app import Application, create_app
from server.channel import Channel
from server.errors import ModelNotReady, SlipstreamError, UnknownModel
from server.infer import CANCELLED
from server.logs import configure
from server.messages import Buffer, Codecs, Encoded, Failure, Found, HttpAnswer, HttpRequest, Inferred
from server.metrics import Metrics
from server.model import Model
from server.orders import Line, Note
from server.repository import Repository
from server.serving import How, RequestCounter
from server.settings import Settings, settings_from_text
from server.tensors import InferRequest, InferResponse

logger = logging.getLogger(__name__)

# What requests that the closing models refused get to reach their front ends.
LAST_ANSWERS_S: Final = 1.0


class Engine:
    """The channels of all front ends, and what they share.

    Args:
        app: The application; it answers whatever is no inference.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        self.codecs = Codecs()
        self._connections: set[Connection] = set()
        self._targets: dict[tuple[str, str], int] = {}
        self._asked: list[tuple[str, str]] = []  # by target: the name and version that were asked for
        self._models: list[Model] = []  # by target: what they meant at last
        self._counters: dict[tuple[str, str], RequestCounter] = {}

    def connect(self, connection: socket.socket) -> None:
        """Serve a front end.

        Raises:
            OSError: If there is no memory to share with it.
        """
        self._connections.add(Connection(self, connection, self.app.settings.slab_bytes))

    def disconnected(self, connection: "Connection") -> None:
        """Forget a front end that is gone."""
        self._connections.discard(connection)

    async def close(self) -> None:
        """Let what is under way be answered, for a short time, and close all channels."""
        under_way = {future for connection in self._connections for future in connection.under_way.values()}
        if under_way:
            await asyncio.wait(under_way, timeout=LAST_ANSWERS_S)
        for connection in tuple(self._connections):
            connection.close()

    def look_up(self, name: str, version: str) -> Found:
        """Find a model, and give the name and version that were asked for a number.

        Raises:
            UnknownModel: If there is no such name or version.
            ModelNotReady: If it takes no requests now.
        """
        model = self._get(name, version)
        target = self._targets.get((name, version))
        if target is None:
            target = self._targets[name, version] = len(self._asked)
            self._asked.append((name, version))
            self._models.append(model)
        elif self._models[target] is not model:
            self._changed(target, model)
        return Found(target, model.name, model.version, model.signature)

    def model_of(self, target: int) -> Model:
        """Return the model that a number means now; when that has changed, the front ends are told.

        Raises:
            UnknownModel: If it is there no more.
            ModelNotReady: If it takes no requests any more.
        """
        try:
            model = self._get(*self._asked[target])
        except SlipstreamError:
            self._forget(target)
            raise
        if model is not self._models[target]:
            self._changed(target, model)
        return model

    def counter_of(self, name: str, version: str) -> RequestCounter:
        """Return the counter of a model version."""
        counter = self._counters.get((name, version))
        if counter is None:
            counter = self._counters[name, version] = self.app.metrics.of_model(name, version)
        return counter

    def _get(self, name: str, version: str) -> Model:
        try:
            return self.app.repository.get(name, version)
        except UnknownModel:
            if self.app.opening is not None and self.app.opening.done():
                raise
            # An engine that takes the place of another one is asked before it has looked at its models.
            raise ModelNotReady(f"model '{name}' is not ready: the models are being opened") from None

    def _changed(self, target: int, model: Model) -> None:
        self._models[target] = model
        self._forget(target)

    def _forget(self, target: int) -> None:
        for connection in self._connections:
            connection.forget(target)


class Connection:
    """One front end.

    Attributes:
        under_way: Number of a request -> the run or the task that its answer is made of.
    """

    def __init__(self, engine: Engine, connection: socket.socket, slab_bytes: int) -> None:
        self.under_way: dict[int, asyncio.Future[Any]] = {}
        self._engine, self._codecs = engine, engine.codecs
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, int, Encoded]] = deque()  # answers for which there is no room yet
        self._is_lost = False
        self._channel = Channel(connection, slab_bytes, leases=True, received=self._receive, lost=self._lost)
        self._channel.made_room = self._post_waiting

    def forget(self, target: int) -> None:
        """Tell the front end that a model has changed."""
        self._channel.post(channel.FORGET, target)

    def close(self) -> None:
        """Cancel what is under way and close the channel."""
        self._channel.close()
        self._lost()

    def _receive(self, kind: int, target: int, number: int, message: Buffer, head_bytes: int) -> None:
        if kind == channel.INFER:
            self._infer(number, target, self._codecs.infer.decode(message, head_bytes))
        elif kind == channel.FINISHED:
            for name, version, code, trace_id, seconds in self._codecs.finished.decode(message, head_bytes).requests:
                counter = self._engine.counter_of(name, version)
                for each in seconds:
                    counter.request_finished(code, each, trace_id)
        elif kind == channel.CANCEL:
            if (future := self.under_way.get(number)) is not None:
                future.cancel()
        elif kind == channel.LOOK_UP:
            self._look_up(number, *self._codecs.look_up.decode(message, head_bytes))
        elif kind == channel.HTTP:
            exchange = _Exchange(self._codecs.http.decode(message, head_bytes))
            answering = self._loop.create_task(self._engine.app(exchange.scope, exchange.receive, exchange.send))
            self.under_way[number] = answering
            answering.add_done_callback(partial(self._answered, number, exchange))

    def _infer(self, number: int, target: int, request: InferRequest) -> None:
        """Begin a run; without a task, unless the cache has to be asked."""
        started_s = time.perf_counter()
        cache = self._engine.app.cache
        try:
            model = self._engine.model_of(target)
            run: asyncio.Future[Any]
            finish: Callable[[Any], tuple[InferResponse, How]]
            if cache is None:
                run, finish = model.begin(request), partial(model.finish, request)
            else:
                run, finish = self._loop.create_task(cache.infer(model, request)), _as_it_is
        except Exception as exc:  # noqa: BLE001  (the boundary where every error becomes an answer)
            self._fail(number, exc)
            return
        self.under_way[number] = run
        run.add_done_callback(partial(self._ran, number, model, finish, started_s))

    def _ran(
        self,
        number: int,
        model: Model,
        finish: Callable[[Any], tuple[InferResponse, How]],
        started_s: float,
        run: "asyncio.Future[Any]",
    ) -> None:
        del self.under_way[number]
        if run.cancelled():
            if self._is_lost:  # else the front end counts it
                counter = self._engine.counter_of(model.name, model.version)
                counter.request_finished(CANCELLED, time.perf_counter() - started_s)
            return
        # Raised here, the error would keep this frame, and the frame the run, and so the memory of the request.
        error = run.exception()
        if error is not None:
            self._fail(number, error)
            return
        try:
            inferred = Inferred(*finish(run.result()))
            self._answer(channel.INFERRED, number, self._codecs.inferred.encode(inferred))
        except Exception as exc:  # noqa: BLE001  (as in _infer)
            self._fail(number, exc)

    def _answered(self, number: int, exchange: "_Exchange", answering: "asyncio.Future[None]") -> None:
        del self.under_way[number]
        if answering.cancelled():
            return
        error = answering.exception()
        if error is not None:  # the application has answered, and raises for the log
            logger.error("internal error", exc_info=error)
        if exchange.answer is None:
            self._fail(number, SlipstreamError("internal error; see the server log"))
        else:
            self._answer(channel.ANSWER, number, self._codecs.http_answer.encode(exchange.answer))

    def _look_up(self, number: int, name: str, version: str) -> None:
        try:
            found = self._engine.look_up(name, version)
        except SlipstreamError as exc:
            self._fail(number, exc)
        else:
            self._answer(channel.FOUND, number, self._codecs.found.encode(found))

    def _fail(self, number: int, error: BaseException) -> None:
        if not isinstance(error, SlipstreamError):
            logger.error("internal error", exc_info=error)
            error = SlipstreamError("internal error; see the server log")
        self._answer(channel.FAILURE, number, self._codecs.failure.encode(Failure.of(error)))

    def _answer(self, kind: int, number: int, message: Encoded) -> None:
        """Send an answer, in its turn: when those before it still wait for room, it waits behind them."""
        if self._waiting or not self._channel.post(kind, 0, number, message):
            self._waiting.append((kind, number, message))

    def _post_waiting(self) -> None:
        while self._waiting:
            kind, number, message = self._waiting[0]
            if not self._channel.post(kind, 0, number, message):
                return
            self._waiting.popleft()

    def _lost(self) -> None:
        self._is_lost = True
        self._waiting.clear()
        for future in self.under_way.values():
            future.cancel()
        self._engine.disconnected(self)


def _as_it_is(answered: tuple[InferResponse, How]) -> tuple[InferResponse, How]:
    return answered


class _Exchange:
    """One HTTP request and its answer as ASGI sees them."""

    def __init__(self, asked: HttpRequest) -> None:
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": asked.http_version,
            "method": asked.method,
            "scheme": asked.scheme,
            "path": asked.path,
            "raw_path": asked.raw_path,
            "query_string": asked.query_string,
            "root_path": "",
            "headers": asked.headers,
            "client": asked.client,
            "server": asked.server,
            "state": {},
        }
        self.answer: HttpAnswer | None = None
        self._body: bytes | None = asked.body
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # the client's departure cancels the request
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], [(bytes(n), bytes(v)) for n, v in message["headers"]]
        elif message["type"] == "http.response.body":
            self._parts.append(bytes(message.get("body", b"")))
            if not message.get("more_body", False):
                self.answer = HttpAnswer(self._status, self._headers, b"".join(self._parts))


class EngineProcess:
    """The process around the engine: its orders, its start and its end."""

    def __init__(self, connection: socket.socket) -> None:
        self._started: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._line = Line(connection, self._obey, partial(os._exit, 1))  # nobody is left who could say when to stop

    async def run(self) -> None:
        """Serve until told to stop."""
        engine = await self._started
        # What lives as long as the process need not be looked through again: a full collection takes 15 ms else.
        gc.collect()
        gc.freeze()
        app = engine.app
        async with app.router.lifespan_context(app):
            await self._stop.wait()
        await engine.close()
        self._line.close()

    def _obey(self, note: Note, files: list[int]) -> None:
        if note.word == "serve":
            self._start(settings_from_text(note.text))
            return
        engine = self._started.result()
        if note.word == "connect":
            engine.connect(socket.socket(fileno=files[0]))
        elif note.word == "listening":
            engine.app.listens_on(note.text, self._fail)
            if engine.app.opening is not None:
                engine.app.opening.add_done_callback(lambda _: self._line.send("opened"))
        elif note.word == "drain":
            engine.app.draining = True
            self._line.send("draining")
        elif note.word == "stop":
            self._stop.set()

    def _start(self, settings: Settings) -> None:
        configure(settings.log_format, settings.log_level)
        metrics = Metrics()
        self._started.set_result(Engine(create_app(settings, Repository(settings, metrics), metrics)))

    def _fail(self, error: BaseException) -> None:
        text = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
        self._line.send("failed", text)


def main(line: int) -> None:
    """Be the engine process.

    Args:
        line: Descriptor of the line to the supervisor.
    """
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)  # the supervisor says when

    async def run() -> None:
        await EngineProcess(socket.socket(fileno=line)).run()

    uvloop.run(run())
