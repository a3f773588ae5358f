"""The infer paths, from an ASGI request to its answer.

``InferBranch`` is called ahead of FastAPI's router, whose routing alone costs three times a whole bare request.
Answers are not compressed, not even for clients that send ``Accept-Encoding``: some clients always send it, and tensors
compress badly for the time it takes.

Source: the Open Inference Protocol, and its binary tensor data extension for ``Inference-Header-Content-Length``.
"""

import asyncio
import math
import time
from collections.abc import Mapping

import msgspec
from starlette.types import Receive, Scope, Send

from server.errors import MalformedRequest, SlipstreamError
from server.http import JSON, Answer, ClientLeft, answer_of, method_not_allowed, read_body, send_answer
from server.metrics import Metrics, ModelMetrics
from server.model import Model
from server.repository import Repository
from server.tensors import InferRequest, InferResponse
from server.wire import Decoded, ReplyFormat, decode, encode

# JSON beyond this is read and written in a worker thread: at 64 KiB it takes about half a millisecond, during which
# the loop would answer nobody.
LARGE_JSON_BYTES = 64 * 1024
# A request that waits longer gets a task that watches for its client's departure. Measured per request on uvloop: the
# timer 1 us, such a task from the start 5 to 9 us, ``asyncio.wait`` on two tasks 15 us.
WATCH_AFTER_S = 0.05
CANCELLED = "cancelled"


class InferBranch:
    """Answers ``POST /v2/models/{name}[/versions/{version}]/infer``.

    Called on the event loop. When the client leaves, its queued request is cancelled; a run that started goes on.

    Args:
        max_body_bytes: Largest request body, also after decompression.
    """

    def __init__(self, repository: Repository, metrics: Metrics, max_body_bytes: int) -> None:
        self._repository, self._metrics, self._max_body_bytes = repository, metrics, max_body_bytes
        self._model_metrics: dict[tuple[str, str], ModelMetrics] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        """Answer one request for the model ``name``; an empty ``version`` means the default one."""
        arrived_s = time.perf_counter()
        model: Model | None = None
        answer: Answer | None = None
        code = "ok"
        try:
            if scope["method"] == "POST":
                model = self._repository.get(name, version)
                answer = await self._infer(model, dict(scope["headers"]), receive)
            else:
                answer = method_not_allowed("POST")
        except ClientLeft:
            code = CANCELLED
        except Exception as exc:  # noqa: BLE001  (the boundary where every error becomes an answer)
            code = exc.code if isinstance(exc, SlipstreamError) else SlipstreamError.code
            answer = answer_of(exc, expects_continue=_expects_continue(scope))
        if model is not None:
            self._metrics_of(model).request_finished(code, time.perf_counter() - arrived_s)
        if answer is not None:
            await send_answer(send, answer)

    async def _infer(self, model: Model, headers: Mapping[bytes, bytes], receive: Receive) -> Answer:
        body = await read_body(headers, receive, self._max_body_bytes)
        decoded = await _decode(body, headers, model)
        request = _with_headers(decoded.request, headers)
        response = await _while_connected(model, request, receive)
        return await _answer_with(response, decoded.reply)

    def _metrics_of(self, model: Model) -> ModelMetrics:
        key = (model.name, model.version)
        found = self._model_metrics.get(key)
        if found is None:
            found = self._model_metrics[key] = ModelMetrics(self._metrics, *key)
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


def _expects_continue(scope: Scope) -> bool:
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"])


async def _decode(body: bytes, headers: Mapping[bytes, bytes], model: Model) -> Decoded:
    header_length = _header_length(headers)
    raw_input = model.signature.inputs[0] if header_length == 0 and len(model.signature.inputs) == 1 else None
    json_bytes = len(body) if header_length is None else header_length
    if json_bytes <= LARGE_JSON_BYTES:
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
    """Fill in what the body leaves open from ``slipstream-variant`` and ``slipstream-timeout-ms``."""
    variant = headers.get(b"slipstream-variant")
    if variant is not None and not request.variant:
        request = msgspec.structs.replace(request, variant=variant.decode("latin-1"))
    timeout = headers.get(b"slipstream-timeout-ms")
    if timeout is not None and request.timeout_s is None:
        request = msgspec.structs.replace(request, timeout_s=_timeout_s(timeout.decode("latin-1")))
    return request


def _timeout_s(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise MalformedRequest(f"slipstream-timeout-ms is {text!r}; it must be a number of milliseconds above 0")
    return milliseconds / 1e3


async def _while_connected(model: Model, request: InferRequest, receive: Receive) -> InferResponse:
    """Await the model's response, and cancel the request when its client leaves.

    Raises:
        ClientLeft: If the client left first.
    """
    departure = _Departure(receive)
    try:
        return await model.infer(request)
    except asyncio.CancelledError:
        if not departure.noticed:
            raise
        departure.task.uncancel()
        raise ClientLeft from None
    finally:
        departure.stop()


class _Departure:
    """Cancels the current task once its client has left; costs one timer for requests that are answered soon."""

    __slots__ = ("_receive", "_timer", "_watcher", "noticed", "task")

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request must be answered in a task")
        self.task, self.noticed, self._receive = task, False, receive
        self._watcher: asyncio.Task[None] | None = None
        self._timer = task.get_loop().call_later(WATCH_AFTER_S, self._start)

    def stop(self) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    def _start(self) -> None:
        self._watcher = self.task.get_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.noticed = True
        self.task.cancel()


async def _answer_with(response: InferResponse, reply: ReplyFormat) -> Answer:
    is_binary = reply.outputs
    json_arrays = [array for name, array in response.outputs.items() if not is_binary.get(name, reply.binary)]
    if sum(array.nbytes for array in json_arrays) <= LARGE_JSON_BYTES:
        encoded = encode(response, reply)
    else:
        encoded = await asyncio.get_running_loop().run_in_executor(None, encode, response, reply)
    headers = [
        (b"content-type", JSON if encoded.json_length is None else b"application/octet-stream"),
        (b"content-length", b"%d" % sum(len(part) for part in encoded.parts)),
        (b"slipstream-variant", response.variant.encode("latin-1", "replace")),
        (b"slipstream-device", response.device.encode("latin-1", "replace")),
        (b"slipstream-batch-rows", b"%d" % response.batch_rows),
        (b"slipstream-queue-ms", b"%.3f" % (response.queue_s * 1e3)),
        (b"slipstream-compute-ms", b"%.3f" % (response.compute_s * 1e3)),
    ]
    if encoded.json_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % encoded.json_length))
    return Answer(200, headers, encoded.parts)
