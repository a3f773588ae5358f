"""The infer paths, from an ASGI request to its answer.

``InferBranch`` is called ahead of FastAPI's router, whose routing alone costs three times a whole bare request.
Answers are not compressed, not even for clients that send ``Accept-Encoding``: some clients always send it, and tensors
compress badly for the time it takes.

Source: the Open Inference Protocol, and its binary tensor data extension for ``Inference-Header-Content-Length``; W3C
Server Timing.
"""

import asyncio
import math
import time
from collections.abc import Coroutine, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from server.alarms import Alarms
from server.cache import How
from server.errors import MalformedRequest, SlipstreamError
from server.http import JSON, Answer, ClientLeft, ReadTimeout, answer_of, method_not_allowed, read_body, send_answer
from server.json_numbers import SLICE_BYTES, SLICE_NUMBERS
from server.serving import Cache, Model, Models, RequestCounter, RequestCounters
from server.tensors import PRIORITIES, InferRequest, InferResponse
from server.wire import Decoded, Encoded, ReplyFormat, decode, encode

# A request that waits longer gets a task that watches for its client's departure; such a task from the start would cost
# 5 to 9 us per request on uvloop.
WATCH_AFTER_S = 0.05
# A version that was replaced answers for some seconds more what had found it.
SLOW_BODY_S = 1.0
CANCELLED = "cancelled"
_Result = TypeVar("_Result")
_Model = TypeVar("_Model", bound=Model)


class InferBranch(Generic[_Model]):
    """Answers ``POST /v2/models/{name}[/versions/{version}]/infer``.

    Called on the event loop. When the client leaves, its queued request is cancelled; a run that started goes on.

    Args:
        models: Where models are found.
        counters: Where requests are counted.
        max_body_bytes: Largest request body, also after decompression.
        body_timeout_s: Seconds that a body may take to come.
        cache: Keeps answers; ``None`` keeps none, and costs nothing.
    """

    def __init__(
        self,
        models: Models[_Model],
        counters: RequestCounters,
        max_body_bytes: int,
        body_timeout_s: float = 60.0,
        cache: Cache[_Model] | None = None,
    ) -> None:
        self._models, self._counters, self._max_body_bytes = models, counters, max_body_bytes
        self._clock, self._watches, self._cache = ReadTimeout(body_timeout_s), Alarms(WATCH_AFTER_S), cache
        self._counter_of: dict[tuple[str, str], RequestCounter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        """Answer one request for the model ``name``; an empty ``version`` means the default one."""
        arrived_s = time.perf_counter()
        model: _Model | None = None
        answer: Answer | None = None
        code = "ok"
        try:
            if scope["method"] == "POST":
                model = self._models.get(name, version)
                answer = await self._infer(model, version, dict(scope["headers"]), receive, arrived_s)
            else:
                answer = method_not_allowed("POST")
        except ClientLeft:
            code = CANCELLED
        except Exception as exc:  # noqa: BLE001  (the boundary where every error becomes an answer)
            code = exc.code if isinstance(exc, SlipstreamError) else SlipstreamError.code
            answer = answer_of(exc, expects_continue=expects_continue(scope))
        if model is not None:
            self._counter(model).request_finished(code, time.perf_counter() - arrived_s)
        if answer is not None:
            await send_answer(send, answer)

    async def _infer(
        self, model: _Model, version: str, headers: Mapping[bytes, bytes], receive: Receive, arrived_s: float
    ) -> Answer:
        body = await read_body(headers, receive, self._max_body_bytes, self._clock)
        if time.perf_counter() - arrived_s > SLOW_BODY_S:
            model = self._models.get(model.name, version)  # the one found before may have been replaced meanwhile
        decoded = await _decode(body, headers, model)
        request = _with_headers(decoded.request, headers)
        how: How = "miss"
        if self._cache is None:
            response = await _while_connected(model.infer(request), receive, self._watches)
        else:
            response, how = await _while_connected(self._cache.infer(model, request), receive, self._watches)
        encoded = await _encode(response, decoded.reply)
        return Answer(200, _headers(response, encoded, how, time.perf_counter() - arrived_s), encoded.parts)

    def _counter(self, model: Model) -> RequestCounter:
        key = (model.name, model.version)
        found = self._counter_of.get(key)
        if found is None:
            found = self._counter_of[key] = self._counters.of_model(*key)
        return found


def infer_target(path: str) -> tuple[str, str] | None:
    """Return name and version ("" when not given) of an infer path, ``None`` for every other path."""
    if not (path.endswith("/infer") and path.startswith("/v2/models/")):
        return None
    middle = path[len("/v2/models/") : -len("/infer")]
    name, separator, version = middle.partition("/versions/")
    if not name or "/" in name or "/" in version or (separator and not version):
        return None
    return name, version


def expects_continue(scope: Scope) -> bool:
    """Return whether a client waits for ``100 Continue`` before it sends the body of its request."""
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"])


# Longer JSON than one slice is read and written in a worker thread. One slice would hold the GIL there as long as here,
# and the thread costs another 0.15 ms.
async def _decode(body: bytes | bytearray, headers: Mapping[bytes, bytes], model: Model) -> Decoded:
    header_length = _header_length(headers)
    raw_input = model.signature.inputs[0] if header_length == 0 and len(model.signature.inputs) == 1 else None
    json_bytes = len(body) if header_length is None else header_length
    if json_bytes <= SLICE_BYTES:
        return decode(body, header_length, raw_input)
    return await asyncio.get_running_loop().run_in_executor(None, decode, body, header_length, raw_input)


def _header_length(headers: Mapping[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 10:
        seen = text.decode("latin-1")
        raise MalformedRequest(f"Inference-Header-Content-Length is {seen!r}; it must be a number of bytes")
    return int(text)


def _with_headers(request: InferRequest, headers: Mapping[bytes, bytes]) -> InferRequest:
    """Fill in what the body leaves open from the headers ``slipstream-variant``, ``-timeout-ms``, ``-priority``.

    ``slipstream-client`` names whom the work counts for.
    """
    variant = headers.get(b"slipstream-variant")
    if variant is not None and not request.variant:
        request = msgspec.structs.replace(request, variant=variant.decode("latin-1"))
    timeout = headers.get(b"slipstream-timeout-ms")
    if timeout is not None and request.timeout_s is None:
        request = msgspec.structs.replace(request, timeout_s=_timeout_s(timeout.decode("latin-1")))
    priority = headers.get(b"slipstream-priority")
    if priority is not None and not request.priority:
        request = msgspec.structs.replace(request, priority=_priority(priority))
    client = headers.get(b"slipstream-client")
    if client is not None:
        request = msgspec.structs.replace(request, client=client.decode("latin-1"))
    return request


def _priority(text: bytes) -> int:
    if not text.isdigit() or int(text) not in PRIORITIES:
        raise MalformedRequest(f"slipstream-priority is {text.decode('latin-1')!r}; it is 1 (first) to 9 (last)")
    return int(text)


def _timeout_s(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise MalformedRequest(f"slipstream-timeout-ms is {text!r}; it must be a number of milliseconds above 0")
    return milliseconds / 1e3


async def _while_connected(answering: Coroutine[Any, Any, _Result], receive: Receive, watches: Alarms) -> _Result:
    """Await an answer, and cancel the answering when its client leaves.

    Raises:
        ClientLeft: If the client left first.
    """
    departure = _Departure(receive, watches)
    try:
        return await answering
    except asyncio.CancelledError:
        if not departure.noticed:
            raise
        departure.task.uncancel()
        raise ClientLeft from None
    finally:
        departure.stop()


class _Departure:
    """Cancels the current task once its client has left; costs one alarm for requests that are answered soon."""

    __slots__ = ("_receive", "_watcher", "_watches", "noticed", "task")

    def __init__(self, receive: Receive, watches: Alarms) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request must be answered in a task")
        self.task, self.noticed, self._receive, self._watches = task, False, receive, watches
        self._watcher: asyncio.Task[None] | None = None
        watches.set(self._start)

    def stop(self) -> None:
        self._watches.clear(self._start)
        if self._watcher is not None:
            self._watcher.cancel()

    def _start(self) -> None:
        self._watcher = self.task.get_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.noticed = True
        self.task.cancel()


async def _encode(response: InferResponse, reply: ReplyFormat) -> Encoded:
    is_binary = reply.outputs
    json_arrays = [array for name, array in response.outputs.items() if not is_binary.get(name, reply.binary)]
    if sum(array.size for array in json_arrays) <= SLICE_NUMBERS:
        return encode(response, reply)
    return await asyncio.get_running_loop().run_in_executor(None, encode, response, reply)


def _headers(response: InferResponse, encoded: Encoded, how: How, total_s: float) -> list[tuple[bytes, bytes]]:
    queue_ms, compute_ms = b"%.3f" % (response.queue_s * 1e3), b"%.3f" % (response.compute_s * 1e3)
    headers = [
        (b"content-type", JSON if encoded.json_length is None else b"application/octet-stream"),
        (b"content-length", b"%d" % sum(map(len, encoded.parts))),
        (b"slipstream-variant", response.variant.encode("latin-1", "replace")),
        (b"slipstream-device", response.device.encode("latin-1", "replace")),
        (b"slipstream-batch-rows", b"%d" % response.batch_rows),
        (b"slipstream-queue-ms", queue_ms),
        (b"slipstream-compute-ms", compute_ms),
        (b"server-timing", b"queue;dur=%b, compute;dur=%b, total;dur=%.3f" % (queue_ms, compute_ms, total_s * 1e3)),
    ]
    if encoded.json_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % encoded.json_length))
    if how != "miss":
        headers.append((b"slipstream-cache", how.encode()))
    return headers
