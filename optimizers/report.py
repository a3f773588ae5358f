"""Writes the report of one optimizer run: ``report.json`` (everything) and ``report.html`` (the same for people).

The HTML is one file without any reference to the outside.
"""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from optimizers.fidelity import describe
from optimizers.intervals import wilson
from optimizers.measurement import bound_text
from optimizers.plots import GREY, colours_of, latency_plot, points_of, trade_off_plot
from optimizers.ranking import ranking
from optimizers.records import (
    ORIGINAL,
    UNTOUCHED,
    CandidateRecord,
    DataRecord,
    EngineRecord,
    PassRecord,
    Report,
    ServedRecord,
    Speed,
    StepRecord,
    mean_of,
)
from optimizers.search import deciding_rows
from optimizers.waterfall import Waterfall, served_record, waterfall
from server.artifact import Fidelity, LatencyTable

__all__ = [
    "ORIGINAL",
    "REPORT_HTML",
    "REPORT_JSON",
    "UNTOUCHED",
    "CandidateRecord",
    "DataRecord",
    "EngineRecord",
    "PassRecord",
    "Report",
    "ServedRecord",
    "Speed",
    "StepRecord",
    "mean_of",
    "read_report",
    "render_html",
    "replay_command",
    "write_report",
]

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
RECIPE = "recipe.toml"

_IDENTICAL_DB = 200.0


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into a folder.

    JSON knows no infinity: infinite numbers are written as the largest finite ones.
    """
    plain = _finite(msgspec.to_builtins(report))
    (folder / REPORT_JSON).write_bytes(msgspec.json.format(msgspec.json.encode(plain)) + b"\n")
    (folder / REPORT_HTML).write_text(render_html(report), encoding="utf-8")


def read_report(folder: Path) -> Report:
    """Read ``report.json``.

    Raises:
        OSError: If there is none.
        msgspec.MsgspecError: If it is not a report.
    """
    return msgspec.json.decode((folder / REPORT_JSON).read_bytes(), type=Report)


def render_html(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optimizers", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(mb=_mb, ms=_ms, db=_db, fidelity_text=describe, change=_change, at=_at, share=_share)
    environment.filters.update(bound=bound_text)
    best = served_record(report, report.chosen)
    return environment.get_template("report.html.j2").render(
        report=report,
        candidates=_in_order(report, best),
        has_metric=any(f is not None and f.accuracy is not None for f in _evidence(report)),
        best=best.name if best is not None else "",
        colours=colours_of(report),
        grey=GREY,
        records={record.variant: served_record(report, record.variant) for record in report.served},
        waterfalls=_waterfalls(report, best),
        rankings=[ranking(report, name) for name, layers in report.sensitivity.items() if layers],
        latency_plot=latency_plot(report),
        p99_plot=trade_off_plot(report, "p99"),
        throughput_plot=trade_off_plot(report, "throughput") if points_of(report, "throughput") else None,
        sizes=sorted({rows for c in report.candidates if c.latency is not None for rows in c.latency.rows}),
        deciding=_deciding(report),
        promised=wilson(report.data.held_out, report.data.held_out)[0] if report.data.held_out else 0.0,
        replay_command=replay_command(report),
    )


def replay_command(report: Report) -> str:
    """Return the command line that makes the served variants again without a search.

    The run's own command with the written recipe instead of what chose its content; a pattern to fill in when the run
    was not started from the command line.
    """
    try:
        words = shlex.split(report.command)
    except ValueError:
        words = []
    if words[:2] != ["slipstream", "optimize"]:
        given = ["--name", report.name, "--recipe", RECIPE]
        data = " --calibration DATA.npz" if report.data.held_out else ""
        return f"slipstream optimize {shlex.quote(report.source.file)} --repository FOLDER {shlex.join(given)}{data}"
    kept: list[str] = []
    skips = False
    for word in words:
        if not skips and word.partition("=")[0] not in ("--recipe", "--version"):
            kept.append(word)
        skips = not skips and word in ("--recipe", "--version")
    return shlex.join([*kept, "--recipe", RECIPE])


def _in_order(report: Report, best: CandidateRecord | None) -> list[CandidateRecord]:
    """Return the candidates: the first choice, the others by verdict, the best known ones first."""
    verdicts = ("served", "proven", "baseline", "refused")

    def place(record: CandidateRecord) -> tuple[bool, int, bool, bool]:
        known = record.search_fidelity is None
        return record is not best, verdicts.index(record.verdict), record.fidelity is None, known

    return sorted(report.candidates, key=place)


def _evidence(report: Report) -> list[Fidelity | None]:
    return [f for c in report.candidates for f in (c.fidelity, c.search_fidelity)]


def _waterfalls(report: Report, best: CandidateRecord | None) -> list[Waterfall]:
    """Return the waterfall of the first choice, then those of the others that pass every gate."""
    others = [c for c in report.candidates if c is not best and c.verdict in ("served", "proven")]
    return [waterfall(report, c) for c in (best, *others) if c is not None and c.passes]


def _deciding(report: Report) -> tuple[int, ...]:
    """Return the batch sizes that every raced candidate was measured at."""
    tables = [c.latency for c in report.candidates if c.latency is not None]
    return deciding_rows(tables[0].rows) if tables else ()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return value


def _at(table: LatencyTable | None, rows: int, column: str = "p50_ms") -> float | None:
    """Look up a column of a latency table at a batch size; ``None`` where it was not measured."""
    if table is None or rows not in table.rows:
        return None
    return float(getattr(table, column)[table.rows.index(rows)])


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _db(value: float) -> str:
    return "identical" if value >= _IDENTICAL_DB else f"{value:.1f} dB"


def _share(value: float) -> str:
    """Write a share with enough digits to tell it from 1."""
    return f"{value:.6f}" if 0.9999 <= value < 1 else f"{value:.4f}"


def _change(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """List the operators whose count changed, e.g. ``Erf 6 -> 0``."""
    names = sorted(before.keys() | after.keys())
    changed = [f"{n} {before.get(n, 0)} \u2192 {after.get(n, 0)}" for n in names if before.get(n, 0) != after.get(n, 0)]
    return ", ".join(changed)
