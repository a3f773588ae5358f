"""The plot of a soak: resident memory over requests."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.soak.trend import Trend


def save_plot(path: Path, samples: Sequence[tuple[float, float]], warm_up: int, trend: Trend) -> None:
    """Draw the memory of the server as SVG.

    Args:
        path: The file.
        samples: Requests so far, and resident bytes.
        warm_up: Requests that are not judged.
        trend: Of the rest, in bytes per request.
    """
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    requests, megabytes = [x / 1e3 for x, _ in samples], [y / 1e6 for _, y in samples]
    axes.axvspan(0, warm_up / 1e3, color="#7f7f7f", alpha=0.15, linewidth=0)
    axes.plot(requests, megabytes, color="#0072b2", lw=1.2)
    axes.set(xlabel="thousand requests (grey: warm-up)", ylabel="resident memory (MB)", ylim=(0, max(megabytes) * 1.15))
    axes.set_title(f"{trend.slope:+.2f} bytes per request [{trend.low:+.2f}, {trend.high:+.2f}]", fontsize=10)
    axes.grid(alpha=0.2, linewidth=0.6)
    with rc_context({"svg.hashsalt": "soak", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
