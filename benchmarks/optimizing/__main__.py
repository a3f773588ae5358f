"""``python -m benchmarks.optimizing``: our optimizer against the original, onnxruntime's recipe and Olive."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.cpu import cpu_model
from benchmarks.optimizing.contest import Plan, compare
from benchmarks.optimizing.results import Comparison, Report
from benchmarks.optimizing.tables import render
from benchmarks.peers.asking import PEERS
from benchmarks.zoo.__main__ import CACHE
from benchmarks.zoo.models import ZOO, ensure
from benchmarks.zoo.odd import ODD, save
from deploy.quickstart.packages import QuickstartError
from optimizers.errors import OptimizerError
from optimizers.recipe import Recipe
from server.cores import usable_cores
from server.errors import SlipstreamError
from server.host import read_host

REPOSITORY = Path(".cache", "optimized")
PACKAGES = ("onnxruntime", "onnx", "onnxslim", "onnxscript", "numpy")
_BUDGET = {"--min-agreement": "min_agreement", "--max-accuracy-drop": "max_accuracy_drop"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print.

    Returns:
        Exit code: 1 when something is slower or broken beyond noise, or a model could not be compared; 2 when there is
        no model of that name.
    """
    options = _parser().parse_args(arguments)
    names = list(dict.fromkeys(options.names or (*ZOO, *ODD)))
    unknown = [name for name in names if name not in (*ZOO, *ODD)]
    unknown += [name for name in options.peers.split(",") if name and name not in PEERS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join((*ZOO, *ODD, *PEERS))}", file=sys.stderr)
        return 2
    header = describe(options)
    comparisons: list[Comparison] = []
    failed: list[str] = []
    for name in names:
        try:
            comparisons.append(_compare(name, options))
        except (QuickstartError, OptimizerError, SlipstreamError) as exc:
            failed.append(f"{name} could not be compared: {type(exc).__name__}: {exc}")
            _say(failed[-1])
        _write(options.json, Report(header, tuple(comparisons)))
    report = Report(header, tuple(comparisons))
    print("\n\n".join([render(report), *(f"- {text}" for text in failed)]))
    return 1 if failed or any(comparison.complaints for comparison in comparisons) else 0


def plan_of(name: str, options: argparse.Namespace) -> Plan:
    """Return how a model's contest is held: with its documented gates, all else as the optimizer's defaults."""
    budget = ZOO[name].budget if name in ZOO else ()
    gates = {_BUDGET[key]: float(value) for key, value in zip(budget[::2], budget[1::2], strict=True)}
    return Plan(
        repository=options.repository,
        peers=tuple(PEERS[peer] for peer in options.peers.split(",") if peer),
        recipe=msgspec.structs.replace(Recipe(), **gates),
        time_budget_s=options.time_budget,
        race_s=options.race_seconds,
    )


def describe(options: argparse.Namespace) -> dict[str, str]:
    """Return what a reader needs to judge the numbers."""
    host, load = read_host(), ", ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu_model()}, {', '.join(host.flags)}; {usable_cores()} usable cores, load before {load}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "method": f"time budget {options.time_budget:g} s per model; all contenders interleaved in one race of about "
        f"{options.race_seconds:g} s; medians and 95 % intervals; ratios are paired by round, above 1 ours is faster; "
        "ORT defaults take all cores and spin",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizing", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"of {', '.join((*ZOO, *ODD))} (default: all)")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="the zoo's (default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAMES", help="(default: %(default)s)")
    parser.add_argument("--time-budget", type=float, default=300.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--race-seconds", type=float, default=60.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything; rewritten after every model")
    return parser


def _compare(name: str, options: argparse.Namespace) -> Comparison:
    with tempfile.TemporaryDirectory() as work:
        if name in ZOO:
            folder, about = ensure(ZOO[name], options.cache, _say), ZOO[name].about
        else:
            folder, about = save(ODD[name], Path(work, "odd")), ODD[name].about
        return compare(name, about, folder, Path(work), plan_of(name, options), _say)


def _write(path: Path | None, report: Report) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
