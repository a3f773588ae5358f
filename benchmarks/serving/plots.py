"""The plots of a comparison: SVG files whose ink follows the reader's light or dark setting."""

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.serving.results import Comparison, Rate
from benchmarks.serving.systems import SYSTEMS
from benchmarks.serving.tables import cheapest
from benchmarks.summary import Summary

# Mostly Okabe and Ito's palette: told apart by colour-blind readers, on light and on dark pages.
_COLOURS = ("#d55e00", "#e69f00", "#8a8f96", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8c6bb1", "#a6761d")
_MARKERS = "oDxs^vP<>"
COLOUR = dict(zip((system.name for system in SYSTEMS), _COLOURS, strict=True))
MARKER = dict(zip((system.name for system in SYSTEMS), _MARKERS, strict=True))
_INK = "#123456"
"""Stands for the text colour while matplotlib draws."""

_INK_STYLE = (
    "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}"
    "text{font-family:system-ui,sans-serif}</style>"
)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
CLIENTS = 16


def save_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw everything into a folder; return the files."""
    paths, summaries = [], comparison.summaries
    for model in dict.fromkeys(s.case.workload for s in summaries):
        rates = [rate for rate in comparison.rates if rate.model == model and not rate.skipped]
        for burst in sorted({rate.burst for rate in rates}):
            chosen = [rate for rate in rates if rate.burst == burst]
            arrivals, name = ("Poisson arrivals", "poisson") if burst == 1 else (f"bursts of {burst}", "bursts")
            title = f"{model}, {arrivals}"
            paths.append(_save(folder / f"{model}-p99-{name}.svg", title, partial(p99, rates=chosen)))
            paths.append(_save(folder / f"{model}-goodput-{name}.svg", title, partial(goodput, rates=chosen)))
        title = f"{model}, {CLIENTS} clients, each server's cheapest messages"
        draw = partial(cpu_bars, summaries=summaries, model=model)
        paths.append(_save(folder / f"{model}-cpu.svg", title, draw))
    return paths


def p99(axes: Axes, rates: Sequence[Rate]) -> None:
    """Draw p99 over the rate, of the answers that came."""
    _lines(axes, rates, lambda rate: rate.p99_ms)
    axes.set(yscale="log", ylabel="p99 since due (ms)")
    axes.axhline(rates[0].slo_ms, color=_INK, lw=1, ls=":")


def goodput(axes: Axes, rates: Sequence[Rate]) -> None:
    """Draw answers in time over the rate, and what would be all of them."""
    _lines(axes, rates, lambda rate: rate.goodput)
    ends = [0.0, max(rate.rate for rate in rates)]
    axes.plot(ends, ends, color=_INK, lw=1, ls=":")
    axes.set(ylabel=f"answers within {rates[0].slo_ms:g} ms, per second", ylim=(0, None))


def cpu_bars(axes: Axes, summaries: Sequence[Summary], model: str) -> None:
    """Draw the CPU time of a request of every system, the cheapest at the top."""
    found = [row for system in COLOUR if (row := cheapest(summaries, model, system, CLIENTS)) is not None]
    rows = sorted(found, key=lambda s: -s.cpu_ms)
    names = [f"{s.case.system} ({s.case.kind})" for s in rows]
    axes.barh(names, [s.cpu_ms for s in rows], color=[COLOUR[s.case.system] for s in rows])
    for place, s in enumerate(rows):
        axes.text(s.cpu_ms, place, f" {s.cpu_ms:.3g}", color=_INK, va="center", fontsize=9)
    axes.set(xscale="log", xlabel="server CPU per request (ms), less is better")
    axes.margins(x=0.15)


def _lines(axes: Axes, rates: Sequence[Rate], value: Callable[[Rate], float | None]) -> None:
    for name in dict.fromkeys(rate.system for rate in rates):
        points = [(rate.rate, y) for rate in rates if rate.system == name and (y := value(rate)) is not None]
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker=MARKER[name], color=COLOUR[name], markersize=4, lw=1.6, label=name)
    axes.set_xlabel("requests per second that are due")
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)


def _save(path: Path, title: str, draw: Callable[[Axes], None]) -> Path:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        draw(axes)
        axes.set_title(title, color=_INK, fontsize=10)
        axes.tick_params(colors=_INK, which="both", labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.patch.set_alpha(0)
        for side, spine in axes.spines.items():
            spine.set(color=_INK, linewidth=0.6, visible=side in ("left", "bottom"))
        axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    svg = _METADATA.sub(_INK_STYLE, buffer.getvalue()).replace(_INK, "currentColor")
    path.write_text(svg, encoding="utf-8")
    return path
