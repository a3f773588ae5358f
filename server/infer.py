"""Infer requests, from their head and body to their answer.

An exchange on a connection (``server.connection``) calls ``InferBranch`` past ASGI and FastAPI, whose routing alone
costs three times a whole bare request. Answers are not compressed, not even for clients that send ``Accept-Encoding``:
some clients always send it, and tensors compress badly for the time it takes.

Source: the Open Inference Protocol, and its binary tensor data extension for ``Inference-Header-Content-Length``.
"""

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from server.errors import DeadlineUnmeetable, SlipstreamError
from server.headers import answer_headers, header_length, timeout_of, with_headers
from server.http import (
    Answer,
    ClientLeft,
    answer_of,
    check_head,
    decompressed,
    method_not_allowed,
    read_body,
    send_answer,
)
from server.json_numbers import SLICE_BYTES, SLICE_NUMBERS
from server.serving import Cache, How, Model, Models, RequestCounter, RequestCounters
from server.settings import Settings
from server.tensors import InferRequest, InferResponse
from server.wire import Decoded, Encoded, ReplyFormat, decode, encode

if TYPE_CHECKING:
    from server.tracing import Trace, Tracer

# A version that was replaced answers for some seconds more what had found it.
SLOW_BODY_S = 1.0
CANCELLED = "cancelled"
# What has waited for this share of its timeout before it was even read has no time left to wait for the rest.
UNREAD_SHARE = 0.5
# Made once: whoever is refused like this has no time for more.
_UNREAD = answer_of(DeadlineUnmeetable("more requests come than can be read: retry later or allow more time", 1.0))
Body = bytes | bytearray
Answered = Callable[[Answer], None]
_Model = TypeVar("_Model", bound=Model)


class Call(Protocol):
    """One request, as its transport hands it over."""

    @property
    def name(self) -> str:
        """The model."""

    @property
    def version(self) -> str:
        """Its version; empty for the default one."""

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """Name in lower case -> value."""

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for ``100 Continue`` before it sends the body."""

    @property
    def waited_s(self) -> float:
        """Seconds that it waited before it was read."""

    async def body(self) -> Body:
        """Return the whole body, as it was sent.

        Raises:
            BodyTooLarge: As soon as it exceeds the limit.
            RequestTimeout: If it does not come in time.
        """


class InferBranch(Generic[_Model]):
    """Answers ``POST /v2/models/{name}[/versions/{version}]/infer``, on the event loop.

    Args:
        models: Where models are found.
        counters: Where requests are counted.
        settings: The largest body, also after decompression, and the deadline of requests that name none.
        cache: Keeps answers; ``None`` keeps none, and costs nothing.
        look_up: Awaited before a model of that name and version is asked for; ``None`` where nothing is to be awaited.
        cached_by_models: Whether it is the models themselves that keep answers.
    """

    def __init__(
        self,
        models: Models[_Model],
        counters: RequestCounters,
        settings: Settings,
        cache: Cache[_Model] | None = None,
        look_up: Callable[[str, str], Awaitable[None]] | None = None,
        *,
        cached_by_models: bool = False,
    ) -> None:
        self._models, self._counters, self._cache, self._look_up = models, counters, cache, look_up
        self.max_body_bytes, self._default_timeout_s = settings.max_body_bytes, settings.default_timeout_s
        self._begins = cache is None or cached_by_models
        self._counter_of: dict[tuple[str, str], RequestCounter] = {}
        self._tracer = _tracer_of(settings)

    def begin(self, call: Call, body: Body, answered: Answered) -> Callable[[], object] | None:
        """Answer one request without a task, if nothing but its run has to be waited for.

        A task and its coroutines cost a small request a tenth of its time.

        Args:
            call: The request.
            body: Its body.
            answered: Called with the answer, now or later; not if the run was cancelled.

        Returns:
            What cancels the run, for a client that leaves; ``None`` if ``answer`` must be awaited instead.
        """
        model = self._models.find(call.name, call.version)
        if model is None or not self._begins or b"content-encoding" in call.headers:
            return None
        trace = self._tracer.begin(call.headers) if self._tracer is not None else None
        turn = _Turn(self._counter(model), model, answered, trace)
        try:
            if call.waited_s > 0 and self._is_hopeless(call):
                turn.refuse()
                return _nothing
            return turn.begin(call, body)
        except Exception as exc:  # noqa: BLE001  (as in answer)
            turn.fail(exc)
            return _nothing

    def close(self) -> None:
        """Send the traces that are left."""
        if self._tracer is not None:
            self._tracer.close()

    def _is_hopeless(self, call: Call) -> bool:
        """Whether too little time is left to run a request and write its answer; then none must be spent on it."""
        timeout_s = timeout_of(call.headers) or self._default_timeout_s
        return 0 < timeout_s * UNREAD_SHARE < call.waited_s

    async def answer(self, call: Call) -> Answer:
        """Answer one request, with an error if it must be.

        Cancel it when its client leaves: then its queued request is dropped; a run that started goes on.
        """
        arrived_s = time.perf_counter()
        trace = self._tracer.begin(call.headers) if self._tracer is not None else None
        model: _Model | None = None
        code = "ok"
        try:
            if self._look_up is not None:
                await self._look_up(call.name, call.version)
            model = self._models.get(call.name, call.version)
            return await self._infer(model, call, arrived_s, trace)
        except (asyncio.CancelledError, ClientLeft):
            code = CANCELLED
            raise
        except Exception as exc:  # noqa: BLE001  (the boundary where every error becomes an answer)
            code = _code_of(exc)
            return answer_of(exc, expects_continue=call.expects_continue)
        finally:
            taken_s = time.perf_counter() - arrived_s
            if trace is not None and code != "ok":
                trace.end(call.name, call.version, code)
            if model is not None:
                self._counter(model).request_finished(code, taken_s, trace.id if trace is not None else "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        """Answer one ASGI request, for whoever mounts the application in another server.

        Other servers than this one do not say that a client has left, nor bound the time that a body takes.
        """
        if scope["method"] != "POST":
            await send_answer(send, method_not_allowed("POST"))
            return
        try:
            await send_answer(send, await self.answer(_AsgiCall(scope, receive, name, version, self.max_body_bytes)))
        except ClientLeft:
            return

    async def _infer(self, model: _Model, call: Call, arrived_s: float, trace: "Trace | None") -> Answer:
        loop, headers = asyncio.get_running_loop(), call.headers
        check_head(headers, self.max_body_bytes)
        body = await call.body()
        if b"content-encoding" in headers:
            body = await decompressed(body, headers, self.max_body_bytes)
        if time.perf_counter() - arrived_s > SLOW_BODY_S:
            # The one found before may have been replaced meanwhile.
            model = self._models.get(model.name, call.version)
        if _is_short(body, headers):
            request, reply = _read(call, body, model)
        else:
            request, reply = await loop.run_in_executor(None, _read, call, body, model)
        how: How = "miss"
        if self._cache is None:
            response = await model.infer(request)
        else:
            response, how = await self._cache.infer(model, request)
        if trace is not None:
            trace.ran()
        if _is_brief(response, reply):
            encoded = encode(response, reply)
        else:
            encoded = await loop.run_in_executor(None, encode, response, reply)
        if trace is not None:
            trace.end(response.model, response.version, "ok", response)
        return _answer(response, encoded, how, arrived_s)

    def _counter(self, model: Model) -> RequestCounter:
        key = (model.name, model.version)
        found = self._counter_of.get(key)
        if found is None:
            found = self._counter_of[key] = self._counters.of_model(*key)
        return found


class _Turn:
    """One request that is answered without a task."""

    __slots__ = ("_answered", "_arrived_s", "_counter", "_model", "_reply", "_request", "_trace")

    _request: InferRequest
    _reply: ReplyFormat

    def __init__(self, counter: RequestCounter, model: Model, answered: Answered, trace: "Trace | None") -> None:
        self._counter, self._model, self._answered, self._trace = counter, model, answered, trace
        self._arrived_s = time.perf_counter()

    def begin(self, call: Call, body: Body) -> Callable[[], object] | None:
        if not _is_short(body, call.headers):
            return None
        self._request, self._reply = _read(call, body, self._model)
        run = self._model.begin(self._request)
        if run is None:
            return None
        run.add_done_callback(self._ran)
        return run.cancel

    def fail(self, error: Exception) -> None:
        self._count(_code_of(error))
        self._answered(answer_of(error))

    def refuse(self) -> None:
        self._count(DeadlineUnmeetable.code)
        self._answered(_UNREAD)

    def _ran(self, run: "asyncio.Future[Any]") -> None:
        if run.cancelled():
            self._count(CANCELLED)
            return
        try:
            response, how = self._model.finish(self._request, run.result())
            if self._trace is not None:
                self._trace.ran()
            if _is_brief(response, self._reply):
                self._written(response, how, encode(response, self._reply))
            else:
                writing = run.get_loop().run_in_executor(None, encode, response, self._reply)
                writing.add_done_callback(partial(self._wrote, response, how))
        except Exception as exc:  # noqa: BLE001  (as in answer)
            self.fail(exc)

    def _wrote(self, response: InferResponse, how: How, writing: "asyncio.Future[Encoded]") -> None:
        try:
            self._written(response, how, writing.result())
        except Exception as exc:  # noqa: BLE001  (as in answer)
            self.fail(exc)

    def _written(self, response: InferResponse, how: How, encoded: Encoded) -> None:
        answer = _answer(response, encoded, how, self._arrived_s)
        self._count("ok", response)
        self._answered(answer)

    def _count(self, code: str, response: InferResponse | None = None) -> None:
        taken_s, trace_id = time.perf_counter() - self._arrived_s, ""
        if self._trace is not None:
            self._trace.end(self._model.name, self._model.version, code, response)
            trace_id = self._trace.id
        self._counter.request_finished(code, taken_s, trace_id)


class Application(Protocol):
    """An ASGI application, as the listener and its connections see it.

    Attributes:
        draining: Set when the server is about to stop: ``ready`` then answers 503 while requests are still served.
    """

    draining: bool

    @property
    def settings(self) -> Settings:
        """What the server was told."""

    @property
    def infer(self) -> InferBranch[Any]:
        """Answers infer requests."""

    def listens_on(self, url: str, fail: Callable[[BaseException], None]) -> None:
        """Learn that connections are accepted.

        Args:
            url: Where.
            fail: To be called, once, with the reason if there turns out to be nothing to serve.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope."""


class _AsgiCall:
    expects_continue, waited_s = False, 0.0  # the server that called knows of that

    def __init__(self, scope: Scope, receive: Receive, name: str, version: str, limit_bytes: int) -> None:
        self.name, self.version, self.headers = name, version, dict(scope["headers"])
        self._receive, self._limit_bytes = receive, limit_bytes

    async def body(self) -> Body:
        return await read_body(self._receive, self._limit_bytes)


def infer_target(path: str) -> tuple[str, str] | None:
    """Return name and version ("" when not given) of an infer path, ``None`` for every other path."""
    if not (path.endswith("/infer") and path.startswith("/v2/models/")):
        return None
    middle = path[len("/v2/models/") : -len("/infer")]
    name, separator, version = middle.partition("/versions/")
    if not name or "/" in name or "/" in version or (separator and not version):
        return None
    return name, version


def _tracer_of(settings: Settings) -> "Tracer | None":
    """Return a tracer if the settings name an endpoint; OpenTelemetry takes a third of a second to import."""
    if not settings.otlp_endpoint:
        return None
    made: Tracer = importlib.import_module("server.tracing").tracer_of(settings)
    return made


# Longer JSON than one slice is read and written in a worker thread. One slice would hold the GIL there as long as here,
# and the thread costs another 0.15 ms.
def _is_short(body: Body, headers: Mapping[bytes, bytes]) -> bool:
    length = header_length(headers)
    return (len(body) if length is None else length) <= SLICE_BYTES


def _is_brief(response: InferResponse, reply: ReplyFormat) -> bool:
    if reply.binary and not reply.outputs:
        return True
    is_binary = reply.outputs
    json_arrays = [array for name, array in response.outputs.items() if not is_binary.get(name, reply.binary)]
    return sum(array.size for array in json_arrays) <= SLICE_NUMBERS


def _read(call: Call, body: Body, model: Model) -> Decoded:
    length = header_length(call.headers)
    raw_input = model.signature.inputs[0] if length == 0 and len(model.signature.inputs) == 1 else None
    decoded = decode(body, length, raw_input)
    request = with_headers(decoded.request, call.headers)
    if call.waited_s and request.timeout_s is not None:
        request = msgspec.structs.replace(request, timeout_s=max(request.timeout_s - call.waited_s, 1e-6))
    return Decoded(request, decoded.reply)


def _answer(response: InferResponse, encoded: Encoded, how: How, arrived_s: float) -> Answer:
    return Answer(200, answer_headers(response, encoded, how, time.perf_counter() - arrived_s), encoded.parts)


def _code_of(error: Exception) -> str:
    return error.code if isinstance(error, SlipstreamError) else SlipstreamError.code


def _nothing() -> None:
    """Cancel what was answered already."""
