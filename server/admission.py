"""Admission: a request becomes what waits in the queue, in as many parts as it needs."""

from collections.abc import Callable

import msgspec

from server.batching import BatchLimits
from server.joining import join, parts_of
from server.order import Order
from server.outcome import Future
from server.ragged import Ragged
from server.routes import Route
from server.tensors import InferRequest
from server.waiting import Pending, shape_of

_TRANSPORT_SHARE, _MOST_TRANSPORT_S = 0.1, 0.02
"""Of a timeout this share, and at most so many seconds, are left for the answer to be written and read in time."""

_LEAST_PART_S = 1e-3
"""Shorter runs are not worth the bookkeeping of a part."""


class Admission:
    """Makes waiting requests of one model; on the event loop.

    Args:
        limits: The model's limits.
        ragged: Along which axis requests may differ.
        future: Makes an open future.
    """

    def __init__(self, limits: BatchLimits, ragged: Ragged, future: Callable[[], Future]) -> None:
        self._limits, self._ragged, self._future = limits, ragged, future
        self._order = Order()

    def pending(self, request: InferRequest, route: Route, now: float) -> Pending[Future]:
        """Make the queue's view of a request.

        Raises:
            SignatureMismatch: If the model is batched and the inputs have no common batch size.
        """
        limits = self._limits
        rows, key, length = shape_of(request.inputs, limits.batchable, self._ragged)
        timeout_s = request.timeout_s or limits.default_timeout_s
        deadline_s = now + timeout_s - min(_TRANSPORT_SHARE * timeout_s, _MOST_TRANSPORT_S) if timeout_s > 0 else None
        work_s = route.preferred[0].times.run_s(rows) if request.client else 0.0
        rank_s = self._order.rank_s(now, deadline_s, request.priority, request.client, work_s)
        return Pending(request, rows, key, now, deadline_s, self._future(), length, rank_s)

    def parted(self, pending: Pending[Future], most: int) -> list[Pending[Future]]:
        """Part a request into pieces of at most so many rows; its future is then settled by them."""
        parts = [
            msgspec.structs.replace(
                pending,
                request=msgspec.structs.replace(pending.request, inputs=inputs),
                rows=min(most, pending.rows - number * most),
                future=self._future(),
            )
            for number, inputs in enumerate(parts_of(pending.request.inputs, pending.rows, most))
        ]
        join([part.future for part in parts], pending.future)
        return parts

    def part_rows(self, route: Route) -> int:
        """Return beyond how many rows a request is parted."""
        lanes = (*route.preferred, *route.bulk)
        first, limit = route.preferred[0], max(lane.limit_rows for lane in lanes)
        most = max(lane.max_rows for lane in lanes)
        while most < limit and first.times.run_s(most) < _LEAST_PART_S:
            most = min(2 * most, limit)
        return most
