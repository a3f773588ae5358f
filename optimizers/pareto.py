"""Which candidates are worth having: the Pareto set, and the policy that chooses from it. Pure."""

from collections.abc import Sequence

import msgspec

from optimizers.recipe import Objective
from server.artifact import LatencyTable

# Differences below these shares are noise, or not worth a choice.
_TIME_TOLERANCE = 0.05
_BYTES_TOLERANCE = 0.01


class Policy(msgspec.Struct, frozen=True):
    """What is wanted of the candidates that are faithful.

    Attributes:
        objective: What the first choice has the most, or the least, of.
        slo_ms: Wanted p99 of one run in milliseconds; ``None`` sets no limit.
    """

    objective: Objective = "latency"
    slo_ms: float | None = None


class Standing(msgspec.Struct, frozen=True):
    """Where a candidate stands.

    Attributes:
        name: Its name.
        p99_ms: 99th percentile of a run with one row.
        rows_per_s: Best throughput of one session, over the batch sizes that keep the wanted p99.
        best_rows: The smallest batch size that comes within 5 % of it: the knee.
        memory_bytes: Resident memory that its session adds; ``None`` when it was not measured.
        size_bytes: Of its files.
        agreement: With the original on held-out samples; 1 for the original itself.
    """

    name: str
    p99_ms: float
    rows_per_s: float
    best_rows: int
    size_bytes: int
    agreement: float
    memory_bytes: int | None = None


def standing_of(
    name: str,
    table: LatencyTable,
    size_bytes: int,
    agreement: float,
    memory_bytes: int | None = None,
    slo_ms: float | None = None,
) -> Standing:
    """Reduce what was measured of a candidate to its standing.

    Args:
        name: Its name.
        table: Its latencies.
        size_bytes: Size of its files.
        agreement: 0 to 1.
        memory_bytes: Resident memory, if measured.
        slo_ms: Batches whose p99 is longer do not count; one row always does.
    """
    rates = {
        rows: rows / max(p50, 1e-9) * 1e3
        for rows, p50, p99 in zip(table.rows, table.p50_ms, table.p99_ms, strict=True)
        if slo_ms is None or p99 <= slo_ms or rows == table.rows[0]
    }
    most = max(rates.values())
    knee = next(rows for rows, rate in rates.items() if rate >= 0.95 * most)
    return Standing(name, table.p99_ms[0], most, knee, size_bytes, agreement, memory_bytes)


def dominates(first: Standing, second: Standing) -> bool:
    """Tell whether ``first`` is nowhere worse than ``second`` and somewhere better, by more than noise."""
    pairs = [
        (second.p99_ms, first.p99_ms, _TIME_TOLERANCE),
        (first.rows_per_s, second.rows_per_s, _TIME_TOLERANCE),
        (second.size_bytes, first.size_bytes, _BYTES_TOLERANCE),
        (first.agreement, second.agreement, 0.0),
    ]
    if first.memory_bytes is not None and second.memory_bytes is not None:
        pairs.append((second.memory_bytes, first.memory_bytes, _TIME_TOLERANCE))
    # In each pair the first number is larger where ``first`` is better.
    never_worse = all(mine >= other * (1 - tolerance) for mine, other, tolerance in pairs)
    return never_worse and any(mine > other * (1 + tolerance) for mine, other, tolerance in pairs)


def pareto(standings: Sequence[Standing]) -> tuple[str, ...]:
    """Return the names of those that no other one dominates, in the order given."""
    return tuple(s.name for s in standings if not any(dominates(other, s) for other in standings))


def gain(candidate: Standing, baseline: Standing, objective: Objective, speedup: float) -> float:
    """Return how many times better a candidate is than a baseline by an objective; above 1 is better.

    Args:
        candidate: Where it stands.
        baseline: What it must beat.
        objective: What counts. Memory that was not measured counts by size.
        speedup: Its mean speed-up over the baseline from paired runs, which decides for ``latency``.
    """
    if objective == "latency":
        return speedup
    if objective == "throughput":
        return candidate.rows_per_s / max(baseline.rows_per_s, 1e-9)
    if objective == "memory" and candidate.memory_bytes is not None and baseline.memory_bytes is not None:
        return baseline.memory_bytes / max(candidate.memory_bytes, 1)
    return baseline.size_bytes / max(candidate.size_bytes, 1)
