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
from server.messages import Buffer, Codec, Codecs, Encoded, Finished, Found, Inferred
from server.serving import How
from server.tensors import InferRequest, InferResponse

# What a request waits for room in the memory that is shared with the engine, before it is refused.
ROOM_TIMEOUT_S: Final = 0.1
_RETRY_FULL_S: Final = 1.0
_NOT_YET: Final = "the engine is starting; try again"
_GONE: Final = "the engine ended and is being restarted; try again"


class RemoteModel:
    """A model of the engine."""

    def __init__(self, engine: "RemoteEngine", found: Found) -> None:
        self.name, self.version, self.signature = found.name, found.version, found.signature
        self.target, self.engine = found.target, engine

    def begin(self, request: InferRequest) -> "asyncio.Future[Inferred] | None":
        """Have the engine run one request; ``None`` if there is no room for it now. See ``RemoteEngine.begin``."""
        return self.engine.begin(channel.INFER, self.engine.codecs.infer.encode(request), self.target)

    def finish(self, request: InferRequest, outcome: Inferred) -> tuple[InferResponse, How]:  # noqa: ARG002  (of all)
        """Make the response to a request of what its future gave, and say where the engine had it from."""
        return outcome.response, outcome.how

    async def infer(self, request: InferRequest) -> InferResponse:
        """Have the engine run one request; see ``RemoteEngine.call`` for what it raises."""
        answer: Inferred = await self.engine.call(channel.INFER, self.engine.codecs.infer.encode(request), self.target)
        return answer.response


class RemoteModels:
    """The models of the engine that were asked for so far."""

    def __init__(self, engine: "RemoteEngine") -> None:
        self._engine = engine
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
        self._known[name, version] = RemoteModel(self._engine, found)

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
        engine = model.engine
        answer: Inferred = await engine.call(channel.INFER, engine.codecs.infer.encode(request), model.target)
        return answer.response, answer.how


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

    def request_finished(self, code: str, seconds: float) -> None:
        """Count one answer: ``ok`` or an error's code, and its time since arrival."""
        self._engine.finished(self._name, self._version, code, seconds)


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
        self._finished: list[tuple[str, str, str, float]] = []
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
        self._calls[number] = future = self._loop.create_future()
        future.add_done_callback(partial(self._end, opened, number))
        return future

    def _end(self, opened: Channel, number: int, future: "asyncio.Future[Any]") -> None:
        self._calls.pop(number, None)
        if future.cancelled():
            opened.post(channel.CANCEL, 0, number)

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
        opened = self._channel
        if opened is None or self.reason:
            raise Unavailable(self.reason)
        self._last_call = number = self._last_call + 1
        self._calls[number] = future = self._loop.create_future()
        try:
            if not opened.post(kind, target, number, message):
                await self._post_later(opened, kind, target, number, message)
            return await future
        except asyncio.CancelledError:
            opened.post(channel.CANCEL, 0, number)
            raise
        finally:
            self._calls.pop(number, None)

    def finished(self, name: str, version: str, code: str, seconds: float) -> None:
        """Count an answered request; the engine hears of it with what is sent at the end of this iteration."""
        if not self._finished:
            self._loop.call_soon(self._tell_finished)
        self._finished.append((name, version, code, seconds))

    async def wait_for_end(self) -> None:
        """Return when the engine that is connected has ended; at once if there is none."""
        if self._channel is not None:
            await self._gone.wait()

    def close(self) -> None:
        """Give up the engine."""
        if self._channel is not None:
            self._channel.close()

    async def _post_later(self, opened: Channel, kind: int, target: int, number: int, message: Encoded) -> None:
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                while not opened.post(kind, target, number, message):
                    room = self._loop.create_future()
                    self._wanting_room.append(room)
                    await room
        except TimeoutError:
            raise QueueFull(
                f"no room for the {message.size_bytes} bytes of the request in the {self._slab_bytes} bytes that are "
                "shared with the engine: too much is under way; retry later (or set --slab-bytes)",
                _RETRY_FULL_S,
            ) from None

    def _wake(self) -> None:
        while self._wanting_room:
            room = self._wanting_room.popleft()
            if not room.done():
                room.set_result(None)

    def _tell_finished(self) -> None:
        if self._finished and self._channel is not None and not self.reason:
            message = self.codecs.finished.encode(Finished(self._finished))
            if self._channel.post(channel.FINISHED, message=message):
                self._finished = []

    def _receive(self, kind: int, target: int, number: int, message: Buffer, head_bytes: int) -> None:
        if kind == channel.HELLO:
            self.reason = ""
            self._tell_finished()
            self._connected()
            return
        if kind == channel.FORGET:
            if self.forget is not None:
                self.forget(target)
            return
        future = self._calls.get(number)
        if future is None or future.done():
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
        for future in self._calls.values():
            if not future.done():
                future.set_exception(Unavailable("the engine ended while it had the request; try again"))
        self._wake()
        if self.forget is not None:
            self.forget(None)
        self._gone.set()
