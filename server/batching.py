"""Batching policy: which waiting requests share a run, and how their tensors are joined and parted.

Pure: no clock, no loop, no thread. Everything here takes ``now`` in seconds of one monotonic clock.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from server.errors import InferenceFailed, SignatureMismatch
from server.tensors import Array, InferRequest, Tensors


class Answer(Protocol):
    """Where the outcome of a request goes; the policy only asks whether it is settled already."""

    def done(self) -> bool:
        """Whether the request was answered or cancelled."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


class BatchLimits(msgspec.Struct, frozen=True):
    """Limits of one model.

    Attributes:
        batchable: Whether rows of different requests may share a run.
        max_rows: Most rows per batch; a larger single request runs alone.
        max_queue_rows: Most rows that wait; a larger single request is taken when nothing waits.
        max_queue_delay_s: Seconds that an idle lane may wait for a fuller batch; 0 dispatches at once.
        default_timeout_s: Timeout of requests that name none; 0 means no deadline.
    """

    batchable: bool
    max_rows: int
    max_queue_rows: int
    max_queue_delay_s: float
    default_timeout_s: float


class Pending(msgspec.Struct, Generic[AnswerT], eq=False):
    """One admitted request.

    Attributes:
        request: The request; its arrays are never written to.
        rows: Size of axis 0 of its inputs; 1 for a model that is not batched.
        key: Names, datatypes and non-batch dimensions of the inputs; only equal keys may share a batch.
        arrival_s: When it was admitted.
        deadline_s: When its answer loses its value; ``None`` for never.
        future: Where its outcome goes; done when it was cancelled or has expired.
    """

    request: InferRequest
    rows: int
    key: Hashable
    arrival_s: float
    deadline_s: float | None
    future: AnswerT


class Plan(msgspec.Struct, Generic[AnswerT], frozen=True, eq=False):
    """What a lane runs next.

    Attributes:
        requests: The batch in order of arrival, all of one key; empty when nothing is left to run.
        rows: Their rows together.
        expired: Requests that left the queue because their deadline has passed.
    """

    requests: list[Pending[AnswerT]]
    rows: int
    expired: list[Pending[AnswerT]]


class RequestQueue(Generic[AnswerT]):
    """Waiting requests: one FIFO per key, the keys in order of their oldest request.

    Appending is O(1) for a key that waits already; taking a batch is O(batch + log keys).

    Attributes:
        rows: Rows that wait, including those of requests that were cancelled and not yet noticed.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._waiting: dict[Hashable, deque[Pending[AnswerT]]] = {}
        # (arrival of the oldest, ticket, key), one entry per key; the ticket keeps keys from being compared.
        self._order: list[tuple[float, int, Hashable]] = []
        self._tickets = count()

    def __iter__(self) -> Iterator[Pending[AnswerT]]:
        return (pending for waiting in self._waiting.values() for pending in waiting)

    def append(self, pending: Pending[AnswerT]) -> None:
        """Add a request behind all others of its key."""
        self.rows += pending.rows
        waiting = self._waiting.get(pending.key)
        if waiting is not None:
            waiting.append(pending)
        else:
            self._waiting[pending.key] = deque((pending,))
            heappush(self._order, (pending.arrival_s, next(self._tickets), pending.key))

    @property
    def oldest(self) -> Sequence[Pending[AnswerT]]:
        """The requests of the key that goes next, in order of arrival; empty when nothing waits."""
        return self._waiting[self._order[0][2]] if self._order else ()

    def pop_oldest(self) -> deque[Pending[AnswerT]]:
        """Remove the key that goes next with all of its requests; give back with ``restore`` what is not taken."""
        return self._waiting.pop(heappop(self._order)[2])

    def restore(self, waiting: deque[Pending[AnswerT]]) -> None:
        """Put the rest of a key back in its place."""
        if waiting:
            self._waiting[waiting[0].key] = waiting
            heappush(self._order, (waiting[0].arrival_s, next(self._tickets), waiting[0].key))

    def replace(self, keep: Sequence[Pending[AnswerT]]) -> None:
        """Keep only the given requests, which must be in the order in which iteration yields them."""
        self.rows = 0
        self._waiting.clear()
        self._order.clear()
        for pending in keep:
            self.rows += pending.rows
            self._waiting.setdefault(pending.key, deque()).append(pending)
        self._order.extend((waiting[0].arrival_s, next(self._tickets), key) for key, waiting in self._waiting.items())
        heapify(self._order)


def pending_of(
    request: InferRequest, batchable: bool, now: float, default_timeout_s: float, future: AnswerT
) -> Pending[AnswerT]:
    """Make the queue's view of a request.

    Args:
        request: The request, already checked against the model's signature.
        batchable: Whether axis 0 of every input counts rows.
        now: The time of arrival.
        default_timeout_s: Timeout of a request that names none (or 0); 0 means no deadline.
        future: Where the outcome goes.

    Raises:
        SignatureMismatch: If the model is batchable and the inputs have no common axis 0 or no rows.
    """
    timeout_s = request.timeout_s or default_timeout_s
    deadline_s = now + timeout_s if timeout_s > 0 else None
    rows, key = _rows_and_key(request.inputs) if batchable else (1, None)
    return Pending(request, rows, key, now, deadline_s, future)


def _rows_and_key(inputs: Tensors) -> tuple[int, Hashable]:
    rows = None
    key = []
    # Clients may name the same inputs in any order.
    for name in inputs if len(inputs) == 1 else sorted(inputs):
        array = inputs[name]
        shape = array.shape
        if rows is None and shape:
            rows = shape[0]
        elif not shape or shape[0] != rows:
            shapes = ", ".join(f"'{name}' has shape {list(array.shape)}" for name, array in inputs.items())
            raise SignatureMismatch(f"inputs disagree on batch size: {shapes}; axis 0 must be the same in all")
        key.append((name, array.dtype, shape[1:]))
    if not rows:
        raise SignatureMismatch("the request has no rows; axis 0 of every input must be at least 1")
    return rows, tuple(key)


def plan(queue: RequestQueue[AnswerT], now: float, max_rows: int) -> Plan[AnswerT]:
    """Take the next batch out of the queue: the oldest request and what may travel with it, in order of arrival.

    Cancelled and expired requests that are met on the way leave the queue too. A request of more than ``max_rows``
    rows makes a batch of its own.
    """
    batch: list[Pending[AnswerT]] = []
    expired: list[Pending[AnswerT]] = []
    rows = 0
    while not batch and queue.rows:
        waiting = queue.pop_oldest()
        while waiting and rows < max_rows:
            pending = waiting[0]
            alive = not pending.future.done()
            if alive and pending.deadline_s is not None and pending.deadline_s <= now:
                expired.append(pending)
                alive = False
            if alive and batch and rows + pending.rows > max_rows:
                break
            queue.rows -= pending.rows
            waiting.popleft()
            if alive:
                batch.append(pending)
                rows += pending.rows
            elif not batch:
                break  # Without its oldest request it may be another key's turn.
        queue.restore(waiting)
    return Plan(batch, rows, expired)


def sweep(queue: RequestQueue[AnswerT], now: float) -> tuple[list[Pending[AnswerT]], float | None]:
    """Take every cancelled and every expired request out of the queue; O(waiting requests).

    Returns:
        The expired requests, and the earliest deadline of those that still wait (``None``: nobody has one).
    """
    keep: list[Pending[AnswerT]] = []
    expired: list[Pending[AnswerT]] = []
    earliest_s = None
    for pending in queue:
        deadline_s = pending.deadline_s
        if pending.future.done():
            continue
        if deadline_s is None:
            keep.append(pending)
        elif deadline_s <= now:
            expired.append(pending)
        else:
            keep.append(pending)
            earliest_s = deadline_s if earliest_s is None else min(earliest_s, deadline_s)
    queue.replace(keep)
    return expired, earliest_s


def ready_at(queue: RequestQueue[AnswerT], max_rows: int, delay_s: float, run_s: float) -> float:
    """Return until when an idle lane may wait for a fuller batch; a time in the past when it should not wait.

    Args:
        queue: A queue in which something waits.
        max_rows: Rows that fill the batch.
        delay_s: How old the oldest request may get.
        run_s: Predicted run time; the wait ends this long before the first deadline of the batch.
    """
    waiting = queue.oldest
    ready_s = waiting[0].arrival_s + delay_s
    rows = 0
    for pending in waiting:
        rows += pending.rows
        if rows >= max_rows:
            return waiting[0].arrival_s
        if pending.deadline_s is not None:
            ready_s = min(ready_s, pending.deadline_s - run_s)
    return ready_s


def assemble(batch: Sequence[Pending[AnswerT]]) -> Tensors:
    """Join the inputs of a batch along axis 0, with one copy; a batch of one passes through without any.

    Returns:
        Name -> array of shape [rows of the batch, ...] and the dtype of the requests.
    """
    first = batch[0].request.inputs
    if len(batch) == 1:
        return first
    return {name: np.concatenate([pending.request.inputs[name] for pending in batch]) for name in first}


def split(outputs: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """Part a batch's outputs along axis 0 into views, one mapping per request.

    Args:
        outputs: Name -> array of shape [sum of rows, ...].
        rows: Rows per request, in the order of the batch.

    Raises:
        InferenceFailed: If axis 0 of an output is not the sum of rows: nobody can tell which row belongs to whom.
    """
    total = sum(rows)
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise InferenceFailed(f"output '{name}' has shape {list(array.shape)} for a batch of {total} rows")
    if len(rows) == 1:
        return [outputs]
    parts: list[Tensors] = []
    start = 0
    for size in rows:
        stop = start + size
        part: dict[str, Array] = {name: array[start:stop] for name, array in outputs.items()}
        parts.append(part)
        start = stop
    return parts
