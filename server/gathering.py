"""Small requests that a front end reads in one iteration of its loop go to the engine as one request.

On its way to the engine, in its queue and back, a request of eight rows costs as much as one of one row. For a model
whose runs take next to no time that is most of what a request costs; for any other it is little, and its requests had
better be queued, answered and cancelled one by one. So requests are gathered only for models whose answers show that
they are batched and that their runs are short.

Requests that name a variant, outputs, a deadline, a priority or a client always go alone, and so do large ones and
those with text. When the model fails with what was gathered, each request is sent again alone: one may be to blame.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec
import numpy as np

from server.errors import InferenceFailed, SignatureMismatch
from server.messages import Inferred
from server.tensors import InferRequest

# A run that takes longer is worth a place in the queue for each of its requests.
SHORT_RUN_S: Final = 1e-3
# Larger requests cost more to copy together than a message of their own.
SMALL_REQUEST_BYTES: Final = 4096
MOST_REQUESTS: Final = 32

Future = asyncio.Future[Inferred]


class _Member(NamedTuple):
    request: InferRequest
    future: Future


class Gathering:
    """The small requests of one model. Use it on the event loop.

    Args:
        ask: Sends a request to the engine. It may raise what the future may fail with.
    """

    def __init__(self, ask: Callable[[InferRequest], Future]) -> None:
        self._ask, self._loop = ask, asyncio.get_running_loop()
        self._pays = False
        self._groups: dict[Hashable, list[_Member]] = {}

    def begin(self, request: InferRequest) -> Future | None:
        """Send a request with others at the end of this iteration of the loop.

        Returns:
            A future of its own answer; ``None`` if it has to go alone. Cancelling it stops no run.
        """
        key = _key(request) if self._pays else None
        if key is None:
            return None
        if not self._groups:
            self._loop.call_soon(self._send)
        future = self._loop.create_future()
        self._groups.setdefault(key, []).append(_Member(request, future))
        return future

    def learn(self, request: InferRequest, inferred: Inferred) -> None:
        """See from the answer to a request, gathered or not, whether gathering pays."""
        response = inferred.response
        is_short = response.compute_s <= SHORT_RUN_S
        self._pays = is_short and (self._pays or response.batch_rows > max(1, _rows(request)))

    def _send(self) -> None:
        groups, self._groups = self._groups, {}
        for members in groups.values():
            for first in range(0, len(members), MOST_REQUESTS):
                self._send_one(members[first : first + MOST_REQUESTS])

    def _send_one(self, members: Sequence[_Member]) -> None:
        members = [member for member in members if not member.future.done()]
        if not members:
            return
        try:
            run = self._ask(_joined([member.request for member in members]))
        except Exception as exc:  # noqa: BLE001  (whatever it is, each of them fails with it)
            _fail(members, exc)
        else:
            run.add_done_callback(partial(self._settle, members))

    def _settle(self, members: Sequence[_Member], run: Future) -> None:
        error = asyncio.CancelledError() if run.cancelled() else run.exception()
        if error is None:
            _answer(members, run.result())
        elif isinstance(error, InferenceFailed | SignatureMismatch) and len(members) > 1:
            for member in members:
                self._send_one([member])
        else:
            _fail(members, error)


def _rows(request: InferRequest) -> int:
    first = next(iter(request.inputs.values()), None)
    return 0 if first is None or not first.ndim else int(first.shape[0])


def _key(request: InferRequest) -> Hashable | None:
    """Return what requests have in common that can be joined along axis 0; ``None`` for one that has to go alone."""
    if request.outputs or request.variant or request.client or request.priority or request.timeout_s is not None:
        return None
    rows, size_bytes = _rows(request), 0
    for array in request.inputs.values():
        size_bytes += array.nbytes
        if array.dtype.kind == "O" or not array.ndim or array.shape[0] != rows:
            return None
    if not rows or size_bytes > SMALL_REQUEST_BYTES:
        return None
    return tuple((name, array.dtype, array.shape[1:]) for name, array in request.inputs.items())


def _joined(requests: Sequence[InferRequest]) -> InferRequest:
    if len(requests) == 1:
        return requests[0]
    first = requests[0].inputs
    return InferRequest({name: np.concatenate([request.inputs[name] for request in requests]) for name in first})


def _answer(members: Sequence[_Member], inferred: Inferred) -> None:
    """Give each its rows, as views."""
    response, start = inferred.response, 0
    for request, future in members:
        stop = start + _rows(request)
        if not future.done():
            outputs = {name: array[start:stop] for name, array in response.outputs.items()}
            own = msgspec.structs.replace(response, id=request.id, outputs=outputs)
            future.set_result(Inferred(own, inferred.how))
        start = stop


def _fail(members: Sequence[_Member], error: BaseException) -> None:
    for member in members:
        if member.future.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            member.future.cancel()
        else:
            member.future.set_exception(error)
