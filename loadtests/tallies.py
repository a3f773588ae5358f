"""What a load test counts: answers, refusals and failures per second and kind of request, with their latencies.

Knows no load generator: Locust's workers send their tallies to the master as plain lists, ``slipstream bench`` fills
one directly.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

OK = "ok"
UNANSWERED = "unanswered"
"""A request that was due and had no answer when the test was over."""
FAILED = "failed"
REFUSALS = {429: "refused 429", 503: "refused 503", 504: "expired 504"}
"""Answers by which a server says in good order that it will not: too much load, not ready, too late."""

_GROWTH = math.log(1.01)
_LEAST_MS = 1e-3

Row = tuple[int, int, dict[str, int], dict[int, int], int, float, float]
"""Second, kind, and the attributes of their tally."""


@dataclass(slots=True)
class Tally:
    """What became of some requests.

    Attributes:
        outcomes: ``ok``, a refusal, ``failed`` or ``unanswered`` -> requests.
        latencies: Bucket -> good answers; a bucket is one percent wide, so that tallies can be added.
        good: Answers in time.
        queue_ms: Sum over the answers of the time for which the server says they were queued.
        compute_ms: The same of the time that the model ran.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: Counter[int] = field(default_factory=Counter)
    good: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0

    def add(self, outcome: str, latency_ms: float, *, in_time: bool) -> None:
        """Count one request; its latency matters only if the answer is good."""
        self.outcomes[outcome] += 1
        if outcome == OK:
            self.latencies[round(math.log(max(latency_ms, _LEAST_MS)) / _GROWTH)] += 1
            self.good += in_time

    def merge(self, other: "Tally") -> None:
        """Add what another one counted."""
        self.outcomes.update(other.outcomes)
        self.latencies.update(other.latencies)
        self.good += other.good
        self.queue_ms += other.queue_ms
        self.compute_ms += other.compute_ms

    @property
    def asked(self) -> int:
        """Requests that were due."""
        return self.outcomes.total()

    @property
    def answered(self) -> int:
        """Good answers."""
        return self.outcomes[OK]

    @property
    def refused(self) -> int:
        """Refusals of every kind."""
        return sum(self.outcomes[name] for name in REFUSALS.values())

    @property
    def failed(self) -> int:
        """Errors, wrong answers, and requests without an answer."""
        return self.outcomes[FAILED] + self.outcomes[UNANSWERED]

    def percentile_ms(self, share: float) -> float:
        """Return a percentile of the latencies of good answers, within half a percent; ``nan`` if there is none."""
        wanted = max(1, math.ceil(share * self.latencies.total()))
        seen = 0
        for bucket in sorted(self.latencies):
            seen += self.latencies[bucket]
            if seen >= wanted:
                return math.exp(bucket * _GROWTH)
        return math.nan


class Recording:
    """Tallies by second of the test and kind of request."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[int, int], Tally] = {}

    def at(self, second_s: float, kind: int) -> Tally:
        """Return the tally of the second in which a request was due."""
        key = (math.floor(second_s), kind)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        return tally

    def between(self, start_s: float, end_s: float, kind: int | None = None) -> Tally:
        """Add up what was due from one second to before another; of one kind of request, or of all."""
        total = Tally()
        for (second, number), tally in self._tallies.items():
            if start_s <= second < end_s and kind in (None, number):
                total.merge(tally)
        return total

    def take(self) -> list[Row]:
        """Return everything as plain values, and forget it: what a worker reports."""
        rows: list[Row] = [
            (*key, dict(tally.outcomes), dict(tally.latencies), tally.good, tally.queue_ms, tally.compute_ms)
            for key, tally in self._tallies.items()
        ]
        self._tallies.clear()
        return rows

    def give(self, rows: Iterable[Row]) -> None:
        """Add what a worker reports."""
        for second, kind, outcomes, latencies, good, queue_ms, compute_ms in rows:
            self.at(second, kind).merge(Tally(Counter(outcomes), Counter(latencies), good, queue_ms, compute_ms))


def outcome_of(status: int) -> str:
    """Return what an HTTP status means for a load test."""
    return OK if status == 200 else REFUSALS.get(status, FAILED)
