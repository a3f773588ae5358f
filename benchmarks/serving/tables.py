"""The Markdown of a comparison; pure."""

from collections.abc import Iterable, Sequence

from benchmarks.serving.results import Ablated, Comparison, Rate, Start
from benchmarks.summary import Summary, best_raw, find

MISSING = "–"


def markdown(comparison: Comparison) -> str:
    """Return the whole page."""
    models = list(dict.fromkeys(s.case.workload for s in comparison.summaries))
    parts = ["# Comparison of servers", "", *(f"- {key}: {value}" for key, value in comparison.header.items())]
    parts += ["", *(f"- **{name}**: {about}" for name, about in comparison.systems.items())]
    parts += ["", "## Bars", "", bar_table(comparison)]
    for model in models:
        parts += ["", f"## {model}: closed loop", "", closed_table(comparison.summaries, model)]
        rates = [rate for rate in comparison.rates if rate.model == model]
        if rates:
            value, whose = comparison.references[model]
            text = f"1 is {value:.0f} requests/s ({whose}). Answers count within {rates[0].slo_ms:g} ms after due."
            parts += ["", f"## {model}: open loop", "", text, "", open_table(rates)]
    parts += ["", "## At rest", "", start_table(comparison.starts)]
    if comparison.ablations:
        parts += ["", "## Ablations", "", ablation_table(comparison.ablations)]
    if comparison.failures:
        parts += ["", "## Not measured", ""]
        parts += [f"- {failure.system}, {failure.model}: {failure.what}" for failure in comparison.failures]
    return "\n".join(parts) + "\n"


def bar_table(comparison: Comparison) -> str:
    """Return a line for each promise."""
    header = ("bar", "seen", "at most", "verdict")
    return _table(
        header,
        (
            (bar.text, f"{bar.seen:.3g}", f"{bar.allowed:g}", "kept" if bar.kept else "MISSED")
            for bar in comparison.bars
        ),
    )


def closed_table(summaries: Sequence[Summary], model: str) -> str:
    """Return a line for each system and kind of messages of one model; medians of the rounds."""
    header = (
        "system",
        "messages",
        "clients",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "CPU ms",
        "[low-high]",
        "x raw",
        "answers",
    )
    raw = best_raw(summaries, model)
    lines = []
    for s in summaries:
        if s.case.workload != model:
            continue
        is_raw = s.case.system == "raw"
        bad = s.failed + s.wrong
        lines.append(
            (
                s.case.label if is_raw else s.case.system,
                MISSING if is_raw else s.case.kind,
                MISSING if is_raw else str(s.case.connections),
                f"{s.rows_per_s:.4g}",
                f"{s.p50_ms:.3g}",
                f"{s.p99_ms:.3g}",
                f"{s.cpu_ms:.3g}",
                f"[{min(s.cpu_rounds_ms):.3g}-{max(s.cpu_rounds_ms):.3g}]",
                f"{s.cpu_ms / raw.cpu_ms:.2f}" if raw else MISSING,
                MISSING if is_raw else f"{bad} bad" if bad else f"right, {s.worst_error:.1g}",
            )
        )
    return _table(header, lines)


def open_table(rates: Sequence[Rate]) -> str:
    """Return a line for each rate and system of one model."""
    header = (
        "arrivals", "rate", "system", "goodput/s", "p50 ms", "p99 ms", "other outcomes", "server cores",
        "generator cores", "late ms",
    )  # fmt: skip
    lines = []
    for rate in sorted(rates, key=lambda rate: (rate.burst, rate.share)):
        others = ", ".join(f"{name} {count}" for name, count in sorted(rate.answered.items()) if name != "ok")
        arrivals = "Poisson" if rate.burst == 1 else f"bursts of {rate.burst}"
        figures: tuple[str, ...] = (MISSING,) * 3 + (f"not offered: {rate.skipped}",) + (MISSING,) * 3
        if not rate.skipped:
            figures = (
                f"{rate.goodput:.4g}",
                MISSING if rate.p50_ms is None else f"{rate.p50_ms:.3g}",
                MISSING if rate.p99_ms is None else f"{rate.p99_ms:.3g}",
                others or "none",
                f"{rate.server_cores:.2f}",
                f"{rate.generator_cores:.2f}",
                f"{rate.late_ms:.1f}",
            )
        lines.append((arrivals, f"{rate.share:g} ({rate.rate:.0f}/s)", rate.system, *figures))
    return _table(header, lines)


def start_table(starts: Sequence[Start]) -> str:
    """Return start-up, memory and idle CPU, the median start of each system and model."""
    header = ("model", "system", "start s", "RSS MB", "PSS MB", "idle cores")
    lines = []
    for model, system in dict.fromkeys((start.model, start.system) for start in starts):
        same = sorted((s for s in starts if (s.model, s.system) == (model, system)), key=lambda s: s.start_s)
        start = same[len(same) // 2]
        figures = (f"{start.start_s:.1f}", f"{start.rss_mb:.0f}", f"{start.pss_mb:.0f}", f"{start.idle_cores:.3f}")
        lines.append((model, system, *figures))
    return _table(header, lines)


def ablation_table(ablations: Sequence[Ablated]) -> str:
    """Return what each idea buys."""
    header = ("idea, and what replaces it", "model", "figure", "with", "without", "gain")
    return _table(
        header,
        (
            (a.idea, a.model, a.figure, f"{median(a.with_it):.3g}", f"{median(a.without):.3g}", f"{gain(a):.2f}x")
            for a in ablations
        ),
    )


def gain(ablated: Ablated) -> float:
    """Return how many times as good the figure is with the idea; the median of the rounds."""
    pairs = zip(ablated.with_it, ablated.without, strict=True)
    ratios = [(a / b if ablated.more_is_better else b / a) if a and b else float("nan") for a, b in pairs]
    return median(ratios)


def median(values: Sequence[float]) -> float:
    """Return the middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]


def cheapest(summaries: Sequence[Summary], model: str, system: str, connections: int) -> Summary | None:
    """Return the cheapest row of a system, whatever its messages."""
    rows = [find(summaries, model, system, kind, connections) for kind in ("json", "binary")]
    return min((row for row in rows if row), key=lambda s: s.cpu_ms, default=None)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
