"""The report of one optimizer run: ``report.json`` (everything) and ``report.html`` (the same for people, with plots).

The HTML is one file without any reference to the outside; its plots are SVG drawn by matplotlib, coloured by the page
so that they follow the reader's light or dark setting.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import markupsafe
import msgspec
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from optimizers.fidelity import describe
from optimizers.measurement import Comparison
from optimizers.search import Gate, ThreadChoice, mean_speedup
from server.artifact import Batching, Fidelity, LatencyTable, Source
from server.host import HostFacts

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
ORIGINAL = "original"

# Mostly Okabe and Ito's palette: told apart by colour-blind readers, on light and on dark pages.
_COLOURS = ("#7f7f7f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#d55e00", "#56b4e9", "#8c6bb1")
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_INK = "#123456"
"""Stands for the page's text colour while matplotlib draws; replaced by ``currentColor`` afterwards."""


class PassRecord(msgspec.Struct, frozen=True):
    """What one pass did.

    Attributes:
        status: ``applied``, ``unchanged`` or ``refused``.
        reason: Why it was refused, or the pass's own note.
        counts: What was fused, removed or converted, as the pass counts it.
        ops_before: Node count per operator of the pass's input; ``ops_after`` of its result.
        sqnr_db: Of the pass's result against the original on a few samples; ``None`` when it never ran.
    """

    name: str
    version: int
    effect: str
    status: str
    reason: str
    seconds: float
    counts: dict[str, int] = {}
    ops_before: dict[str, int] = {}
    ops_after: dict[str, int] = {}
    sqnr_db: float | None = None


class Speed(msgspec.Struct, frozen=True):
    """A ``Comparison`` with its verdict spelled out."""

    rows: int
    speedup: float
    low: float
    high: float
    pairs: int
    cpu_ratio: float
    verdict: str

    @classmethod
    def of(cls, comparison: Comparison) -> "Speed":
        """Spell a comparison out."""
        return cls(**msgspec.structs.asdict(comparison), verdict=comparison.verdict)


class CandidateRecord(msgspec.Struct, frozen=True):
    """One candidate: evidence, measurements, verdict.

    Attributes:
        threads: Threads of its session in the race; 0 is onnxruntime's default, all cores.
        verdict: ``served``, ``refused`` or ``baseline``.
        reason: Why, with numbers.
        latency: Measured in the race of all candidates.
        cpu_ms: CPU milliseconds of the process per run, for each batch size of ``latency``.
        against_original: Speed against the original with onnxruntime's defaults.
        against_exact: Speed against the best exact FP32 form with the same threads; decides for lossy candidates.
    """

    name: str
    precision: str
    provider: str
    threads: int
    verdict: str
    reason: str
    size_bytes: int = 0
    fidelity: Fidelity | None = None
    latency: LatencyTable | None = None
    cpu_ms: tuple[float, ...] = ()
    against_original: tuple[Speed, ...] = ()
    against_exact: tuple[Speed, ...] = ()


class ServedRecord(msgspec.Struct, frozen=True):
    """One session setting of a served variant in the second race, beside the original with its defaults."""

    variant: str
    threads: int
    chosen: bool
    latency: LatencyTable
    cpu_ms: tuple[float, ...]
    against_original: tuple[Speed, ...]


class DataRecord(msgspec.Struct, frozen=True):
    """The samples that the evidence rests on."""

    origin: str
    samples: int
    calibration: int
    held_out: int
    labels: bool
    sha256: str


class EngineRecord(msgspec.Struct, frozen=True):
    """The outcome of a TensorRT engine build."""

    status: str
    reason: str
    facts: dict[str, str] = {}


class Report(msgspec.Struct, frozen=True):
    """Everything that one run found out.

    Attributes:
        chosen: The preferred variant.
        headline: One sentence with the result.
        command: The command line that replays the run.
        written: UTC time in ISO 8601.
    """

    name: str
    version: str
    headline: str
    chosen: str
    source: Source
    gate: Gate
    recipe: dict[str, object]
    recipe_sha256: str
    data: DataRecord
    batching: Batching
    passes: tuple[PassRecord, ...]
    candidates: tuple[CandidateRecord, ...]
    served: tuple[ServedRecord, ...]
    threads: tuple[ThreadChoice, ...]
    engines: tuple[EngineRecord, ...]
    host: HostFacts
    command: str
    seconds: float
    written: str


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into a folder."""
    (folder / REPORT_JSON).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
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
    environment.filters.update(mb=_mb, ms=_ms, fidelity_text=describe, change=_change, speed=_speed)
    return environment.get_template("report.html.j2").render(
        report=report,
        colours=_colours(report),
        latency_plot=_plot(lambda axes: _draw_latency(axes, report), "Median latency by batch size, all candidates"),
        fidelity_plot=_plot(lambda axes: _draw_fidelity(axes, report), "Agreement against speed-up, with the gates"),
    )


def _colours(report: Report) -> dict[str, str]:
    return {c.name: _COLOURS[i % len(_COLOURS)] for i, c in enumerate(report.candidates)}


def _plot(draw: Callable[[Axes], None], title: str) -> markupsafe.Markup:
    """Draw one plot as inline SVG whose ink is the page's text colour. The only markup that is not escaped."""
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    draw(axes)
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for name, spine in axes.spines.items():
        spine.set(color=_INK, linewidth=0.6, visible=name in ("left", "bottom"))
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # ids that differ between the plots of a page, but not between runs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    svg = buffer.getvalue()
    svg = _METADATA.sub("", svg[svg.index("<svg") :]).replace(_INK, "currentColor")
    return markupsafe.Markup(svg)  # noqa: S704  (matplotlib's own output; names in it are escaped by its SVG writer)


def _draw_latency(axes: Axes, report: Report) -> None:
    colours = _colours(report)
    for record in report.candidates:
        table = record.latency
        if table is None:
            continue
        style = "--" if record.name == ORIGINAL else "-"
        axes.plot(table.rows, table.p50_ms, style, color=colours[record.name], marker="o", markersize=3.5, lw=1.6)
        axes.fill_between(table.rows, table.low_ms, table.high_ms, color=colours[record.name], alpha=0.18, linewidth=0)
    measured = [c.latency.rows for c in report.candidates if c.latency]
    rows = measured[0] if measured else (1,)
    axes.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="median latency of a batch (ms)")
    axes.set_xticks(rows, [str(r) for r in rows])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_fidelity(axes: Axes, report: Report) -> None:
    """Draw agreement against speed-up; the shaded corner is where a lossy candidate is served."""
    points = [c for c in report.candidates if c.fidelity and c.against_exact]
    colours = _colours(report)
    low = min([report.gate.min_agreement, *(c.fidelity.agreement_low for c in points if c.fidelity)])
    floor = max(low - 0.1 * (1 - low) - 0.002, 0)
    speeds = [_mean(c.against_exact) for c in points] or [1.0]
    left, right = min(0.9, *speeds) * 0.9, max(1.3, *speeds) * 1.3
    axes.set(xlim=(left, right), ylim=(floor, 1 + 0.06 * (1 - floor)))
    axes.fill_between([1, right], report.gate.min_agreement, 1 + 0.06 * (1 - floor), color="#009e73", alpha=0.10, lw=0)
    axes.axhline(report.gate.min_agreement, color=_INK, lw=1, ls=":")
    axes.axvline(1, color=_INK, lw=1, ls=":")
    axes.set(
        xlabel="speed-up over exact FP32, same threads", ylabel="agreement with the original (bar: 95 % lower bound)"
    )
    boxes: list[tuple[float, float, float, float]] = []
    for record in points:
        _draw_point(axes, record, colours[record.name], boxes)


def _draw_point(
    axes: Axes, record: CandidateRecord, colour: str, boxes: list[tuple[float, float, float, float]]
) -> None:
    """Draw one candidate; its name goes to the first place around the point that no other name has taken."""
    evidence, speed = record.fidelity, _mean(record.against_exact)
    if evidence is None:
        return
    axes.plot([speed, speed], [evidence.agreement_low, evidence.agreement], color=colour, lw=1.4, alpha=0.7)
    filled = colour if record.verdict == "served" else "none"
    axes.plot([speed], [evidence.agreement], "o", ms=8, mfc=filled, mec=colour, mew=2)
    x, y = axes.transData.transform((speed, evidence.agreement)) * 72 / axes.figure.dpi  # in points, as offsets are
    width, height = 5.2 * len(record.name), 11
    for rise in (-4, 8, -16, 20, -28, 32):
        box = (x, y + rise, x + width, y + rise + height)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            break
    boxes.append(box)
    point = (speed, evidence.agreement)
    axes.annotate(record.name, point, (9, rise), textcoords="offset points", color=_INK, fontsize=9)


def _mean(speeds: Sequence[Speed]) -> float:
    return mean_speedup([Comparison(s.rows, s.speedup, s.low, s.high, s.pairs, s.cpu_ratio) for s in speeds])


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _speed(speed: Speed) -> str:
    return f"{speed.speedup:.2f}x ({speed.low:.2f}-{speed.high:.2f})"


def _change(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """List the operators whose count changed, e.g. ``Erf 6 -> 0``."""
    names = sorted(before.keys() | after.keys())
    changed = [f"{n} {before.get(n, 0)} → {after.get(n, 0)}" for n in names if before.get(n, 0) != after.get(n, 0)]
    return ", ".join(changed)
