"""The engine and its models as a front end sees them: the same calls, answered over a channel by another process.

An engine that is gone fails what it was asked with ``Unavailable``, and so is everything refused until the next one
answers. What a front end knows of the models is forgotten when the engine says so, and with the engine.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from server import channel
from server.channel import Channel
from server.errors import ModelNotReady, QueueFull, Unavailable
from server.gathering import Gathering
from server.messages import Buffer, Codec, Codecs, Encoded, Finished, Found, Inferred
from server.serving import How
from server.tensors import InferRequest, InferResponse

# Answered requests are counted this much later, all that were answered meanwhile together.
FINISHED_DELAY_S: Final = 0.05
# What a request waits for room in the memory that is shared with the engine, before it is refused.
ROOM_TIMEOUT_S: Final = 0.1
_RETRY_FULL_S: Final = 1.0
_NOT_YET: Final = "the engine is starting; try again"
_GONE: Final = "the engine ended and is being restarted; try again"


class RemoteModel:
    """A model of the engine.

    Args:
        engine: The engine.
        found: What it has said of the model.
        gathers: Whether small requests may go to the engine together.
    """

    def __init__(self, engine: "RemoteEngine", found: Found, *, gathers: bool) -> None:
        self.name, self.version, self.signature = found.name, found.version, found.signature
        self.target, self.engine = found.target, engine
        self._gathering = Gathering(self._ask) if gathers else None

    def begin(self, request: InferRequest) -> "asyncio.Future[Inferred] | None":
        """Have the engine run one request; ``None`` if there is no room for it now. See ``RemoteEngine.begin``."""
        gathered = self._gathering.begin(request) if self._gathering is not None else None
        return self._begin(request) if gathered is None else gathered

    def _begin(self, request: InferRequest) -> "asyncio.Future[Inferred] | None":
        return self.engine.begin(channel.INFER, self.engine.codecs.infer.encode(request), self.target)

    def _ask(self, request: InferRequest) -> "asyncio.Future[Inferred]":
        begun = self._begin(request)
        return asyncio.ensure_future(self._call(request)) if begun is None else begun

    async def _call(self, request: InferRequest) -> Inferred:
        message = self.engine.codecs.infer.encode(request)
        outcome: Inferred = await self.engine.call(channel.INFER, message, self.target)
        return outcome

    def finish(self, request: InferRequest, outcome: Inferred) -> tuple[InferResponse, How]:
        """Make the response to a request of what its future gave, and say where the engine had it from."""
        response = outcome.response
        if self._gathering is not None:
            self._gathering.learn(request, outcome)
        if response.version != self.version:
            self.engine.moved(self.name, self.version, response.version)
        return response, outcome.how

    async def ask(self, request: InferRequest) -> tuple[InferResponse, How]:
        """Have the engine answer one request; see ``RemoteEngine.call`` for what it raises."""
        return self.finish(request, await self._call(request))

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one request; see ``ask``."""
        return (await self.ask(request))[0]


class RemoteModels:
    """The models of the engine that were asked for so far.

    Args:
        engine: The engine.
        gathers: Whether small requests may go to it together; not if it keeps answers, which it does by request.
    """

    def __init__(self, engine: "RemoteEngine", *, gathers: bool = True) -> None:
        self._engine, self._gathers = engine, gathers
        self._known: dict[tuple[str, str], RemoteModel] = {}
        engine.forget = self._forget

    def find(self, name: str, version: str = "") -> RemoteModel | None:
        """Return a model that was looked up; ``None`` if it was not, or has been forgotten."""
        return self._known.get((name, version))

    async def look_up(self, name: str, version: str) -> None:
        """Ask the engine for a model, unless it is known, so that ``get`` finds it.

        Raises:
            UnknownModel: If there is no such name or version.
            ModelNotReady: If it takes no requests now.
            Unavailable: If there is no engine.
        """
        if self.find(name, version) is not None:
            return
        message = self._engine.codecs.look_up.encode((name, version))
        found: Found = await self._engine.call(channel.LOOK_UP, message)
        self._known[name, version] = RemoteModel(self._engine, found, gathers=self._gathers)

    def get(self, name: str, version: str = "") -> RemoteModel:
        """Return a model that was looked up.

        Raises:
            ModelNotReady: If it was not, or has been forgotten.
        """
        model = self.find(name, version)
        if model is None:
            raise ModelNotReady(f"model '{name}' is being changed; try again")
        return model

    def _forget(self, target: int | None) -> None:
        self._known = {key: model for key, model in self._known.items() if target not in (None, model.target)}


class RemoteCache:
    """The engine's response cache: it answers, and this end learns where an answer came from."""

    async def infer(self, model: RemoteModel, request: InferRequest) -> tuple[InferResponse, How]:
        """Have the engine answer one request; return where it had the answer from, too."""
        return await model.ask(request)


class RemoteCounters:
    """Counts answered requests in the engine, which keeps all metrics."""

    def __init__(self, engine: "RemoteEngine") -> None:
        self._engine = engine

    def of_model(self, name: str, version: str) -> "RemoteCounter":
        """Return a counter for a model version."""
        return RemoteCounter(self._engine, name, version)


class RemoteCounter:
    """Counts the requests of one model version."""

    def __init__(self, engine: "RemoteEngine", name: str, version: str) -> None:
        self._engine, self._name, self._version = engine, name, version

    def request_finished(self, code: str, seconds: float, trace_id: str = "") -> None:
        """Count one answer: ``ok`` or an error's code, its time since arrival, and its trace if it has one."""
        self._engine.finished(self._name, self._version, code, seconds, trace_id)


class _Call(asyncio.Future[Any]):
    """An answer to come; whoever cancels it no longer wants it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, withdraw: Callable[[], None]) -> None:
        super().__init__(loop=loop)
        self._withdraw = withdraw

    def cancel(self, msg: object = None) -> bool:
        is_cancelled = super().cancel(msg)
        if is_cancelled:
            self._withdraw()
        return is_cancelled


class RemoteEngine:
    """Calls to the engine of this machine. Use it on the event loop.

    Args:
        slab_bytes: Memory for requests under way, shared with the engine.
        connected: Called whenever an engine begins to answer.
        lost: Called whenever an engine is gone.

    Attributes:
        reason: Why the engine cannot be asked now; empty when it can.
        codecs: How messages are written and read.
        forget: Called with the number of a model that changed, and with ``None`` when all are to be asked for anew.
    """

    def __init__(self, slab_bytes: int, connected: Callable[[], None], lost: Callable[[], None]) -> None:
        self.reason = _NOT_YET
        self.codecs = Codecs()
        self.forget: Callable[[int | None], None] | None = None
        self._slab_bytes, self._connected, self._report_lost = slab_bytes, connected, lost
        self._channel: Channel | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_call = 0
        self._wanting_room: deque[asyncio.Future[None]] = deque()
        self._finished: dict[tuple[str, str, str, str], list[float]] = {}
        self._moved: dict[tuple[str, str], list[str]] = {}  # name and version -> versions that answered in its place
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._answers: dict[int, Codec[Any]] = {
            channel.FOUND: self.codecs.found,
            channel.INFERRED: self.codecs.inferred,
            channel.ANSWER: self.codecs.http_answer,
        }

    def connect(self, connection: socket.socket) -> None:
        """Turn to a new engine, and give up the one before.

        Raises:
            OSError: If there is no memory to share with it.
        """
        if self._channel is not None:
            self._channel.close()
            self._give_up()
        opened = Channel(connection, self._slab_bytes, leases=False, received=self._receive, lost=self._lost)
        opened.made_room = self._wake
        self._channel = opened
        self._gone.clear()

    def begin(self, kind: int, message: Encoded, target: int = 0) -> "asyncio.Future[Any] | None":
        """Ask the engine, as ``call`` does, if there is room for it now.

        Returns:
            A future of the decoded answer; cancelling it cancels the request in the engine. ``None`` without room.

        Raises:
            Unavailable: If there is no engine.
        """
        opened = self._channel
        if opened is None or self.reason:
            raise Unavailable(self.reason)
        self._last_call = number = self._last_call + 1
        if not opened.post(kind, target, number, message):
            return None
        self._calls[number] = call = _Call(self._loop, partial(self._withdraw, opened, number))
        return call

    async def call(self, kind: int, message: Encoded, target: int = 0) -> Any:
        """Ask the engine; return its decoded answer. Cancelling the call cancels the request in the engine.

        Args:
            kind: A kind of descriptor.
            message: The request; its arrays are copied before the first wait for an answer.
            target: The model that it is for.

        Raises:
            Unavailable: If there is no engine, or if it ends meanwhile.
            QueueFull: If the memory shared with the engine stays full.
            SlipstreamError: Whatever the engine answers with.
        """
        begun = self.begin(kind, message, target)
        return await (begun if begun is not None else await self._begin_later(kind, message, target))

    def moved(self, name: str, version: str, by: str) -> None:
        """Learn that another version has answered a request to this one; the request is counted for the other."""
        self._moved.setdefault((name, version), []).append(by)

    def finished(self, name: str, version: str, code: str, seconds: float, trace_id: str = "") -> None:
        """Count an answered request; the engine hears of it ``FINISHED_DELAY_S`` later, if it is there."""
        if code == "ok" and (moved := self._moved.get((name, version))):
            version = moved.pop()
        if not self._finished:
            self._loop.call_later(FINISHED_DELAY_S, self.tell_finished)
        self._finished.setdefault((name, version, code, trace_id), []).append(seconds)

    def tell_finished(self) -> None:
        """Tell the engine now what has been answered so far."""
        if not self._finished or self._channel is None or self.reason:
            return  # the next engine is told when it says hello
        requests = [(*key, seconds) for key, seconds in self._finished.items()]
        if self._channel.post(channel.FINISHED, message=self.codecs.finished.encode(Finished(requests))):
            self._finished = {}
        else:
            self._loop.call_later(FINISHED_DELAY_S, self.tell_finished)

    async def wait_for_end(self) -> None:
        """Return when the engine that is connected has ended; at once if there is none."""
        if self._channel is not None:
            await self._gone.wait()

    def close(self) -> None:
        """Give up the engine."""
        if self._channel is not None:
            self._channel.close()

    async def _begin_later(self, kind: int, message: Encoded, target: int) -> "asyncio.Future[Any]":
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                while (begun := self.begin(kind, message, target)) is None:
                    room = self._loop.create_future()
                    self._wanting_room.append(room)
                    await room
                return begun
        except TimeoutError:
            raise QueueFull(
                f"no room for the {message.size_bytes} bytes of the request: other requests under way take up the "
                f"memory that is shared with the engine ({self._slab_bytes} bytes); retry later, or raise --slab-bytes",
                _RETRY_FULL_S,
            ) from None

    def _withdraw(self, opened: Channel, number: int) -> None:
        self._calls.pop(number, None)
        opened.post(channel.CANCEL, 0, number)

    def _wake(self) -> None:
        while self._wanting_room:
            room = self._wanting_room.popleft()
            if not room.done():
                room.set_result(None)

    def _receive(self, kind: int, target: int, number: int, message: Buffer, head_bytes: int) -> None:
        if kind == channel.HELLO:
            self.reason = ""
            self.tell_finished()
            self._connected()
            return
        if kind == channel.FORGET:
            if self.forget is not None:
                self.forget(target)
            return
        future = self._calls.pop(number, None)
        if future is None:
            return  # cancelled meanwhile
        if kind == channel.FAILURE:
            future.set_exception(self.codecs.failure.decode(message, head_bytes).to_error())
        else:
            future.set_result(self._answers[kind].decode(message, head_bytes))

    def _lost(self) -> None:
        self._give_up()
        self._report_lost()

    def _give_up(self) -> None:
        self._channel, self.reason = None, _GONE
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.set_exception(Unavailable("the engine ended while it had the request; try again"))
        self._wake()
        if self.forget is not None:
            self.forget(None)
        self._gone.set()
