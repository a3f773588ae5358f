"""Routing policy: which idle lane takes the oldest waiting work, and when a new request would be answered.

Pure: lanes are described by ``LaneState`` values that the scheduler keeps up to date; ``now`` is an argument.

- A request that pins a variant goes only to lanes of that variant; any other goes to every lane.
- Among those lanes the first one's variant and device are *preferred*: an idle preferred lane takes work at once. Any
  other lane is slower by the order it was given in; it takes the end of the queue, and only when it is predicted to
  finish that sooner than the preferred lanes would get to it. Without latency tables there is no prediction, and slower
  lanes take only pinned work.
- A lane for large batches takes those, and only those, that reach its least number of rows; the preferred lanes leave
  them to it while it is idle.
- Work that nobody pinned never keeps more threads of one device busy than there are cores, all models together. Pinned
  work is exempt and is not counted, so that neither kind can starve the other.
- A lane that is not up takes nothing, and the next one takes its place.
- In a *brown-out* the preferred variant is the manifest's first, the fastest; otherwise, where brown-outs are allowed,
  it is the one that agrees best with the original.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from server.errors import DeadlineUnmeetable, QueueFull, Refused
from server.prediction import completion_s, predict_completion
from server.routes import LaneState, Route
from server.waiting import Pending, RequestQueue

_RETRY_UNKNOWN_S = 1.0


class Room(Protocol):
    """Tells whether there are cores for a batch, see ``sharing.Member``."""

    def has_room(self, device: str, threads: int) -> bool:
        """Whether a batch of so many threads may start."""
        ...


def may_take(lane: LaneState, route: Route, queue: RequestQueue[Any], now: float, room: Room) -> bool:
    """Whether an idle lane may take the first work of a route now.

    Args:
        lane: An idle lane of the route.
        route: The route of the work.
        queue: The work, at least one request.
        now: The time.
        room: Tells whether there are cores for it.
    """
    if not route.pin and not room.has_room(lane.device, lane.threads):
        return False
    if lane in route.bulk:
        return _is_large(lane, queue)
    if lane in route.preferred:
        return not any(
            _is_large(other, queue) and not other.busy and room.has_room(other.device, other.threads)
            for other in route.bulk
        )
    if not lane.times.known or not all(other.busy and other.times.known for other in route.preferred):
        return False
    # It takes the end of the queue: what goes first is never answered later than if it were absent.
    rows = _rows_for(lane, queue)
    ahead_rows = max(0, queue.rows - rows)
    return now + lane.times.run_s(rows) < completion_s(route.preferred, ahead_rows, rows, now)


def _rows_for(lane: LaneState, queue: RequestQueue[Any]) -> int:
    return max(queue.first[0].rows, min(queue.rows, lane.max_rows))


def _is_large(lane: LaneState, queue: RequestQueue[Any]) -> bool:
    return _rows_for(lane, queue) >= lane.from_rows


def choose(
    lane: LaneState, routes: Mapping[str, Route], queues: Mapping[str, RequestQueue[Any]], now: float, room: Room
) -> str | None:
    """Return the pin of the queue from which an idle lane takes now, the first by rank; ``None`` for none."""
    chosen, first_s = None, math.inf
    for pin in ("", lane.variant):
        queue = queues[pin]
        if queue.rows:
            rank_s = queue.first[0].rank_s
            if rank_s < first_s and may_take(lane, routes[pin], queue, now, room):
                chosen, first_s = pin, rank_s
    return chosen


def refusal(
    pending: Pending[Any],
    routes: Mapping[str, Route],
    queues: Mapping[str, RequestQueue[Any]],
    most_rows: int,
    now: float,
    cores: int,
) -> Refused | None:
    """Return why a request must not be admitted now, or ``None`` when it may wait.

    The queue's limit counts the rows of all pins together. A deadline refuses only on a prediction, which counts the
    work that ranks before the request.

    Args:
        pending: The request.
        routes: Of the model.
        queues: Of the model.
        most_rows: Rows that may wait, see ``rows_that_may_wait``.
        now: The time.
        cores: Cores that the model may count on.
    """
    route = routes[pending.request.variant]
    waiting_rows = sum(queue.rows for queue in queues.values())
    if waiting_rows and waiting_rows + pending.rows > most_rows:
        drained_s = predict_completion(route, waiting_rows, 0, now, cores)
        return QueueFull(
            f"{waiting_rows} rows wait and the request has {pending.rows}; the queue holds "
            f"{most_rows}: retry later or add a replica",
            _RETRY_UNKNOWN_S if drained_s is None else drained_s - now,
        )
    if pending.deadline_s is None:
        return None
    backlog_rows = sum(queues[pin].rows_before(pending.rank_s) for pin in route.rivals if queues[pin].rows)
    done_s = predict_completion(route, backlog_rows, pending.rows, now, cores)
    if done_s is None or done_s <= pending.deadline_s:
        return None
    return DeadlineUnmeetable(
        f"the answer is predicted in {(done_s - now) * 1e3:.1f} ms, the timeout is "
        f"{(pending.deadline_s - now) * 1e3:.1f} ms: retry later or allow more time",
        done_s - now,
    )
