"""``python -m benchmarks.serving.windows``: which window and how many instances suit each server, by a short sweep.

The settings in ``benchmarks.serving.systems`` are chosen from its output.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec

from benchmarks.servers import ServerFailed, offer
from benchmarks.serving.loads import dialects_of
from benchmarks.serving.material import MODELS, Material, open_materials
from benchmarks.serving.systems import SYSTEMS, System, Tuning, started, workload_of
from benchmarks.summary import percentile
from server.cores import usable_cores

WINDOWS_MS = (0.0, 1.0, 2.0, 5.0)
CLIENTS = (1, 16, 64)
TUNED = tuple(system for system in SYSTEMS if system.peer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every setting once, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.windows", description=__doc__)
    names = [system.name for system in TUNED]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SYSTEM", help=f"of {names}")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["tiny", "cnn", "minilm"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of every load (default: %(default)s)")
    parser.add_argument("--windows", nargs="+", type=float, default=WINDOWS_MS, metavar="MS")
    options = parser.parse_args(arguments)
    instances = sorted({1, usable_cores()})
    print("| model | system | window ms | instances | clients: requests/s, p50 ms, CPU ms |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="models") as scratch:
        for material in open_materials(options.models, Path(scratch)):
            for system, window_ms, count in product(TUNED, options.windows, instances):
                if system.name in options.only:
                    tuned = msgspec.structs.replace(system, tuning={"": Tuning(window_ms, count)})
                    figures = measure(tuned, material, options.seconds)
                    print(f"| {material.name} | {system.name} | {window_ms:g} | {count} | {figures} |", flush=True)
    return 0


def measure(system: System, material: Material, seconds: float) -> str:
    """Return what one setting reaches, or why it does not."""
    workload, dialect = workload_of(system, material), dialects_of(system, material)[-1]
    requests = [dialect.request(workload, row) for row in workload.rows]
    cells = []
    try:
        with started(system, material) as server:
            for clients in CLIENTS:
                found = offer(server, requests, clients, seconds * material.closed_scale, seconds / 4)
                count = len(found.latencies_ms)
                p50_ms = percentile(found.latencies_ms, 0.5)
                cpu_ms = found.server_cpu_s * 1e3 / count
                cells.append(f"{clients}: {count / found.seconds:.0f}, {p50_ms:.1f}, {cpu_ms:.2f}")
    except ServerFailed as exc:
        return str(exc).replace("\n", " ")[-200:]
    return "; ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
