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
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from server.artifact import LatencyTable
from server.batching import BatchLimits
from server.errors import DeadlineUnmeetable, QueueFull, Refused
from server.estimate import Estimate
from server.tensors import Array, Tensors
from server.waiting import Pending, RequestQueue

_RETRY_UNKNOWN_S = 1.0
_LOOK_EACH = 32
_LEAST_TRIAL_GAP, _MOST_TRIAL_GAP = 32, 1024
_LEAST_GROWTH_GAP, _MOST_GROWTH_GAP = 256, 16_384


class Runner(Protocol):
    """What a lane runs its batches with."""

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Run one batch; called from the lane's thread, or on the loop for a tiny model."""
        ...


class Room(Protocol):
    """Tells whether there are cores for a batch, see ``sharing.Member``."""

    def has_room(self, device: str, threads: int) -> bool:
        """Whether a batch of so many threads may start."""
        ...


class LaneSpec(msgspec.Struct, frozen=True):
    """A variant on a device with its worker.

    Attributes:
        variant: Name of the variant, by which clients pin.
        device: Where it runs, e.g. ``cpu`` or ``cuda:0``.
        runner: The opened session.
        latency: Run time per batch size, measured on this host; ``None`` when never measured.
        threads: Cores that one run keeps busy; 0 means all.
        from_rows: Least rows of the batches that it takes; 0 for a lane that is not one for large batches.
        agreement: With the original, 0 to 1: what a brown-out trades.
        probe: Inputs that are known to work; ``None`` when there are none.
    """

    variant: str
    device: str
    runner: Runner
    latency: LatencyTable | None
    threads: int
    from_rows: int = 0
    agreement: float = 1.0
    probe: Tensors | None = None


class LaneState(msgspec.Struct, eq=False):
    """What routing knows of one lane.

    Attributes:
        variant: The variant it runs.
        device: Where it runs.
        times: Predicted run times.
        threads: Cores that a run keeps busy, at least 1.
        max_rows: Rows from which on its throughput grows no more: what it takes in a batch (a larger single request
            excepted).
        limit_rows: Rows that it may take.
        full_rows: Rows that it might take if its device never ran out of memory.
        from_rows: Least rows of the batches that it takes when nobody pinned it; 0 for any.
        agreement: With the original, 0 to 1.
        up: Whether it may get work.
        busy: Whether a batch runs.
        pinned: Whether that batch was pinned to the variant.
        busy_until_s: When that batch is predicted to end; meaningless where nothing is predicted.
        batches: That have started.
        trial_at: Number of batches after which the next one tries twice the rows.
        trial_gap: Batches from the last trial to the next.
        learned: What ``times`` had learned when ``max_rows`` was chosen.
        grow_at: Number of batches after which a lane that ran out of memory may take twice the rows.
        grow_gap: Batches from that to the next time.
    """

    variant: str
    device: str
    times: Estimate
    threads: int
    max_rows: int
    limit_rows: int
    from_rows: int = 0
    agreement: float = 1.0
    up: bool = True
    busy: bool = False
    pinned: bool = False
    busy_until_s: float = 0.0
    batches: int = 0
    trial_at: int = _LEAST_TRIAL_GAP
    trial_gap: int = _LEAST_TRIAL_GAP
    learned: int = 0
    full_rows: int = 0
    grow_at: int = 0
    grow_gap: int = _LEAST_GROWTH_GAP

    @property
    def next_rows(self) -> int:
        """Rows of the next batch; now and then twice as many, or a table that is wrong would never be found out."""
        return min(2 * self.max_rows, self.limit_rows) if self.batches >= self.trial_at else self.max_rows

    def start(self, rows: int, pinned: bool, now: float) -> None:
        """Note that a batch starts.

        A trial makes everybody in it wait twice as long: while trials change nothing, each gap is twice the last one.
        """
        self.busy, self.pinned = True, pinned
        if self.batches >= self.trial_at and rows > self.max_rows:
            self.trial_gap = min(2 * self.trial_gap, _MOST_TRIAL_GAP)
            self.trial_at = self.batches + self.trial_gap
        self.batches += 1
        if self.limit_rows < self.full_rows and self.batches >= self.grow_at:
            self.limit_rows = min(2 * self.limit_rows, self.full_rows)
            self.grow_at = self.batches + self.grow_gap
        if self.batches % _LOOK_EACH == 0 or self.learned != self.times.learned:
            self._look()
        self.busy_until_s = now + self.times.run_s(rows)

    def shrink(self, rows: int) -> None:
        """Take at most half of so many rows, for which there was no memory; later, and later each time, try more."""
        self.full_rows = max(self.full_rows, self.limit_rows)
        self.limit_rows = max(1, min(rows // 2, self.limit_rows))
        self.max_rows = min(self.max_rows, self.limit_rows)
        self.grow_at = self.batches + self.grow_gap
        self.grow_gap = min(2 * self.grow_gap, _MOST_GROWTH_GAP)

    def _look(self) -> None:
        self.learned = self.times.learned
        if (best := self.times.best_rows(self.limit_rows)) != self.max_rows:
            self.max_rows = best
            self.trial_gap = _LEAST_TRIAL_GAP
            self.trial_at = self.batches + self.trial_gap

    def free_at(self, now: float) -> float:
        """Predict when the lane is idle. An overdue batch is expected to be late by as much again."""
        return now + abs(self.busy_until_s - now) if self.busy else now


class Route(msgspec.Struct, frozen=True, eq=False):
    """The lanes of one kind of work.

    Attributes:
        pin: The pinned variant; empty for work that nobody pinned.
        preferred: Lanes that take it whenever they are idle.
        bulk: Lanes for large batches.
        slower: Lanes that take it when they are predicted to finish it sooner.
        rivals: Pins whose waiting work shares the preferred lanes, the route's own included.
    """

    pin: str
    preferred: tuple[LaneState, ...]
    bulk: tuple[LaneState, ...]
    slower: tuple[LaneState, ...]
    rivals: tuple[str, ...]


def state_of(spec: LaneSpec, limits: BatchLimits, cores: int, times: Estimate | None = None) -> LaneState:
    """Return the state of an idle lane; its batches reach its measured best size within the model's limit.

    Args:
        spec: The lane.
        limits: The model's.
        cores: Of the process.
        times: Of a lane like it, which learns with it; ``None`` for one that learns alone.
    """
    times = times or Estimate(spec.latency)
    limit_rows = limits.max_rows if limits.batchable else 1
    max_rows, threads = times.best_rows(limit_rows), spec.threads or cores
    return LaneState(spec.variant, spec.device, times, threads, max_rows, limit_rows, spec.from_rows, spec.agreement)


def routes_of(lanes: Sequence[LaneState], *, faithful_first: bool = False) -> dict[str, Route]:
    """Return a route for every variant that is up and one, under the empty name, for work that nobody pinned.

    Args:
        lanes: All lanes, in the manifest's order of preference on each device.
        faithful_first: Prefer the variant that agrees best with the original, instead of the manifest's first.

    Returns:
        Pin -> route; nothing for a pin without a lane that is up.
    """
    alive = [lane for lane in lanes if lane.up]
    if faithful_first:
        devices = list(dict.fromkeys(lane.device for lane in alive))
        alive.sort(key=lambda lane: (devices.index(lane.device), -lane.agreement))
    pins = ["", *dict.fromkeys(lane.variant for lane in alive)] if alive else []
    return {pin: _route_of(pin, alive) for pin in pins}


def _route_of(pin: str, lanes: Sequence[LaneState]) -> Route:
    usable = [lane for lane in lanes if pin in ("", lane.variant)]
    first = usable[0]
    preferred = tuple(lane for lane in usable if (lane.variant, lane.device) == (first.variant, first.device))
    bulk = tuple(lane for lane in usable if lane.from_rows and lane not in preferred)
    slower = tuple(lane for lane in usable if lane not in (*preferred, *bulk))
    leading = lanes[0].variant
    rivals = ("", leading) if pin in ("", leading) else (pin,)
    return Route(pin, preferred, bulk, slower, rivals)


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
    return now + lane.times.run_s(rows) < _completion_s(route.preferred, ahead_rows, rows, now)


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


def latest_s(lane: LaneState, rows: int, now: float) -> float:
    """Return when one lane alone would have run so many rows, and a batch more, if each took what 99 of 100 keep.

    An upper bound of every prediction for a route that prefers this lane; infinite without one.
    """
    if not lane.times.known:
        return math.inf
    return lane.free_at(now) + (rows // lane.max_rows + 2) * lane.times.safe_s(lane.max_rows)


def predict_completion(route: Route, backlog_rows: int, rows: int, now: float, cores: int) -> float | None:
    """Predict when a request would be answered that arrives now behind a backlog.

    The backlog is dealt to the route's lanes batch by batch, each to the lane that would finish it first (list
    scheduling), in batches as large as each lane takes. Where it fills a batch of every lane, others will come to fill
    the request's own batch: without time for that, batches would be small just when there is most to do.

    Args:
        route: The route of the request.
        backlog_rows: Rows that wait ahead of it on the same lanes.
        rows: Its own rows; 0 asks when the backlog is done.
        now: The time.
        cores: Cores that work without a pin may keep busy on one device.

    Returns:
        The time of completion, or ``None`` when a preferred lane was never measured.
    """
    lanes = _parallel(route, backlog_rows + rows, cores)
    if not lanes:
        return None
    fills = rows > 0 and backlog_rows >= sum(lane.max_rows for lane in lanes)
    return _completion_s(lanes, backlog_rows, rows, now, fills=fills)


def _completion_s(
    lanes: Sequence[LaneState], backlog_rows: int, rows: int, now: float, *, fills: bool = False
) -> float:
    """Deal a backlog, and then some rows more, to lanes; return when those are done.

    Args:
        lanes: That work on it.
        backlog_rows: Rows of the backlog.
        rows: Rows behind it.
        now: The time.
        fills: Whether later requests will fill the last batch.
    """
    skipped_s, left = _skip_waves(lanes, backlog_rows)
    free_s = [lane.free_at(now) + skipped_s for lane in lanes]
    while True:
        sizes = [_batch_size(left, rows, lane.max_rows) for lane in lanes]
        ends = [at + lane.times.run_s(size) for at, lane, size in zip(free_s, lanes, sizes, strict=True)]
        first = ends.index(min(ends))
        if sizes[first] == left + rows:  # its own batch, whose time must be one that 99 of 100 runs keep
            return free_s[first] + lanes[first].times.safe_s(max(sizes[first], lanes[first].max_rows if fills else 0))
        free_s[first] = ends[first]
        left -= sizes[first]


def _skip_waves(lanes: Sequence[LaneState], backlog_rows: int) -> tuple[float, int]:
    """Return the time that all lanes together need for all but the last few batches, and the rows of those.

    It keeps the cost of a prediction from growing with the backlog.
    """
    wave = sum(lane.max_rows for lane in lanes)
    if backlog_rows <= 8 * wave:
        return 0.0, backlog_rows
    rows_per_s = sum(lane.max_rows / max(lane.times.run_s(lane.max_rows), 1e-9) for lane in lanes)
    return (backlog_rows - 4 * wave) / rows_per_s, 4 * wave


def _batch_size(left: int, rows: int, max_rows: int) -> int:
    return left + rows if left + rows <= max_rows or not left else min(left, max_rows)


def _parallel(route: Route, rows: int, cores: int) -> list[LaneState]:
    """Return the lanes that can run this work at the same time, in order; none when there is no prediction."""
    if any(not lane.times.known for lane in route.preferred):
        return []
    lanes: list[LaneState] = []
    busy: dict[str, int] = {}
    bulk = [lane for lane in route.bulk if rows >= lane.from_rows]
    for lane in (*bulk, *route.preferred, *route.slower):
        threads = busy.get(lane.device, 0) + lane.threads
        if lane.times.known and (route.pin or lane.device not in busy or threads <= cores):
            busy[lane.device] = threads
            lanes.append(lane)
    return lanes


def rows_that_may_wait(route: Route, limits: BatchLimits, cores: int) -> int:
    """Return how many rows may wait: the limit by count, or by predicted work if that is less.

    Args:
        route: Of work that nobody pinned.
        limits: Of the model.
        cores: Cores that the model may count on.
    """
    lanes = _parallel(route, 0, cores) if limits.max_queue_s else []
    if not lanes:
        return limits.max_queue_rows
    rows_per_s = sum(lane.max_rows / max(lane.times.run_s(lane.max_rows), 1e-9) for lane in lanes)
    return max(1, min(limits.max_queue_rows, int(limits.max_queue_s * rows_per_s)))
