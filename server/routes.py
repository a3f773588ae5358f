"""Lanes as routing sees them, and which of them take which work. Pure; the scheduler keeps the states up to date."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from server.artifact import LatencyTable
from server.batching import BatchLimits
from server.estimate import Estimate
from server.tensors import Array, Tensors

_LOOK_EACH = 32
_LEAST_TRIAL_GAP, _MOST_TRIAL_GAP = 32, 1024
_LEAST_GROWTH_GAP, _MOST_GROWTH_GAP = 256, 16_384


class Runner(Protocol):
    """What a lane runs its batches with."""

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Run one batch; called from the lane's thread, or on the loop for a tiny model."""
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
