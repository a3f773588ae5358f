"""When work would be done, from the lanes that may take it and the backlog before it. Pure."""

import math
from collections.abc import Sequence

from server.batching import BatchLimits
from server.routes import LaneState, Route


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
    return completion_s(lanes, backlog_rows, rows, now, fills=fills)


def completion_s(lanes: Sequence[LaneState], backlog_rows: int, rows: int, now: float, *, fills: bool = False) -> float:
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
