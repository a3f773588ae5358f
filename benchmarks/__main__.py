"""``make bench``: raw ``session.run``, Slipstream and a plain FastAPI handler on the same models, interleaved."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from benchmarks.cpu import cpu_model, idle_cpu_s
from benchmarks.raw import RawSession
from benchmarks.servers import RunningServer, ServerFailed, offer, plain_fastapi, slipstream
from benchmarks.summary import Case, Measurement, Summary, Target, summarize, table, targets
from benchmarks.workloads import (
    Workload,
    binary_request,
    check_answers,
    json_request,
    open_workload,
    plain_request,
    read_rows,
    save_tiny,
)
from server.cores import usable_cores
from server.errors import SlipstreamError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINILM = "minilm-l6"
WORKLOADS = ("tiny", MINILM)
CONNECTIONS = (1, 16)
IDLE_S = 3.0
PACKAGES = ("onnxruntime", "numpy", "fastapi", "pydantic", "uvicorn", "uvloop", "httptools")

Measure = Callable[[float], Measurement]


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` writes."""

    header: dict[str, str]
    summaries: list[Summary]
    targets: list[Target]
    rounds: dict[str, list[Measurement]]


def main() -> int:
    """Measure and print; return 1 if a target is missed or an answer is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of every case in every round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--only", choices=WORKLOADS, help="one of the models")
    parser.add_argument("--json", action="store_true", help="also write everything to benchmarks/results")
    options = parser.parse_args()
    try:
        report = measure(options.only, options.rounds, options.seconds)
    except (ServerFailed, SlipstreamError, FileNotFoundError) as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    print(f"\n{render(report)}")
    if options.json:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{report.header['date'].replace(':', '')}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
        print(f"\n{path}")
    bad = sum(s.failed + s.wrong for s in report.summaries)
    return 0 if bad == 0 and all(target.kept for target in report.targets) else 1


def measure(only: str | None, rounds: int, seconds: float) -> Report:
    """Run every case once per round, the order reversed in every other round."""
    cases: dict[Case, Measure] = {}
    idle_cpu: dict[str, float] = {}
    header = describe(rounds, seconds)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for workload in open_workloads(only, Path(folder)):
            header[workload.name] = (
                f"variant {workload.variant}, {workload.lanes} lanes of {workload.options.intra_op_threads} threads"
            )
            ours = stack.enter_context(slipstream(workload.repository))
            plain = stack.enter_context(plain_fastapi(workload))
            cases.update(cases_of(workload, ours, plain, seconds))
            idle_cpu[workload.name] = idle_share(ours, json_request(workload, workload.rows[0]))
        measured: dict[Case, list[Measurement]] = {case: [] for case in cases}
        for number in range(rounds):
            for case in list(cases) if number % 2 == 0 else list(reversed(cases)):
                print(f"round {number + 1} of {rounds}: {case.workload}, {case.label}", file=sys.stderr)
                measured[case].append(cases[case](seconds))
    summaries = [summarize(case, found) for case, found in measured.items()]
    raw_rounds = {f"{case.workload}: {case.label}": found for case, found in measured.items()}
    return Report(header, summaries, targets(summaries, idle_cpu), raw_rounds)


def open_workloads(only: str | None, scratch: Path) -> Iterator[Workload]:
    """Yield the chosen workloads.

    Raises:
        FileNotFoundError: If the quickstart has not been run.
    """
    if only in (None, "tiny"):
        yield save_tiny(scratch)
    if only in (None, MINILM):
        samples = ROOT / ".cache" / "quickstart" / MINILM / "data.npz"
        if not samples.is_file() or not (ROOT / "models" / MINILM).is_dir():
            raise FileNotFoundError(f"{MINILM} is not there; run: python -m deploy.quickstart --no-serve")
        yield open_workload(ROOT / "models", MINILM, read_rows(samples))


def cases_of(workload: Workload, ours: RunningServer, plain: RunningServer, seconds: float) -> dict[Case, Measure]:
    """Return the cases of a workload with what measures each."""
    raw = RawSession(workload)
    best = raw.best_rows(workload.lanes, seconds / 4)
    kinds = {
        ("slipstream", "binary"): (ours, [binary_request(workload, row) for row in workload.rows]),
        ("slipstream", "json"): (ours, [json_request(workload, row) for row in workload.rows]),
        ("plain", "json"): (plain, [plain_request(row) for row in workload.rows]),
    }
    # What is compared lies side by side: one at a time, then as many as there are lanes.
    runs = {1: [(1, 1)], 16: [(1, workload.lanes), (best, workload.lanes)]}
    cases: dict[Case, Measure] = {}
    for connections in CONNECTIONS:
        for rows, lanes in runs[connections]:
            cases[Case(workload.name, "raw", "arrays", lanes, rows)] = raw_measure(raw, rows, lanes)
        for (system, kind), (server, requests) in kinds.items():
            case = Case(workload.name, system, kind, connections)
            cases[case] = served_measure(workload, server, requests, connections)
    return cases


def raw_measure(raw: RawSession, rows: int, lanes: int) -> Measure:
    """Return what measures the raw session."""

    def run(seconds: float) -> Measurement:
        times_ms, cpu_s, span_s = raw.run(rows, lanes, seconds)
        return Measurement(len(times_ms), span_s, cpu_s, 0.0, times_ms)

    return run


def served_measure(workload: Workload, server: RunningServer, requests: list[bytes], connections: int) -> Measure:
    """Return what measures a server."""

    def run(seconds: float) -> Measurement:
        outcome = offer(server, requests, connections, seconds, warm_up_s=min(0.5, seconds / 4))
        return Measurement(
            len(outcome.latencies_ms),
            outcome.seconds,
            outcome.server_cpu_s,
            outcome.client_cpu_s,
            outcome.latencies_ms,
            check_answers(outcome.answers, workload.expected),
            outcome.variants,
        )

    return run


def idle_share(server: RunningServer, request: bytes) -> float:
    """Return the share of one core that a server uses while nothing is asked of it, after some work."""
    offer(server, [request], 4, 0.5, 0.0)
    time.sleep(0.5)
    before_s = idle_cpu_s(server.pid)
    time.sleep(IDLE_S)
    return (idle_cpu_s(server.pid) - before_s) / IDLE_S


def describe(rounds: int, seconds: float) -> dict[str, str]:
    """Return what a reader needs to judge the numbers."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu_model()}, {usable_cores()} usable cores, load before {load}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "method": f"{rounds} rounds of {seconds:g} s per case, interleaved; client on the same cores",
    }


def render(report: Report) -> str:
    """Return the report for people."""
    parts = [f"{name:<10} {value}" for name, value in report.header.items()]
    parts += ["", table(report.summaries), ""]
    for target in report.targets:
        verdict = "kept  " if target.kept else "MISSED"
        parts.append(f"{verdict} {target.text}: {target.seen:.3f} (at most {target.allowed:g})")
    for s in report.summaries:
        if s.case.system != "raw":
            answered = ", ".join(f"{name or 'no variant'} {count}" for name, count in s.variants.items())
            parts.append(
                f"answers    {s.case.workload}, {s.case.label}: {s.failed} failed, {s.wrong} of another row, "
                f"largest relative error {s.worst_error:.2g}; {answered}"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
