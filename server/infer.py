"""Infer requests, from their head and body to their answer.

An exchange on a connection (``server.connection``) calls ``InferBranch`` past ASGI and FastAPI, whose routing alone
costs three times a whole bare request. Answers are not compressed, not even for clients that send ``Accept-Encoding``:
some clients always send it, and tensors compress badly for the time it takes.

Source: the Open Inference Protocol, and its binary tensor data extension for ``Inference-Header-Content-Length``; W3C
Server Timing.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from server.errors import MalformedRequest, SlipstreamError
from server.http import (
    JSON,
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
from server.tensors import PRIORITIES, InferRequest, InferResponse
from server.wire import Decoded, Encoded, ReplyFormat, decode, encode

# A version that was replaced answers for some seconds more what had found it.
SLOW_BODY_S = 1.0
CANCELLED = "cancelled"
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

    async def body(self) -> bytes | bytearray:
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
        max_body_bytes: Largest request body, also after decompression.
        cache: Keeps answers; ``None`` keeps none, and costs nothing.
        look_up: Awaited before a model of that name and version is asked for; ``None`` where nothing is to be awaited.
    """

    def __init__(
        self,
        models: Models[_Model],
        counters: RequestCounters,
        max_body_bytes: int,
        cache: Cache[_Model] | None = None,
        look_up: Callable[[str, str], Awaitable[None]] | None = None,
    ) -> None:
        self._models, self._counters, self.max_body_bytes = models, counters, max_body_bytes
        self._cache, self._look_up = cache, look_up
        self._counter_of: dict[tuple[str, str], RequestCounter] = {}

    async def answer(self, call: Call) -> Answer:
        """Answer one request, with an error if it must be.

        Cancel it when its client leaves: then its queued request is dropped; a run that started goes on.
        """
        arrived_s = time.perf_counter()
        model: _Model | None = None
        code = "ok"
        try:
            if self._look_up is not None:
                await self._look_up(call.name, call.version)
            model = self._models.get(call.name, call.version)
            return await self._infer(model, call, arrived_s)
        except (asyncio.CancelledError, ClientLeft):
            code = CANCELLED
            raise
        except Exception as exc:  # noqa: BLE001  (the boundary where every error becomes an answer)
            code = exc.code if isinstance(exc, SlipstreamError) else SlipstreamError.code
            return answer_of(exc, expects_continue=call.expects_continue)
        finally:
            if model is not None:
                self._counter(model).request_finished(code, time.perf_counter() - arrived_s)

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

    async def _infer(self, model: _Model, call: Call, arrived_s: float) -> Answer:
        headers = call.headers
        check_head(headers, self.max_body_bytes)
        body = await call.body()
        if b"content-encoding" in headers:
            body = await decompressed(body, headers, self.max_body_bytes)
        if time.perf_counter() - arrived_s > SLOW_BODY_S:
            # The one found before may have been replaced meanwhile.
            model = self._models.get(model.name, call.version)
        decoded = await _decode(body, headers, model)
        request = _with_headers(decoded.request, headers)
        how: How = "miss"
        if self._cache is None:
            response = await model.infer(request)
        else:
            response, how = await self._cache.infer(model, request)
        encoded = await _encode(response, decoded.reply)
        return Answer(200, _headers(response, encoded, how, time.perf_counter() - arrived_s), encoded.parts)

    def _counter(self, model: Model) -> RequestCounter:
        key = (model.name, model.version)
        found = self._counter_of.get(key)
        if found is None:
            found = self._counter_of[key] = self._counters.of_model(*key)
        return found


class _AsgiCall:
    expects_continue = False  # the server that called has seen to it

    def __init__(self, scope: Scope, receive: Receive, name: str, version: str, limit_bytes: int) -> None:
        self.name, self.version, self.headers = name, version, dict(scope["headers"])
        self._receive, self._limit_bytes = receive, limit_bytes

    async def body(self) -> bytes | bytearray:
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
