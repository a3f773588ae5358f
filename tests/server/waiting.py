"""Waiting requests and cores for tests of the policies."""

from collections.abc import Iterable

from server.order import Order
from server.ragged import Ragged
from server.routes import LaneState
from server.tensors import InferRequest
from server.waiting import Pending, shape_of


class Answer:
    """A future that a test settles by hand."""

    def __init__(self) -> None:
        self.settled = False

    def done(self) -> bool:
        return self.settled


def pending_of(request: InferRequest, arrival_s: float = 0.0, *, ragged: Ragged | None = None) -> Pending[Answer]:
    """The queue's view of a request to a batchable model."""
    rows, key, length = shape_of(request.inputs, True, ragged or Ragged())
    deadline_s = arrival_s + request.timeout_s if request.timeout_s else None
    rank_s = Order().rank_s(arrival_s, deadline_s, request.priority, "", 0.0)
    return Pending(request, rows, key, arrival_s, deadline_s, Answer(), length, rank_s)


class Room:
    """Cores that the unpinned runs of some lanes occupy."""

    def __init__(self, cores: int, lanes: Iterable[LaneState] = ()) -> None:
        self._cores, self._lanes = cores, list(lanes)

    def has_room(self, device: str, threads: int) -> bool:
        busy = sum(lane.threads for lane in self._lanes if lane.busy and not lane.pinned and lane.device == device)
        return busy == 0 or busy + threads <= self._cores
