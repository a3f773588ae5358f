"""Renders comparisons as Markdown."""

from collections.abc import Iterable, Sequence

from benchmarks.optimizing.results import OURS, OURS_DEFAULTS, Comparison, Report, Row, described

_HEAD = ("", "made in, CPU", "MB")
_TAIL = ("agreement on unseen", "accuracy", "promise")
_NOTHING = "-"


def render(report: Report) -> str:
    """Return the whole report: header, one table per model, summary, complaints."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in report.header.items())]
    parts += [_section(comparison) for comparison in report.comparisons]
    parts += ["## Summary", summary(report.comparisons)]
    complaints = [text for comparison in report.comparisons for text in comparison.complaints]
    parts.append("\n".join(f"- {text}" for text in complaints) or "Nothing is slower or broken beyond noise.")
    return "\n\n".join(parts)


def table(comparison: Comparison) -> str:
    """Return one model's contenders: a row each, those that failed with their reason."""
    sizes = next((row.latency.rows for row in comparison.rows if row.latency is not None), ())
    columns = [f"ms at {rows}" for rows in sizes] + [f"CPU ms/row at {rows}" for rows in sizes]
    columns += [f"ours against it at {rows}" for rows in sizes]
    head = [*_HEAD, *columns, *_TAIL]
    return _markdown(head, [_cells(row, len(columns)) for row in comparison.rows])


def summary(comparisons: Sequence[Comparison]) -> str:
    """Return one line per model: ours against everybody else at batch 1 and at its best batch, and the promise."""
    others = list(
        dict.fromkeys(row.name for c in comparisons for row in c.rows if row.name not in (OURS, OURS_DEFAULTS))
    )
    head = ["model", "chosen", *(f"against {name}" for name in others), "promise", "verdicts"]
    return _markdown(head, [_summary_cells(comparison, others) for comparison in comparisons])


def _section(comparison: Comparison) -> str:
    gate = comparison.gate
    lines = [
        f"## {comparison.model}",
        f"{comparison.about[:1].upper()}{comparison.about[1:]}. {comparison.headline}".strip(),
        f"Promise: agreement at least {gate.min_agreement:g}, accuracy lower by at most {gate.max_accuracy_drop:g}. "
        f"Samples: {comparison.seen} for everybody, {comparison.unseen} unseen, {comparison.repeated} left out as "
        f"repeated. Best batch of ours: {comparison.best_rows}.",
        table(comparison),
    ]
    notes = [f"- {row.name}: {'; '.join(row.notes)}" for row in comparison.rows if row.notes]
    judged = [(j.candidate, j.verdict, j.reason) for j in comparison.judged]
    return "\n\n".join([*lines, "\n".join(notes), _markdown(("candidate", "verdict", "reason"), judged)])


def _cells(row: Row, width: int) -> list[str]:
    if row.failure:
        return [
            row.name,
            *[_NOTHING] * (len(_HEAD) - 1),
            f"failed: {row.failure}",
            *[_NOTHING] * (width + len(_TAIL) - 1),
        ]
    made = f"{row.wall_s:.0f} s, {row.cpu_s:.0f} s" if row.wall_s else _NOTHING
    cells = [row.name, made, f"{row.size_bytes / 1e6:.2f}"]
    if row.latency is not None:
        times = zip(row.latency.p50_ms, row.latency.low_ms, row.latency.high_ms, strict=True)
        cells += [f"{p50:.3g} ({low:.3g}-{high:.3g})" for p50, low, high in times]
        cells += [f"{ms:.3g}" for ms in row.cpu_ms]
        cells += [f"{described(speed)} {speed.verdict}" for speed in row.ours] or [_NOTHING] * len(row.cpu_ms)
    else:
        cells += [_NOTHING] * width
    return [*cells, *_fidelity_cells(row)]


def _fidelity_cells(row: Row) -> list[str]:
    found = row.fidelity
    if found is None:
        return [_NOTHING, _NOTHING, row.promise or _NOTHING]
    agreement = f"{found.agreement:.4f} ({found.agreement_low:.4f}-{row.agreement_high:.4f}), {found.decision}"
    accuracy = _NOTHING if found.accuracy is None else f"{found.accuracy:.4f}"
    return [agreement, accuracy, row.promise or _NOTHING]


def _summary_cells(comparison: Comparison, others: Sequence[str]) -> list[str]:
    ours = comparison.row(OURS)
    if ours.failure:
        return [comparison.model, f"failed: {ours.failure}", *[_NOTHING] * (len(others) + 2)]
    rows = {row.name: row for row in comparison.rows}
    numbered = len(comparison.verdicts) - len(comparison.unnumbered)
    against = [_against(rows.get(name), comparison.best_rows) for name in others]
    verdicts = f"{numbered} of {len(comparison.verdicts)} with numbers"
    verdicts += f", without: {', '.join(comparison.unnumbered)}" if comparison.unnumbered else ""
    return [comparison.model, comparison.chosen, *against, ours.promise or _NOTHING, verdicts]


def _against(row: Row | None, best_rows: int) -> str:
    if row is None:
        return _NOTHING
    if row.failure:
        return "failed"
    speeds = {speed.rows: speed for speed in row.ours}
    said = [f"{described(speeds[rows])} {speeds[rows].verdict} at {rows}" for rows in sorted({1, best_rows})]
    if row.promise == "broken":
        said.append("it breaks the promise")
    return ", ".join(said)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *([cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
