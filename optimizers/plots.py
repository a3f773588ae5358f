"""The plots of a report: SVG drawn by matplotlib.

The page colours them, so that they follow the reader's light or dark setting. Names stay text and are never read as
formulas.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import markupsafe
import msgspec
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from optimizers.records import ORIGINAL, CandidateRecord, Report
from optimizers.search import Gate, unfaithful

Against = Literal["p99", "throughput"]

GREY = "#7f7f7f"
# Mostly Okabe and Ito's palette: told apart by colour-blind readers, on light and on dark pages.
_COLOURS = (
    "#8a8f96", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#d55e00", "#56b4e9", "#8c6bb1", "#a6761d", "#5ab45a",
    "#c44e8a", "#3f8f8f",
)  # fmt: skip
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_GROUP_ID = re.compile(r'<g id="[^"]*">')
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_INK = "#123456"
"""Stands for the page's text colour while matplotlib draws; replaced by ``currentColor`` afterwards."""

_SMALLEST, _LARGEST = 36.0, 220.0
"""Areas of markers in square points."""

_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


class Point(msgspec.Struct, frozen=True):
    """One candidate of a trade-off plot.

    Attributes:
        name: Its name.
        x: What it is compared by: p99 in milliseconds, or rows per second.
        agreement: With the original, 0 to 1.
        low: Lower end of its 95 % interval.
        kind: ``pareto``, ``dominated``, ``unfaithful`` or ``reference``.
        memory_bytes: That its session adds; ``None`` when it was not measured.
    """

    name: str
    x: float
    agreement: float
    low: float
    kind: str
    memory_bytes: int | None = None


def colours_of(report: Report) -> dict[str, str]:
    """Return a colour for each candidate; those that are not drawn share one grey."""
    drawn = [c.name for c in report.candidates if c.latency is not None]
    drawn_colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(drawn)}
    return {c.name: drawn_colours.get(c.name, GREY) for c in report.candidates}


def latency_plot(report: Report) -> markupsafe.Markup:
    """Draw the median latency of each measured candidate by batch size, with intervals and knees."""
    return _plot(lambda axes: _draw_latency(axes, report), "Median latency by batch size")


def trade_off_plot(report: Report, against: Against) -> markupsafe.Markup:
    """Draw agreement against speed, with the Pareto set and the gate."""
    return _plot(lambda axes: _draw_trade_off(axes, report, against), f"Agreement against {against}")


def points_of(report: Report, against: Against) -> tuple[Point, ...]:
    """Return the candidates of a trade-off plot.

    Throughput is known only of those that were raced at every batch size; p99 of one row, of all that were raced.
    """
    found = (_point(record, against, report.gate) for record in report.candidates)
    return tuple(point for point in found if point is not None)


def _point(record: CandidateRecord, against: Against, gate: Gate) -> Point | None:
    standing, evidence, table = record.standing, record.fidelity, record.latency
    if against == "throughput":
        x = standing.rows_per_s if standing is not None else None
    else:
        x = standing.p99_ms if standing is not None else table.p99_ms[0] if table is not None else None
    if x is None or x <= 0 or (evidence is None and record.verdict not in ("baseline", "served")):
        return None
    agreement, low = (evidence.agreement, evidence.agreement_low) if evidence is not None else (1.0, 1.0)
    memory = standing.memory_bytes if standing is not None else None
    return Point(record.name, x, agreement, low, _kind(record, gate), memory)


def _kind(record: CandidateRecord, gate: Gate) -> str:
    if record.pareto:
        return "pareto"
    if record.name == ORIGINAL:
        return "reference"
    return "unfaithful" if record.fidelity is not None and unfaithful(record.fidelity, gate) else "dominated"


def _plot(draw: Callable[[Axes], None], title: str) -> markupsafe.Markup:
    """Draw one plot as inline SVG whose ink is the page's text colour. The only markup that is not escaped."""
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    buffer = io.StringIO()
    # Text stays text. Ids must differ between the plots of a page, but not between runs.
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's browser has it
        draw(axes)
        _style(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    svg = buffer.getvalue()
    svg = _METADATA.sub("", svg[svg.index("<svg") :]).replace(_INK, "currentColor")
    svg = _FONT.sub("", _GROUP_ID.sub("<g>", svg))
    return markupsafe.Markup(svg)  # noqa: S704  (matplotlib's own output; names in it are escaped by its SVG writer)


def _style(axes: Axes) -> None:
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for name, spine in axes.spines.items():
        spine.set(color=_INK, linewidth=0.6, visible=name in ("left", "bottom"))
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)


def _draw_latency(axes: Axes, report: Report) -> None:
    colours = colours_of(report)
    sizes: set[int] = set()
    for record in report.candidates:
        table, colour = record.latency, colours[record.name]
        if table is None:
            continue
        sizes.update(table.rows)
        style = "--" if record.name == ORIGINAL else "-"
        axes.plot(table.rows, table.p50_ms, style, color=colour, marker="o", markersize=3.5, lw=1.6)
        axes.fill_between(table.rows, table.low_ms, table.high_ms, color=colour, alpha=0.18, linewidth=0)
        knee = record.standing.best_rows if record.standing is not None else None
        if knee in table.rows:
            knee_ms = table.p50_ms[table.rows.index(knee)]
            axes.plot([knee], [knee_ms], "o", ms=9, mfc="none", mec=colour, mew=1.6)
    axes.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="median latency of a batch (ms)")
    rows = sorted(sizes) or [1]
    axes.set_xticks(rows, [str(r) for r in rows])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(_sparse)


def _draw_trade_off(axes: Axes, report: Report, against: Against) -> None:
    points = points_of(report, against)
    _scale_agreement(axes, points, report.gate.min_agreement)
    xs = [point.x for point in points] or [1.0]
    axes.set(xscale="log", xlim=(min(xs) / 1.3, max(xs) * 1.9))  # room for names on the right
    axes.set_xlabel("p99 of one row (ms), less is better" if against == "p99" else "rows per second, more is better")
    axes.set_ylabel("agreement with the original (bar: 95 % interval)")
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_formatter(_sparse)
    axes.axhline(1 - report.gate.min_agreement, color=_INK, lw=1, ls=":")
    sizes, colours = _areas(points), colours_of(report)
    boxes = [_marker_box(axes, point) for point in points]
    for point in points:
        _draw_point(axes, point, colours[point.name], sizes[point.name])
    for point in points:
        _write_name(axes, point, boxes)


def _scale_agreement(axes: Axes, points: Sequence[Point], gate: float) -> None:
    """Scale by the share of decisions that differ: 0.99 and 0.999 are as far apart as 0.9 and 0.99."""
    misses = [1 - value for point in points for value in (point.agreement, point.low)]
    seen = [miss for miss in (*misses, 1 - gate) if miss > 1e-9]
    linear = 10.0 ** _floor_decade(min(seen, default=1e-3))
    most = min(max([*seen, linear * 10]) * 1.6, 1.05)
    axes.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axes.set_ylim(most, -0.35 * linear)
    ticks = [0.0] + [t for t in (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0) if linear <= t <= most]
    axes.set_yticks(ticks, [f"{1 - tick:g}" for tick in ticks])
    axes.yaxis.minorticks_off()


def _floor_decade(value: float) -> int:
    return max(int(f"{value:e}".partition("e")[2]), -4)


def _areas(points: Sequence[Point]) -> Mapping[str, float]:
    """Return the area of each marker, proportional to memory; all alike where memory was not measured."""
    most = max((point.memory_bytes or 0 for point in points), default=0)
    if most <= 0:
        return {point.name: 60.0 for point in points}
    return {p.name: max(_SMALLEST, _LARGEST * (p.memory_bytes or 0) / most) for p in points}


def _draw_point(axes: Axes, point: Point, colour: str, area: float) -> None:
    miss, high = 1 - point.agreement, 1 - point.low
    axes.plot([point.x, point.x], [miss, high], color=colour, lw=1.4, alpha=0.7)
    if point.kind == "unfaithful":
        axes.scatter([point.x], [miss], s=60, marker="x", color=colour, linewidths=2)
        return
    marker = "D" if point.kind == "reference" else "o"
    filled = colour if point.kind == "pareto" else "none"
    axes.scatter([point.x], [miss], s=area, marker=marker, facecolors=filled, edgecolors=colour, linewidths=2)


def _write_name(axes: Axes, point: Point, boxes: list[_Box]) -> None:
    """Write a name at the first place around its point that no other name and no marker has taken."""
    miss = 1 - point.agreement
    x, y = _in_points(axes, point)
    width, height = 5.4 * len(point.name) + 4, 11
    for rise, is_left in ((rise, is_left) for rise in (-4, 9, -17, 21, -29, -41) for is_left in (False, True)):
        start = x - 9 - width if is_left else x + 9
        box = (start, y + rise, start + width, y + rise + height)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            break
    boxes.append(box)
    axes.annotate(
        point.name,
        (point.x, miss),
        (-9 if is_left else 9, rise),
        textcoords="offset points",
        ha="right" if is_left else "left",
        color=_INK,
        fontsize=9,
        parse_math=False,
    )


def _in_points(axes: Axes, point: Point) -> tuple[float, float]:
    """Return where a point lies on the page, in the unit of text offsets."""
    x, y = axes.transData.transform((point.x, 1 - point.agreement)) * 72 / axes.figure.dpi
    return float(x), float(y)


def _marker_box(axes: Axes, point: Point) -> _Box:
    x, y = _in_points(axes, point)
    return (x - 7, y - 7, x + 7, y + 7)


def _plain(value: float, _position: float | None = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _sparse(value: float, _position: float | None = None) -> str:
    """Label 2 and 5 of each decade."""
    return _plain(value) if f"{value:.0e}"[0] in "25" else ""
