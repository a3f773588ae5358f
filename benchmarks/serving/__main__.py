"""``python -m benchmarks.serving``: this server, a bare HTTP server and other inference servers on the same models.

Each server is started alone, measured, and stopped; the order is reversed in every other round. The machine must do
nothing else. What is not installed is left out: python -m benchmarks.serving.install
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from benchmarks.cpu import cpu_model
from benchmarks.serving.ablations import ABLATIONS
from benchmarks.serving.comparing import Run
from benchmarks.serving.install import PEERS
from benchmarks.serving.material import MODELS, open_materials
from benchmarks.serving.plots import save_plots
from benchmarks.serving.results import Comparison
from benchmarks.serving.systems import SYSTEMS
from benchmarks.serving.tables import markdown
from deploy.quickstart.packages import QuickstartError
from server.cores import usable_cores

OUT = Path(__file__).resolve().parents[1] / "results" / "serving"
PACKAGES = ("onnxruntime", "numpy", "uvicorn", "uvloop", "httptools", "fastapi", "pydantic")
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.4
Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return 1 if a bar is missed or an answer is wrong."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = QUICK_ROUNDS, QUICK_SECONDS
    names = options.only or [system.name for system in SYSTEMS]
    unknown = sorted(set(names) - {system.name for system in SYSTEMS})
    if unknown:
        sys.stderr.write(f"Error: no system {', '.join(unknown)}; there are {', '.join(s.name for s in SYSTEMS)}\n")
        return 2
    began_s = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - began_s), 60)
        print(f"{minutes:3}:{seconds:02} {text}", file=sys.stderr, flush=True)

    run = Run([system for system in SYSTEMS if system.name in names], options.rounds, options.seconds, say)
    header = describe(options.rounds, options.seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="models") as scratch:
            materials = list(open_materials(options.models, Path(scratch)))
            run.closed(materials)
            if not options.no_open:
                run.open(materials)
            if not options.no_ablations:
                run.ablations(materials, ABLATIONS)
    except QuickstartError as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        say("stopped; what was measured is written")
    else:
        say("done")
    comparison = run.comparison(header)
    save(comparison, options.out)
    print(markdown(comparison))
    wrong = sum(summary.failed + summary.wrong for summary in comparison.summaries)
    return 0 if wrong == 0 and all(bar.kept for bar in comparison.bars) else 1


def save(comparison: Comparison, folder: Path) -> None:
    """Write ``results.json``, ``results.md`` and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(comparison)))
    plots = save_plots(comparison, folder)
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    (folder / "results.md").write_text(f"{markdown(comparison)}\n## Plots\n\n{pictures}\n", encoding="utf-8")


def describe(rounds: int, seconds: float) -> dict[str, str]:
    """Return what a reader needs to judge the figures."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    peers = ", ".join(package for packages in PEERS.values() for package in packages.pinned)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu_model()}, {usable_cores()} usable cores, load before {load}",
        "versions": f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
        "peers": peers,
        "method": f"{rounds} rounds; closed loops of {seconds:g} s, twice that for large models; each server alone; "
        "the load generator on the same cores",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help=f"of {', '.join(s.name for s in SYSTEMS)}")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="of closed loops (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.25, help="of a closed loop (default: %(default)s)")
    parser.add_argument("--no-open", action="store_true", help="leave the open loop out")
    parser.add_argument("--no-ablations", action="store_true", help="leave the ablations out")
    parser.add_argument("--quick", action="store_true", help="everything once and briefly: shows that it works")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(default: benchmarks/results/serving)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
