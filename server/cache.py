"""Answers kept for identical requests, and one run for identical requests in flight.

Two requests are identical when they name the same model, version, pinned variant and outputs, and when their inputs
agree in name, datatype, shape and every byte. They are told apart by a SHA-256 of all that, so that nobody can make a
request that gets the answer of another. (Where the processor has instructions for it, it is twice as fast as BLAKE2b.)

A model whose answers depend on the other rows of the batch, such as dynamic INT8, is cached like any other: a repeated
request gets the answer that the first one got in its batch. Without a pinned variant, the answer is that of the variant
which the router chose for the first.
"""

import asyncio
import hashlib
import sys
from collections import OrderedDict
from typing import Literal, Protocol

import msgspec
import numpy as np
import orjson

from server.errors import DeadlineExpired, DeadlineUnmeetable
from server.metrics import Metrics
from server.tensor_data import to_binary
from server.tensors import Array, InferRequest, InferResponse, Tensors

How = Literal["hit", "shared", "miss"]
# Larger inputs are hashed in a worker thread; hashing releases the GIL.
LARGE_INPUT_BYTES = 64 * 1024


class Infers(Protocol):
    """What the cache needs of a model; ``server.model.Model`` is one."""

    @property
    def name(self) -> str:
        """Name under which it is served."""

    @property
    def version(self) -> str:
        """Its version."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one request."""


class _Key(msgspec.Struct, frozen=True):
    model: str
    version: str
    digest: bytes


class _Flight(msgspec.Struct, eq=False):
    """A run under way and how many requests wait for it."""

    run: asyncio.Task[InferResponse]
    waiters: int = 0


class ResponseCache:
    """Keeps answers in the order of their last use, as many as fit into ``max_bytes``, and joins identical requests.

    Called on the event loop only. Errors are not kept. The arrays of an answer are read-only, own their memory, and may
    be shared with other answers.

    Args:
        max_bytes: Memory of the kept answers: arrays, keys and their Python objects.
        default_timeout_s: Deadline of requests that name none; 0 means no deadline.
        metrics: The process's metrics.
    """

    def __init__(self, max_bytes: int, default_timeout_s: float, metrics: Metrics) -> None:
        self._max_bytes, self._default_timeout_s, self._metrics = max_bytes, default_timeout_s, metrics
        self._kept: OrderedDict[_Key, tuple[InferResponse, int]] = OrderedDict()
        self._flights: dict[_Key, _Flight] = {}
        self._bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept answers."""
        return self._bytes

    async def infer(self, model: Infers, request: InferRequest) -> tuple[InferResponse, How]:
        """Answer from what is kept, from a run under way, or with a run of its own.

        Cancelling the call ends a run under way only when no other request waits for it.

        Returns:
            The response with the id of this request, and where it came from. A kept answer has no time in the queue and
            in a run, and no batch.

        Raises:
            DeadlineExpired: If the deadline passed while the request waited for another one's run.
            SlipstreamError: Whatever the model raises.
        """
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        key = _Key(model.name, model.version, await _digest(model, request))
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            self._count(key, "hit")
            return msgspec.structs.replace(kept[0], id=request.id), "hit"
        timeout_s = self._default_timeout_s if request.timeout_s is None else request.timeout_s
        due_s = arrived_s + timeout_s if timeout_s else None
        while (flight := self._flights.get(key)) is not None:
            try:
                response = await self._join(key, flight, arrived_s, due_s)
            except (DeadlineExpired, DeadlineUnmeetable):
                # The deadline of the request that started the run is not this one's.
                if due_s is not None and loop.time() >= due_s:
                    raise
            else:
                self._count(key, "shared")
                return msgspec.structs.replace(response, id=request.id), "shared"
        if due_s is not None:
            request = msgspec.structs.replace(request, timeout_s=max(due_s - loop.time(), 1e-6))
        self._count(key, "miss")
        self._flights[key] = flight = _Flight(loop.create_task(self._run(key, model, request)))
        return msgspec.structs.replace(await self._wait(key, flight), id=request.id), "miss"

    def forget(self, model: str, version: str) -> None:
        """Drop the answers of a version that is unloaded, and those that its runs under way still give."""
        for key in [key for key in self._kept if (key.model, key.version) == (model, version)]:
            self._drop(key)
        for key in [key for key in self._flights if (key.model, key.version) == (model, version)]:
            del self._flights[key]

    async def _join(self, key: _Key, flight: _Flight, arrived_s: float, due_s: float | None) -> InferResponse:
        if due_s is None:
            return await self._wait(key, flight)
        try:
            async with asyncio.timeout_at(due_s):
                return await self._wait(key, flight)
        except TimeoutError:
            timeout_ms = (due_s - arrived_s) * 1e3
            raise DeadlineExpired(
                f"the deadline of {timeout_ms:.0f} ms passed while an identical request was under way"
            ) from None

    async def _wait(self, key: _Key, flight: _Flight) -> InferResponse:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.run)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.run.done():
                flight.run.cancel()
                self._leave(key, flight.run)

    async def _run(self, key: _Key, model: Infers, request: InferRequest) -> InferResponse:
        run = asyncio.current_task()
        try:
            response = _owned(await model.infer(request))
            if (flight := self._flights.get(key)) is not None and flight.run is run:
                self._keep(key, response)
            return response
        finally:
            self._leave(key, run)

    def _leave(self, key: _Key, run: asyncio.Task[InferResponse] | None) -> None:
        """Let no more requests join a run; whether it has already been replaced is checked."""
        if (flight := self._flights.get(key)) is not None and flight.run is run:
            del self._flights[key]

    def _keep(self, key: _Key, response: InferResponse) -> None:
        kept = msgspec.structs.replace(response, id="", batch_rows=0, queue_s=0.0, compute_s=0.0, assemble_s=0.0)
        size = _size(key, kept)
        if size > self._max_bytes:
            return
        self._kept[key] = (kept, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._metrics.cache_bytes.set(self._bytes)

    def _drop(self, key: _Key) -> None:
        self._bytes -= self._kept.pop(key)[1]
        self._metrics.cache_bytes.set(self._bytes)

    def _count(self, key: _Key, how: How) -> None:
        self._metrics.cache_requests.labels(key.model, key.version, how).inc()


# Datatypes and shapes say where each tensor's bytes end, and every element of BYTES has its length before it.
async def _digest(model: Infers, request: InferRequest) -> bytes:
    inputs = sorted(request.inputs.items())
    head = [(name, array.dtype.str, array.shape) for name, array in inputs]
    digest = hashlib.sha256(orjson.dumps([model.name, model.version, request.variant, request.outputs, head]))
    data = [to_binary(array) for _, array in inputs]
    if sum(map(len, data)) <= LARGE_INPUT_BYTES:
        return _update(digest, data)
    return await asyncio.get_running_loop().run_in_executor(None, _update, digest, data)


def _update(digest: "hashlib._Hash", data: list[bytes | memoryview]) -> bytes:
    for part in data:
        digest.update(part)
    return digest.digest()


def _owned(response: InferResponse) -> InferResponse:
    outputs: Tensors = {name: _owned_array(array) for name, array in response.outputs.items()}
    return msgspec.structs.replace(response, outputs=outputs)


def _owned_array(array: Array) -> Array:
    # Outputs are views of a whole batch, which a kept view would keep alive.
    own = np.array(array, order="C", copy=True)
    own.flags.writeable = False
    return own


def _size(key: _Key, response: InferResponse) -> int:
    objects = sum(
        sys.getsizeof(element)
        for array in response.outputs.values()
        if array.dtype.kind == "O"
        for element in array.ravel()
    )
    arrays = sum(map(sys.getsizeof, response.outputs.values()))
    return objects + arrays + sum(map(sys.getsizeof, (key, key.digest, response, response.outputs)))
