"""Batching policy: which waiting requests share a run, and how their tensors are joined and parted.

Pure: no clock, no loop, no thread. Everything here takes ``now`` in seconds of one monotonic clock.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, Protocol

import msgspec
import numpy as np

from server.artifact import Padding
from server.errors import InferenceFailed
from server.ragged import MOST_PADDING, Ragged
from server.tensors import Array, Tensors
from server.waiting import AnswerT, Pending, RequestQueue

_WINDOW_BATCHES = 4
"""Requests of similar length are looked for among those that fill so many batches."""


class Times(Protocol):
    """Predicted run times of a lane, in seconds by rows; 0 promises nothing."""

    def run_s(self, rows: int) -> float:
        """What a run is expected to take."""
        ...

    def safe_s(self, rows: int) -> float:
        """What 99 of 100 runs keep."""
        ...


class _Unknown:
    def run_s(self, rows: int) -> float:  # noqa: ARG002  (the interface)
        return 0.0

    safe_s = run_s


UNKNOWN: Times = _Unknown()
"""Times of a lane that was never measured."""


class BatchLimits(msgspec.Struct, frozen=True):
    """Limits of one model.

    Attributes:
        batchable: Whether rows of different requests may share a run.
        max_rows: Most rows per batch.
        max_queue_rows: Most rows that wait; a larger single request is taken when nothing waits.
        max_queue_delay_s: Seconds that an idle lane may wait for a fuller batch; 0 dispatches at once.
        default_timeout_s: Timeout of requests that name none; 0 means no deadline.
        max_queue_s: Most seconds of predicted work that wait; 0 sets no limit.
        brownout: Whether overload may be served by a faster variant; the most faithful one serves otherwise.
        padding: Proof that requests may differ in length; ``None`` without one.
    """

    batchable: bool
    max_rows: int
    max_queue_rows: int
    max_queue_delay_s: float
    default_timeout_s: float
    max_queue_s: float = 0.0
    brownout: bool = False
    padding: Padding | None = None


class Plan(msgspec.Struct, Generic[AnswerT], frozen=True, eq=False):
    """What a lane runs next.

    Attributes:
        requests: The batch in the order of the queue, all of one key; empty when nothing is left to run.
        rows: Their rows together.
        expired: Requests that left the queue because their deadline has passed, or cannot be kept any more.
    """

    requests: list[Pending[AnswerT]]
    rows: int
    expired: list[Pending[AnswerT]]


def plan(
    queue: RequestQueue[AnswerT], now: float, max_rows: int, times: Times = UNKNOWN, *, from_end: bool = False
) -> Plan[AnswerT]:
    """Take the next batch out of the queue: the first request and what may travel with it, in order of rank.

    - Cancelled requests that are met on the way leave the queue, and so do those whose deadline has passed or would
      pass even if they ran alone now.
    - A batch never grows beyond what its earliest deadline allows, unless that would waste the lane on it: where the
      rows per second fall below half of those of a full batch, the request that forces it is dropped instead.
    - A request of more than ``max_rows`` rows, and one that must run ``alone``, makes a batch of its own.
    - Requests of unequal length share a batch while padding adds at most half. Where more wait than fit, those of the
      most similar length go with the first one.

    Args:
        queue: Where requests wait.
        now: The time.
        max_rows: Rows that fill a batch.
        times: Predicted run times; unknown ones promise nothing, and drop only what has expired.
        from_end: Begin with the last request of the key that goes next, instead of the first.
    """
    expired: list[Pending[AnswerT]] = []
    while queue.rows:
        waiting = queue.pop_first()
        forming: _Forming[AnswerT] = _Forming(now, max_rows, times, waiting)
        forming.meet(tuple(reversed(waiting)) if from_end else _nearest(waiting, max_rows))
        _leave(waiting, forming.met)
        queue.rows -= forming.met_rows
        queue.restore(waiting)
        expired += forming.expired
        if forming.batch:
            return Plan(forming.batch, forming.rows, expired)
    return Plan([], 0, expired)


class _Forming(Generic[AnswerT]):
    """A batch while it grows.

    Attributes:
        batch: The requests in it.
        rows: Their rows.
        met: Requests that leave the queue: those in the batch, the expired and the cancelled.
        met_rows: Their rows.
        expired: Requests that cannot be answered in time.
    """

    def __init__(self, now: float, max_rows: int, times: Times, waiting: Sequence[Pending[AnswerT]]) -> None:
        self._now, self._max_rows, self._times, self._waiting = now, max_rows, times, waiting
        self._due_s = math.inf  # the earliest deadline in the batch
        # Later deadlines can be kept in any batch, and need no prediction each.
        self._safe_s = now + 2 * times.safe_s(max_rows)
        self._longest = self._positions = 0
        self.batch: list[Pending[AnswerT]] = []
        self.rows = self.met_rows = 0
        self.met: list[Pending[AnswerT]] = []
        self.expired: list[Pending[AnswerT]] = []

    def meet(self, candidates: Iterable[Pending[AnswerT]]) -> None:
        """Take candidates in their order until the batch is full."""
        for pending in candidates:
            if pending.future.done() or self._is_lost(pending):
                self.met.append(pending)
                self.met_rows += pending.rows
                if not pending.future.done():
                    self.expired.append(pending)
                if not self.batch:
                    return  # Without its first request it may be another key's turn.
                continue
            if self.batch:
                if pending.alone or self.rows + pending.rows > self._max_rows:
                    return
                if pending.length and self._wastes(pending):
                    continue
                if self._is_late_with(pending) and not self._sacrifice():
                    return
            self._take(pending)
            if self.rows >= self._max_rows or pending.alone:
                return

    def _take(self, pending: Pending[AnswerT]) -> None:
        self.batch.append(pending)
        self.met.append(pending)
        self.met_rows += pending.rows
        self.rows += pending.rows
        if pending.deadline_s is not None:
            self._due_s = min(self._due_s, pending.deadline_s)
        if pending.length:
            self._longest = max(self._longest, pending.length)
            self._positions += pending.rows * pending.length

    def _is_lost(self, pending: Pending[AnswerT]) -> bool:
        deadline_s = pending.deadline_s
        if deadline_s is None or (deadline_s > self._safe_s and pending.rows <= self._max_rows):
            return False
        return self._now + self._times.run_s(pending.rows) >= deadline_s

    def _wastes(self, pending: Pending[AnswerT]) -> bool:
        """Whether padding everyone to one length would add more than it may."""
        padded = max(self._longest, pending.length) * (self.rows + pending.rows)
        return padded > MOST_PADDING * (self._positions + pending.rows * pending.length)

    def _is_late_with(self, pending: Pending[AnswerT]) -> bool:
        due_s = self._due_s if pending.deadline_s is None else min(self._due_s, pending.deadline_s)
        return due_s <= self._safe_s and self._now + self._times.safe_s(self.rows + pending.rows) > due_s

    def _sacrifice(self) -> bool:
        """Drop what would be late in a full batch, if keeping it halves the rows per second; return whether it did."""
        full_rows = min(self._max_rows, sum(pending.rows for pending in self._waiting))
        full_s = self._times.run_s(full_rows)
        if self.rows * 2 * full_s >= full_rows * self._times.run_s(self.rows):
            return False
        late = [p for p in self.batch if p.deadline_s is not None and self._now + full_s > p.deadline_s]
        kept = [p for p in self.batch if p not in late]
        if not late:
            return False
        self.expired += late
        self.batch, self.rows, self._due_s, self._longest, self._positions = [], 0, math.inf, 0, 0
        for pending in kept:
            self.met.remove(pending)
            self.met_rows -= pending.rows
            self._take(pending)
        return True


def _nearest(waiting: deque[Pending[AnswerT]], max_rows: int) -> Iterable[Pending[AnswerT]]:
    """Return the candidates for a batch: by length where they have one and more wait than fit, else as they wait."""
    first = waiting[0]
    if not first.length or len(waiting) <= max_rows:
        return waiting
    window = list(islice(waiting, _WINDOW_BATCHES * max_rows))
    return sorted(window, key=lambda pending: abs(pending.length - first.length))


def _leave(waiting: deque[Pending[AnswerT]], met: Sequence[Pending[AnswerT]]) -> None:
    """Take requests out of the waiting ones; they are mostly the first."""
    for pending in met:
        if waiting[0] is pending:
            waiting.popleft()
        elif waiting[-1] is pending:
            waiting.pop()
        else:
            waiting.remove(pending)


def ready_at(queue: RequestQueue[AnswerT], max_rows: int, delay_s: float, run_s: float) -> float:
    """Return until when an idle lane may wait for a fuller batch; a time in the past when it should not wait.

    Args:
        queue: A queue in which something waits.
        max_rows: Rows that fill the batch.
        delay_s: How old the oldest request may get.
        run_s: Predicted run time; the wait ends this long before the first deadline of the batch.
    """
    waiting = queue.first
    ready_s = min(pending.arrival_s for pending in waiting) + delay_s
    rows = 0
    for pending in waiting:
        rows += pending.rows
        if rows >= max_rows:
            return waiting[0].arrival_s
        if pending.deadline_s is not None:
            ready_s = min(ready_s, pending.deadline_s - run_s)
    return ready_s


def assemble(batch: Sequence[Pending[AnswerT]], ragged: Ragged) -> Tensors:
    """Join the inputs of a batch along axis 0, with one copy; a batch of one passes through without any.

    Returns:
        Name -> array of shape [rows of the batch, ...] and the dtype of the requests.
    """
    first = batch[0].request.inputs
    if len(batch) == 1:
        return first
    longest = max(pending.length for pending in batch)
    if any(pending.length != longest for pending in batch):
        return ragged.join([pending.request.inputs for pending in batch], sum(p.rows for p in batch), longest)
    return {name: np.concatenate([pending.request.inputs[name] for pending in batch]) for name in first}


def split(outputs: Tensors, batch: Sequence[Pending[AnswerT]], ragged: Ragged) -> list[Tensors]:
    """Part a batch's outputs along axis 0 into views, one mapping per request, without what padding added.

    Args:
        outputs: Name -> array of shape [sum of rows, ...].
        batch: The requests, in their order in the batch.
        ragged: How they were padded.

    Raises:
        InferenceFailed: If axis 0 of an output is not the sum of rows: nobody can tell which row belongs to whom.
    """
    total = sum(pending.rows for pending in batch)
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise InferenceFailed(f"output '{name}' has shape {list(array.shape)} for a batch of {total} rows")
    if len(batch) == 1:
        return [outputs]
    parts: list[Tensors] = []
    longest = max(pending.length for pending in batch)
    start = 0
    for pending in batch:
        stop = start + pending.rows
        part: dict[str, Array] = {name: array[start:stop] for name, array in outputs.items()}
        parts.append(part if pending.length == longest else ragged.cut(part, pending.length))
        start = stop
    return parts
