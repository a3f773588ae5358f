"""The variant for large batches: one that loses for a single row may win for many. Pure.

Small models show it: converting to INT8 costs more than it saves on one row, and pays on 32. The rules:

1. It is faithful, and runs where the first choice runs.
2. From some measured batch size on, at every size that the wanted p99 allows, it is ``LEAST_GAIN`` times faster than
   the first choice, each time by an interval that excludes 1.
3. Neither of the two spins: the threads of one would take the cores from the other. Where spinning makes the first
   choice faster, it serves all batches.
"""

from collections.abc import Sequence

import msgspec

from optimizers.measurement import Comparison, Race
from optimizers.pareto import Policy
from optimizers.search import LEAST_GAIN, Candidate, Decision, Gate, Verdict, best_speedup, unfaithful


class Bulk(msgspec.Struct, frozen=True):
    """The variant for large batches.

    Attributes:
        name: The candidate.
        from_rows: Least rows of the batches that it takes.
        speed: Against the first choice, at ``from_rows`` and all larger sizes.
    """

    name: str
    from_rows: int
    speed: tuple[Comparison, ...]


def find_bulk(first: Candidate, others: Sequence[Candidate], gate: Gate, race: Race, policy: Policy) -> Bulk | None:
    """Return the best variant for large batches, if there is one.

    Args:
        first: The first choice.
        others: All other candidates; those without ``failure`` took part in the race.
        gate: The fidelity that is required.
        race: Latencies.
        policy: What is wanted; only for ``latency`` and ``throughput`` is speed a reason.
    """
    if policy.objective not in ("latency", "throughput"):
        return None
    rows = _allowed(race, first.name, policy.slo_ms)
    found = [
        bulk
        for other in others
        if _may_serve(other, first, gate)
        if (bulk := gains_from(other.name, first.name, rows, race)) is not None
    ]
    return max(found, key=lambda bulk: bulk.speed[-1].speedup, default=None)


def gains_from(name: str, first: str, rows: Sequence[int], race: Race) -> Bulk | None:
    """Return from how many rows on a candidate beats the first choice; ``None`` when it does not for the largest batch.

    Args:
        name: The candidate in the race.
        first: The first choice in the race.
        rows: Batch sizes, ascending.
        race: Latencies of both.
    """
    gained: list[Comparison] = []
    for size in reversed(rows):
        comparison = race.compare(name, first, size)
        if comparison.verdict != "faster" or comparison.speedup < LEAST_GAIN:
            break
        gained.insert(0, comparison)
    return Bulk(name, gained[0].rows, tuple(gained)) if gained else None


def promises_bulk(comparisons: Sequence[Comparison]) -> bool:
    """Whether a candidate that is slower for small batches may be one for large ones."""
    largest = max(comparisons, key=lambda c: c.rows, default=None)
    return largest is not None and largest.verdict != "slower" and best_speedup(comparisons) >= LEAST_GAIN


def with_bulk(decision: Decision, bulk: Bulk) -> Decision:
    """Serve a variant for large batches behind the first choice."""
    first = decision.kept[0]
    seen = ", ".join(str(c) for c in bulk.speed)
    reason = f"faithful, and serves batches of {bulk.from_rows} rows and more: {seen} of {first}"
    kept = (first, bulk.name, *(name for name in decision.kept[1:] if name != bulk.name))
    verdicts = {**decision.verdicts, bulk.name: Verdict(True, reason, proven=True)}
    return msgspec.structs.replace(decision, kept=kept, verdicts=verdicts)


def _allowed(race: Race, first: str, slo_ms: float | None) -> list[int]:
    """Return the batch sizes above one row whose p99 keeps the wanted latency."""
    table = race.table(first)
    pairs = zip(table.rows, table.p99_ms, strict=True)
    return [rows for rows, p99_ms in pairs if rows > 1 and (slo_ms is None or p99_ms <= slo_ms)]


def _may_serve(candidate: Candidate, first: Candidate, gate: Gate) -> bool:
    if candidate.failure or candidate.name == first.name or candidate.provider != first.provider:
        return False
    return candidate.exact or (candidate.fidelity is not None and not unfaithful(candidate.fidelity, gate))
