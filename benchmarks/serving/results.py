"""What the comparison measures, as it is written to JSON."""

from collections.abc import Sequence

import msgspec

from benchmarks.open_loop import OpenOutcome
from benchmarks.summary import Measurement, Summary, Target, percentile


class Start(msgspec.Struct, frozen=True):
    """One start of one server.

    Attributes:
        model: What it served.
        system: Which.
        start_s: From its spawn to the first right answer.
        rss_mb: Resident memory of its process tree after the load.
        pss_mb: The same, what is shared counted once.
        idle_cores: Cores that the tree used while nothing was asked of it.
    """

    model: str
    system: str
    start_s: float
    rss_mb: float
    pss_mb: float
    idle_cores: float


class Rate(msgspec.Struct, frozen=True):
    """One arrival rate offered to one server in an open loop.

    Attributes:
        model: What it served.
        system: Which.
        kind: Of the messages.
        burst: Requests per arrival; 1 is Poisson.
        share: Of the model's reference rate.
        rate: Requests per second.
        slo_ms: Within which an answer counts, from the time when it was due.
        goodput: Good answers per second in that time.
        in_time: Their share of all requests that were due.
        p50_ms: Of all good answers since they were due; ``None`` without any.
        p99_ms: The same.
        answered: Outcome -> requests.
        server_cores: Cores that the server used, ``generator_cores`` those of the generator.
        late_ms: The worst delay of the generator itself.
        skipped: Why it was not offered; empty if it was.
    """

    model: str
    system: str
    kind: str
    burst: int
    share: float
    rate: float
    slo_ms: float
    goodput: float = 0.0
    in_time: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    answered: dict[str, int] = {}
    server_cores: float = 0.0
    generator_cores: float = 0.0
    late_ms: float = 0.0
    skipped: str = ""


class Ablated(msgspec.Struct, frozen=True):
    """What one idea buys.

    Attributes:
        idea: What was taken away, and what stood in its place.
        model: What was served.
        figure: What was measured, with its unit.
        with_it: Of the server as it is, one for each round.
        without: Of the server without the idea.
        more_is_better: Whether the figure should be large.
    """

    idea: str
    model: str
    figure: str
    with_it: list[float]
    without: list[float]
    more_is_better: bool


class Failure(msgspec.Struct, frozen=True):
    """A server that did not start, gave wrong answers at its start, or left the load without an answer."""

    model: str
    system: str
    what: str


class Round(msgspec.Struct, frozen=True):
    """One case in one round, without the single latencies."""

    requests: int
    seconds: float
    server_cpu_s: float
    client_cpu_s: float
    p50_ms: float
    p99_ms: float
    worst_ms: float


class Comparison(msgspec.Struct, frozen=True):
    """Everything that one run measured.

    Attributes:
        header: Machine, versions, method.
        systems: System -> what a reader should know of it.
        references: Model -> requests per second that count as 1 in the open loop, and whose they are.
        summaries: Closed loops and raw sessions, over all rounds.
        rounds: Case -> its rounds.
        starts: Every start.
        rates: The open loop.
        ablations: What our own ideas buy.
        bars: What was promised.
        failures: What could not be measured.
    """

    header: dict[str, str]
    systems: dict[str, str]
    references: dict[str, tuple[float, str]]
    summaries: list[Summary]
    rounds: dict[str, list[Round]]
    starts: list[Start]
    rates: list[Rate]
    ablations: list[Ablated]
    bars: list[Target]
    failures: list[Failure]


def round_of(measured: Measurement) -> Round:
    """Shorten a measurement."""
    latencies = measured.latencies_ms
    return Round(
        measured.requests,
        measured.seconds,
        measured.server_cpu_s,
        measured.client_cpu_s,
        percentile(latencies, 0.5),
        percentile(latencies, 0.99),
        max(latencies),
    )


def offered(rate: Rate, outcome: OpenOutcome) -> Rate:
    """Fill in what came of a rate."""
    in_time = sum(ms <= rate.slo_ms for ms in outcome.ok_ms)
    return msgspec.structs.replace(
        rate,
        goodput=in_time / outcome.seconds,
        in_time=in_time / max(1, outcome.sent),
        p50_ms=percentile(outcome.ok_ms, 0.5) if outcome.ok_ms else None,
        p99_ms=percentile(outcome.ok_ms, 0.99) if outcome.ok_ms else None,
        answered=outcome.answered,
        server_cores=outcome.server_cpu_s / outcome.seconds,
        generator_cores=outcome.client_cpu_s / outcome.seconds,
        late_ms=outcome.late_ms,
    )


def reference_of(
    summaries: Sequence[Summary], model: str, ours: Sequence[str], silent: Sequence[str]
) -> tuple[float, str]:
    """Return the best closed-loop rate of any other server, and its name; our own where there is no other.

    Args:
        summaries: Closed loops.
        model: Of which model.
        ours: Systems that count only where there is no other.
        silent: Systems that do not run the model.

    Raises:
        ValueError: If nothing was measured.
    """
    rows = [s for s in summaries if s.case.workload == model and s.case.system not in ("raw", *silent)]
    others = [s for s in rows if s.case.system not in ours]
    best = max(others or rows, key=lambda s: s.rows_per_s, default=None)
    if best is None:
        raise ValueError(f"no server of {model} was measured")
    return best.rows_per_s, f"{best.case.system}, {best.case.kind}, {best.case.connections} clients"
