"""The result of a load test: a table to read, CSV and JSON to keep, a plot to look at."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loadtests.shapes import Phase
from loadtests.tallies import FAILED, REFUSALS, UNANSWERED, Tally

_BUSY = 0.9
"""Share of a core above which a generator's process measures itself."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the result.

    Attributes:
        name: Phase or kind of request.
        seconds: How long it was.
        rate_per_s: Planned requests per second; 0 in a closed loop.
        tally: What was counted.
    """

    name: str
    seconds: float
    rate_per_s: float
    tally: Tally


@dataclass(frozen=True, slots=True)
class Result:
    """What a load test found.

    Attributes:
        title: What was asked, in words.
        phases: Those that took place.
        kinds: The same requests by their kind, without the warm-up.
        timeline: One row for each second.
        missed: What was missed of the objective; empty when it was reached.
        generator_cpu: Share of a core that each process of the generator took.
        findings: What else is worth a line.
    """

    title: str
    phases: Sequence[Line]
    kinds: Sequence[Line]
    timeline: Sequence[Line]
    missed: Sequence[str]
    generator_cpu: Sequence[float]
    findings: Sequence[str] = ()


def lines_of(phases: Sequence[tuple[Phase, Tally]]) -> list[Line]:
    """Return phases as rows."""
    return [Line(phase.name, phase.seconds, phase.rate_per_s, tally) for phase, tally in phases]


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _count(outcome: str, line: Line) -> str:
    return str(line.tally.outcomes[outcome])


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "asked/s": lambda line: f"{line.tally.asked / line.seconds:.1f}",
    "good/s": lambda line: f"{line.tally.good / line.seconds:.1f}",
    "p50 ms": lambda line: _ms(line.tally.percentile_ms(0.5)),
    "p90 ms": lambda line: _ms(line.tally.percentile_ms(0.9)),
    "p99 ms": lambda line: _ms(line.tally.percentile_ms(0.99)),
    "queue ms": lambda line: _ms(line.tally.queue_ms / line.tally.answered if line.tally.answered else math.nan),
    "compute ms": lambda line: _ms(line.tally.compute_ms / line.tally.answered if line.tally.answered else math.nan),
    **{name: partial(_count, name) for name in (*REFUSALS.values(), FAILED, UNANSWERED)},
}


def table(measured: Sequence[Line], first: str = "phase") -> str:
    """Return rows as a table; columns in which nothing was counted are left out."""
    columns = {
        name: cells
        for name, cell in _COLUMNS.items()
        if (cells := [cell(line) for line in measured]) and not set(cells) <= {"0", "-"}
    }
    head = [first, *columns]
    rows = [[line.name, *(cells[row] for cells in columns.values())] for row, line in enumerate(measured)]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def summary(result: Result) -> str:
    """Return what a reader wants to know after the test."""
    parts = [result.title, table(result.phases)]
    if len(result.kinds) > 1:
        parts.append(table(result.kinds, "request"))
    parts += [*result.findings, generator_line(result.generator_cpu)]
    parts.append(
        "\n".join(f"FAILED: {text}" for text in result.missed) if result.missed else "PASSED: every threshold is kept"
    )
    return "\n\n".join(parts)


def generator_line(shares: Sequence[float]) -> str:
    """Say how busy the generator was, and what follows."""
    busiest = max(shares, default=0.0)
    text = f"load generator: {len(shares)} process{'es' * (len(shares) != 1)}, the busiest took {busiest:.0%} of a core"
    if busiest > _BUSY:
        text += "; that is all it can: these latencies are its own, take more processes or fewer requests"
    return text


def save(result: Result, prefix: Path) -> None:
    """Write PREFIX.json and PREFIX-phases.csv, PREFIX-timeline.csv."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for name, lines in (("phases", result.phases), ("timeline", result.timeline)):
        with prefix.with_name(f"{prefix.name}-{name}.csv").open("w", newline="") as file:
            records = [record(line) for line in lines]
            writer = csv.DictWriter(file, list(records[0]) if records else [])
            writer.writeheader()
            writer.writerows(records)
    document = {
        "title": result.title,
        "phases": [record(line) for line in result.phases],
        "kinds": [record(line) for line in result.kinds],
        "findings": list(result.findings),
        "missed": list(result.missed),
        "generator_cpu": [round(share, 3) for share in result.generator_cpu],
    }
    prefix.with_name(f"{prefix.name}.json").write_text(json.dumps(document, indent=1) + "\n")


def record(line: Line) -> dict[str, Any]:
    """Return a row's figures under names that carry units; what was not counted is ``None``."""
    tally = line.tally
    percentiles = {f"p{share:g}_ms": tally.percentile_ms(share / 100) for share in (50, 90, 99)}
    return {
        "name": line.name,
        "seconds": line.seconds,
        "rate_per_s": round(line.rate_per_s, 3),
        "asked_per_s": round(tally.asked / line.seconds, 3),
        "answered_per_s": round(tally.answered / line.seconds, 3),
        "good_per_s": round(tally.good / line.seconds, 3),
        **{name: None if math.isnan(value) else round(value, 3) for name, value in percentiles.items()},
        **{name.replace(" ", "_"): tally.outcomes[name] for name in (*REFUSALS.values(), FAILED, UNANSWERED)},
    }
