"""The plot of a load test: p99 and goodput against the rate of a step, or over time."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from loadtests.report import Line, Result
from loadtests.shapes import WARM_UP

# Okabe and Ito's palette: told apart by colour-blind readers.
_GOOD, _LATE, _REFUSED, _FAILED, _ASKED = "#009e73", "#0072b2", "#e69f00", "#d55e00", "#7f7f7f"


def draw(result: Result, *, by_rate: bool, deadline_ms: float, path: Path) -> None:
    """Write an SVG.

    Args:
        result: What to show.
        by_rate: Phases by their rates, as for steps; by time otherwise.
        deadline_ms: By when an answer is in time; infinite without such.
        path: The file.
    """
    lines = [line for line in result.phases if line.name != WARM_UP] if by_rate else result.timeline
    across = [line.tally.asked / line.seconds if by_rate else float(line.name) for line in lines]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "loadtest", "font.size": 9}):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        _rates(upper, across, lines, by_rate=by_rate)
        _latencies(lower, across, lines, deadline_ms)
        upper.set_title(result.title, loc="left", fontsize=9)
        lower.set_xlabel("requests asked per second" if by_rate else "seconds since the start")
        figure.set_canvas(FigureCanvasSVG(figure))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _rates(axes: Axes, across: Sequence[float], lines: Sequence[Line], *, by_rate: bool) -> None:
    mark = "o" if by_rate else ""
    axes.plot(across, [line.tally.asked / line.seconds for line in lines], color=_ASKED, linestyle=":", label="asked")
    series = {
        "good (goodput)": (_GOOD, [line.tally.good for line in lines]),
        "late": (_LATE, [line.tally.answered - line.tally.good for line in lines]),
        "refused": (_REFUSED, [line.tally.refused for line in lines]),
        "failed or unanswered": (_FAILED, [line.tally.failed for line in lines]),
    }
    for name, (colour, counts) in series.items():
        if any(counts):
            rates = [count / line.seconds for count, line in zip(counts, lines, strict=True)]
            axes.plot(across, rates, color=colour, marker=mark, markersize=3, label=name)
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _latencies(axes: Axes, across: Sequence[float], lines: Sequence[Line], deadline_ms: float) -> None:
    for share, style in ((0.5, "--"), (0.99, "-")):
        times = [line.tally.percentile_ms(share) for line in lines]
        axes.plot(across, times, color=_LATE, linestyle=style, marker=".", markersize=4, label=f"p{share * 100:g}")
    if math.isfinite(deadline_ms):
        axes.axhline(deadline_ms, color=_FAILED, linewidth=0.8, label=f"in time: {deadline_ms:g} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("latency of answers, ms")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25, which="both")
