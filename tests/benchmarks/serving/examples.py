"""Figures as a run would give them."""

from benchmarks.serving.results import Ablated, Comparison, Failure, Rate, Start
from benchmarks.summary import Case, Summary, Target


def summary(
    model: str,
    system: str,
    kind: str,
    clients: int,
    cpu_ms: float,
    *,
    per_s: float = 100.0,
    p50_ms: float = 1.0,
    p99_ms: float = 2.0,
    rows: int = 1,
) -> Summary:
    case = Case(model, system, kind, clients, rows)
    return Summary(case, per_s, p50_ms, p99_ms, cpu_ms, [cpu_ms], [p50_ms], 0.1, 0, 0, 1e-7, {})


def rate(system: str, share: float, goodput: float, p99_ms: float | None = 5.0, *, burst: int = 1, model: str = "cnn"):
    skipped = "" if goodput >= 0 else "hopeless"
    in_time = goodput / (100 * share)
    answered = {"ok": 9}
    return Rate(
        model,
        system,
        "binary",
        burst,
        share,
        100 * share,
        250.0,
        goodput,
        in_time,
        1.0,
        p99_ms,
        answered,
        skipped=skipped,
    )


def comparison() -> Comparison:
    summaries = [
        summary("cnn", "raw", "arrays", 2, 8.0, rows=8),
        summary("cnn", "slipstream", "binary", 16, 9.0),
        summary("cnn", "Triton", "binary", 16, 12.0),
        summary("cnn", "Triton", "json", 16, 30.0),
    ]
    rates = [
        rate("slipstream", 1, 99.0),
        rate("Triton", 1, 80.0, None),
        rate("Triton", 2, -1.0),
        rate("slipstream", 0.5, 50.0, burst=8),
    ]
    return Comparison(
        header={"machine": "a CPU"},
        systems={"slipstream": "the original", "Triton": "another"},
        references={"cnn": (100.0, "Triton, binary, 16 clients")},
        summaries=summaries,
        rounds={},
        starts=[Start("cnn", "Triton", s, 10.0, 5.0, 0.01) for s in (3.0, 1.0, 2.0)],
        rates=rates,
        ablations=[Ablated("batching", "cnn", "CPU ms", [1.0, 2.0, 3.0], [2.0, 6.0, 6.0], more_is_better=False)],
        bars=[Target("first", 1.0, 2.0), Target("second", 3.0, 2.0)],
        failures=[Failure("cnn", "Ray Serve", "not installed")],
    )
