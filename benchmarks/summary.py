"""From single measurements to the table and the targets; pure."""

import statistics
from collections.abc import Sequence

import msgspec

from benchmarks.workloads import AnswerCheck


class Case(msgspec.Struct, frozen=True):
    """What a row of the table measures.

    Attributes:
        workload: Name of the model.
        system: ``raw``, ``slipstream`` or ``plain``.
        kind: ``json``, ``binary``, or ``arrays`` for raw.
        connections: Requests in flight; for raw, runs at a time.
        rows: Rows per request; for raw, per run.
    """

    workload: str
    system: str
    kind: str
    connections: int
    rows: int = 1

    @property
    def label(self) -> str:
        """How the table names it."""
        if self.system == "raw":
            return f"raw session.run, batch {self.rows}, {self.connections} at a time"
        return f"{self.system} {self.kind} c={self.connections}"


class Measurement(msgspec.Struct, frozen=True):
    """One case in one round.

    Attributes:
        requests: Answered requests; for raw, runs.
        seconds: Their span.
        server_cpu_s: CPU time of the server; for raw, of the process.
        client_cpu_s: CPU time of the load generator.
        latencies_ms: One per request.
        check: How the answers compare with the session's own; ``None`` for raw.
        variants: Variant -> requests that it answered.
    """

    requests: int
    seconds: float
    server_cpu_s: float
    client_cpu_s: float
    latencies_ms: list[float]
    check: AnswerCheck | None = None
    variants: dict[str, int] = {}


class Summary(msgspec.Struct, frozen=True):
    """One case over all rounds: medians over the rounds, percentiles over all requests.

    Attributes:
        cpu_ms: CPU milliseconds of the server per row, ``cpu_rounds_ms`` the same for each round.
        p50_ms: Median latency, ``p50_rounds_ms`` the same for each round.
        failed: Answers with an error status, ``wrong`` those that belong to another row.
    """

    case: Case
    rows_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    cpu_rounds_ms: list[float]
    p50_rounds_ms: list[float]
    client_cpu_ms: float
    failed: int
    wrong: int
    worst_error: float
    variants: dict[str, int]


class Target(msgspec.Struct, frozen=True):
    """A promise and what was seen.

    Attributes:
        text: What is promised.
        seen: Measured value, ``allowed`` its upper bound.
    """

    text: str
    seen: float
    allowed: float

    @property
    def kept(self) -> bool:
        """Whether the measured value is within its bound."""
        return self.seen <= self.allowed


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed.

    Args:
        values: At least one.
        share: Above 0, at most 1.
    """
    ordered = sorted(values)
    # Ceiling without floating-point surprises such as 0.99 * 100 > 99.
    rank = -(-round(share * len(ordered) * 1_000_000) // 1_000_000)
    return ordered[max(rank, 1) - 1]


def summarize(case: Case, rounds: Sequence[Measurement]) -> Summary:
    """Join the rounds of one case."""
    cpu = [m.server_cpu_s * 1e3 / (m.requests * case.rows) for m in rounds]
    latencies = [latency for m in rounds for latency in m.latencies_ms]
    checks = [m.check for m in rounds if m.check is not None]
    variants: dict[str, int] = {}
    for m in rounds:
        for name, count in m.variants.items():
            variants[name] = variants.get(name, 0) + count
    return Summary(
        case=case,
        rows_per_s=statistics.median(m.requests * case.rows / m.seconds for m in rounds),
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        cpu_ms=statistics.median(cpu),
        cpu_rounds_ms=cpu,
        p50_rounds_ms=[percentile(m.latencies_ms, 0.5) for m in rounds],
        client_cpu_ms=statistics.median(m.client_cpu_s * 1e3 / m.requests for m in rounds),
        failed=sum(check.failed for check in checks),
        wrong=sum(check.wrong for check in checks),
        worst_error=max((check.worst_error for check in checks), default=0.0),
        variants=variants,
    )


def table(summaries: Sequence[Summary]) -> str:
    """Return the table; ``x raw`` and ``x plain`` compare CPU per row with the best raw and the plain handler's row."""
    header = ("case", "rows/s", "p50 ms", "p99 ms", "CPU ms/row", "[low-high]", "x raw", "x plain", "client", "bad")
    lines = [header]
    for s in summaries:
        raw, plain = best_raw(summaries, s.case.workload), plain_of(summaries, s.case)
        lines.append(
            (
                f"{s.case.workload}: {s.case.label}",
                f"{s.rows_per_s:.4g}",
                f"{s.p50_ms:.3f}",
                f"{s.p99_ms:.3f}",
                f"{s.cpu_ms:.4f}",
                f"[{min(s.cpu_rounds_ms):.4g}-{max(s.cpu_rounds_ms):.4g}]",
                f"{cpu_ratio(s, raw):.2f}" if raw else "",
                f"{cpu_ratio(s, plain):.2f}" if plain else "",
                f"{s.client_cpu_ms:.3f}" if s.client_cpu_ms else "",
                str(s.failed + s.wrong) if s.case.system != "raw" else "",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(line, widths, strict=True)] for line in lines)
    )


def cpu_ratio(summary: Summary, baseline: Summary) -> float:
    """Return the median over the rounds of the ratio of CPU time per row: what both rounds suffered cancels out."""
    pairs = zip(summary.cpu_rounds_ms, baseline.cpu_rounds_ms, strict=True)
    return statistics.median(seen / base for seen, base in pairs)


def p50_above_ms(summary: Summary, baseline: Summary) -> float:
    """Return the median over the rounds of the difference of the median latencies."""
    pairs = zip(summary.p50_rounds_ms, baseline.p50_rounds_ms, strict=True)
    return statistics.median(seen - base for seen, base in pairs)


def best_raw(summaries: Sequence[Summary], workload: str) -> Summary | None:
    """Return the raw row with the least CPU time per row among those that run as many at a time as the server."""
    raw = [s for s in summaries if s.case.workload == workload and s.case.system == "raw"]
    most = max((s.case.connections for s in raw), default=0)
    return min((s for s in raw if s.case.connections == most), key=lambda s: s.cpu_ms, default=None)


def plain_of(summaries: Sequence[Summary], case: Case) -> Summary | None:
    """Return the plain handler's row with the same concurrency as a row of slipstream."""
    if case.system != "slipstream":
        return None
    return find(summaries, case.workload, "plain", "json", case.connections)


def find(summaries: Sequence[Summary], workload: str, system: str, kind: str, connections: int) -> Summary | None:
    """Return the row of a case."""
    wanted = (workload, system, kind, connections)
    cases = (s for s in summaries if (s.case.workload, s.case.system, s.case.kind, s.case.connections) == wanted)
    return min(cases, key=lambda s: s.case.rows, default=None)


def targets(summaries: Sequence[Summary], idle_cpu: dict[str, float]) -> list[Target]:
    """Return the promises that the measured rows can judge.

    Args:
        summaries: All rows.
        idle_cpu: Workload -> share of one core that its idle server used.
    """
    found = []
    tiny, plain = find(summaries, "tiny", "slipstream", "json", 16), find(summaries, "tiny", "plain", "json", 16)
    if tiny and plain:
        text = "tiny, JSON, c=16: server CPU per request, of the plain FastAPI handler's"
        found.append(Target(text, cpu_ratio(tiny, plain), 0.30))
    for workload in dict.fromkeys(s.case.workload for s in summaries if s.case.workload != "tiny"):
        loaded, limit = find(summaries, workload, "slipstream", "binary", 16), best_raw(summaries, workload)
        if loaded and limit:
            text = f"{workload}, binary, c=16: server CPU per row, of raw session.run's at its best batch size"
            found.append(Target(text, cpu_ratio(loaded, limit), 1.25))
        single, alone = (
            find(summaries, workload, "slipstream", "binary", 1),
            find(summaries, workload, "raw", "arrays", 1),
        )
        if single and alone:
            text = f"{workload}, binary, c=1: p50 above raw session.run of the same input, ms"
            found.append(Target(text, p50_above_ms(single, alone), 1.0))
    for workload, share in idle_cpu.items():
        found.append(Target(f"{workload}: idle server, share of one core", share, 0.001))
    return found
