"""Requests that wait: what the policy knows of each, and the queue that keeps them in order. Pure."""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

import msgspec

from server.errors import SignatureMismatch
from server.ragged import Ragged
from server.tensors import InferRequest, Tensors


class Answer(Protocol):
    """Where the outcome of a request goes; the policy only asks whether it is settled already."""

    def done(self) -> bool:
        """Whether the request was answered or cancelled."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


class Pending(msgspec.Struct, Generic[AnswerT], eq=False):
    """One admitted request.

    Attributes:
        request: The request; its arrays are never written to.
        rows: Size of axis 0 of its inputs; 1 for a model that is not batched.
        key: Names, datatypes and fixed dimensions of the inputs; only equal keys may share a batch.
        arrival_s: When it was admitted.
        deadline_s: When its answer loses its value; ``None`` for never.
        future: Where its outcome goes; done when it was cancelled or has expired.
        length: Along the ragged axis; 0 for models without one.
        rank_s: Its place in the queue, see ``order``.
        retried: Whether a batch with it has failed already.
        alone: Whether it must run alone, because it may be what made that batch fail.
    """

    request: InferRequest
    rows: int
    key: Hashable
    arrival_s: float
    deadline_s: float | None
    future: AnswerT
    length: int = 0
    rank_s: float = 0.0
    retried: bool = False
    alone: bool = False


class RequestQueue(Generic[AnswerT]):
    """Waiting requests: one list per key in order of rank, the keys in order of their first request.

    Adding is O(1) for a request that goes last among its key; taking a batch is O(batch + log keys).

    Attributes:
        rows: Rows that wait, including those of requests that were cancelled and not yet noticed.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._waiting: dict[Hashable, deque[Pending[AnswerT]]] = {}
        # (rank of the first, ticket, key); entries whose rank is no longer that of the key's first are stale. The
        # ticket keeps keys from being compared.
        self._order: list[tuple[float, int, Hashable]] = []
        self._tickets = count()

    def __iter__(self) -> Iterator[Pending[AnswerT]]:
        return (pending for waiting in self._waiting.values() for pending in waiting)

    def append(self, pending: Pending[AnswerT]) -> None:
        """Add a request behind all others of its key that do not rank after it."""
        self.rows += pending.rows
        waiting = self._waiting.get(pending.key)
        if waiting is None:
            self._waiting[pending.key] = deque((pending,))
        elif pending.rank_s >= waiting[-1].rank_s:
            waiting.append(pending)
            return
        else:
            place = len(waiting)
            while place and waiting[place - 1].rank_s > pending.rank_s:
                place -= 1
            waiting.insert(place, pending)
            if place:
                return
        heappush(self._order, (pending.rank_s, next(self._tickets), pending.key))

    @property
    def first(self) -> Sequence[Pending[AnswerT]]:
        """The requests of the key that goes next, in order of rank; empty when nothing waits."""
        order = self._order
        while order:
            waiting = self._waiting.get(order[0][2])
            if waiting and waiting[0].rank_s == order[0][0]:
                return waiting
            heappop(order)
        return ()

    def pop_first(self) -> deque[Pending[AnswerT]]:
        """Remove the key that goes next with all of its requests; give back with ``restore`` what is not taken.

        Raises:
            IndexError: If nothing waits.
        """
        if not self.first:
            raise IndexError("nothing waits")
        return self._waiting.pop(heappop(self._order)[2])

    def restore(self, waiting: deque[Pending[AnswerT]]) -> None:
        """Put the rest of a key back in its place."""
        if waiting:
            self._waiting[waiting[0].key] = waiting
            heappush(self._order, (waiting[0].rank_s, next(self._tickets), waiting[0].key))

    def replace(self, keep: Sequence[Pending[AnswerT]]) -> None:
        """Keep only the given requests, which must be in the order in which iteration yields them."""
        self.rows = 0
        self._waiting.clear()
        self._order.clear()
        for pending in keep:
            self.rows += pending.rows
            self._waiting.setdefault(pending.key, deque()).append(pending)
        self._order.extend((waiting[0].rank_s, next(self._tickets), key) for key, waiting in self._waiting.items())
        heapify(self._order)

    def rows_before(self, rank_s: float) -> int:
        """Count the rows that go before, or with, a request of this rank; O(keys) for one that goes last."""
        if all(waiting[-1].rank_s <= rank_s for waiting in self._waiting.values()):
            return self.rows
        return sum(pending.rows for pending in self if pending.rank_s <= rank_s)


def shape_of(inputs: Tensors, batchable: bool, ragged: Ragged) -> tuple[int, Hashable, int]:
    """Return a request's rows, its key and its length, see ``Pending``.

    Raises:
        SignatureMismatch: If the model is batchable and the inputs have no common axis 0 or no rows.
    """
    if not batchable:
        return 1, None, 0
    rows = None
    key = []
    length = ragged.length(inputs)
    # Clients may name the same inputs in any order.
    for name in inputs if len(inputs) == 1 else sorted(inputs):
        array = inputs[name]
        shape = array.shape
        if rows is None and shape:
            rows = shape[0]
        elif not shape or shape[0] != rows:
            shapes = ", ".join(f"'{name}' has shape {list(array.shape)}" for name, array in inputs.items())
            raise SignatureMismatch(f"inputs disagree on batch size: {shapes}; axis 0 must be the same in all")
        fixed = shape[1:]
        if length and (axis := ragged.axis(name)) is not None:
            fixed = (*shape[1:axis], -1, *shape[axis + 1 :])
        key.append((name, array.dtype, fixed))
    if not rows:
        raise SignatureMismatch("the request has no rows; axis 0 of every input must be at least 1")
    return rows, tuple(key), length


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
