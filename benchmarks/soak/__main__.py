"""``python -m benchmarks.soak``: a million requests, 5 % of whose clients leave, and what the server keeps of them.

Requests of every kind go to the real server in a closed loop: JSON and binary, single rows and ones that are parted,
deadlines that expire, refusals, priorities, 100,000 names of clients, errors of every sort, large answers. A share of
the clients leaves at a random point: before its request is sent, before the answer, or within it. Answers are checked.
Then the server is left alone, and counts what it holds. The command ends with 1 if memory grows, if anything of a
request is kept, or if an answer is wrong.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from benchmarks.cpu import cpu_model
from benchmarks.servers import HOST, ServerFailed
from benchmarks.soak.load import SoakLoad, SoakOutcome
from benchmarks.soak.mix import Item, large_ones, save_models
from benchmarks.soak.observed import Observed, observed
from benchmarks.soak.plot import save_plot
from benchmarks.soak.trend import LEAST_BLOCKS, Trend, trend_of
from benchmarks.soak.verdict import State, always_held, growth, leaks, summary
from server.cores import usable_cores

ROOT = Path(__file__).resolve().parents[2]
IDLE_S = 2.0
WARM_UP_SHARE = 0.1
# The warm-up begins with large requests only, so that allocators see the most of them at a time that there can be: the
# C library, for each thread, and onnxruntime, for each session, keep the memory for as many as there ever were.
LARGE_SHARE, MOST_LARGE = 0.03, 6000
SAMPLES = 500
MAX_QUEUE_ROWS = 600
_COUNTS, _COUNT_PAUSE_S = 3, 0.3
_MOST_LINES = 10
_MB = 1e6


class Report(msgspec.Struct, frozen=True):
    """What a soak found.

    Attributes:
        faults: Why it is not passed; empty when it is.
        outcomes: Of each part.
        states: What the server held after the warm-up and after each further part.
        samples: Requests so far, and resident bytes of all processes.
        warm_up: Requests of the warm-up.
        trend: Of the memory after it, in bytes per request; ``None`` with too few samples.
    """

    faults: list[str]
    outcomes: list[SoakOutcome]
    states: list[State]
    samples: list[tuple[float, float]]
    warm_up: int
    trend: Trend | None


class Options(msgspec.Struct, frozen=True):
    """What to soak with, and options of the server.

    Attributes:
        requests: How many, with the warm-up.
        leaving: Share of them whose client leaves.
        connections: Requests in flight.
        workers: Processes for HTTP.
        cache_bytes: Of the response cache.
        seed: Of all choices.
        parts: After each of so many parts of the requests that follow the warm-up, the server is counted.
        idle_s: For how long it is left alone before.
    """

    requests: int
    leaving: float = 0.05
    connections: int = 32
    workers: int = 1
    cache_bytes: int = 0
    seed: int = 0
    parts: int = 6
    idle_s: float = IDLE_S


def soak(options: Options, progress: Progress) -> Report:
    """Start a server, soak it, and judge.

    Raises:
        ServerFailed: If the server or the load generator fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "observed"
        folder.mkdir()
        items = save_models(Path(scratch) / "models")
        served = {"max-queue-rows": MAX_QUEUE_ROWS, "workers": options.workers, "cache-bytes": options.cache_bytes}
        with observed(Path(scratch) / "models", folder, served) as server:
            return _judged(options, server, items, progress)


def _judged(options: Options, server: Observed, items: list[Item], progress: Progress) -> Report:
    warm_up = int(options.requests * WARM_UP_SHARE)
    large = min(MOST_LARGE, int(options.requests * LARGE_SHARE))
    ends = [warm_up + (options.requests - warm_up) * part // options.parts for part in range(options.parts + 1)]
    bar = progress.add_task("soak", total=options.requests, rate="")
    outcomes, states = [], []
    samples: list[tuple[float, float]] = []
    for begun, end in pairwise((0, large, *ends)):
        for step in _run(_load(options, server.port, begun, end, items if begun else large_ones(items))):
            if isinstance(step, SoakOutcome):
                outcomes.append(step)
            else:
                samples.append((begun + step, server.rss_bytes()))
                _show(progress, bar, begun + step)
        if end >= warm_up:
            states.append(_state(server, options.idle_s))
    judged = [(x, y) for x, y in samples if x > warm_up]
    trend = trend_of(*zip(*judged, strict=True)) if len(judged) >= LEAST_BLOCKS else None
    faults = [f"{outcome.faulty} answers: {'; '.join(outcome.faults)}" for outcome in outcomes if outcome.faulty]
    faults += leaks(states, options.requests - warm_up, usable_cores(), caches=bool(options.cache_bytes))
    faults += _said(server, options.cache_bytes)
    return Report(faults, outcomes, states, samples, warm_up, trend)


def _load(options: Options, port: int, begun: int, end: int, items: list[Item]) -> SoakLoad:
    report_every = max(1, options.requests // SAMPLES)
    seed = options.seed + begun
    return SoakLoad(HOST, port, end - begun, options.leaving, options.connections, items, report_every, seed)


def _said(server: Observed, cache_bytes: int) -> list[str]:
    """Return what metrics and log say that must not be."""
    waiting, kept_bytes = server.metric("slipstream_queue_rows"), server.metric("slipstream_cache_bytes")
    found = [f"{waiting:g} rows wait"] if waiting else []
    found += [f"the cache holds {kept_bytes:g} bytes"] if kept_bytes > cache_bytes else []
    return found + [f"the log says: {line}" for line in server.complaints()[:_MOST_LINES]]


def _run(load: SoakLoad) -> Iterator[int | SoakOutcome]:
    """Run the load generator in its own process; yield how many requests are done, and at last its outcome."""
    command = [sys.executable, "-m", "benchmarks.soak.load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        if process.stdin is None or process.stdout is None:
            raise ServerFailed("the load generator has no pipes")
        try:
            process.stdin.write(msgspec.msgpack.encode(load))
            process.stdin.close()
            for line in process.stdout:
                yield int(line) if line.strip().isdigit() else msgspec.json.decode(line, type=SoakOutcome)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ServerFailed(f"the load generator ended with exit code {process.returncode}")


def _show(progress: Progress, bar: TaskID, done: int) -> None:
    task = progress.tasks[bar]
    progress.update(bar, completed=done, rate=f"{done / (task.elapsed or 1):,.0f}/s")


def _state(server: Observed, idle_s: float) -> State:
    time.sleep(idle_s)
    counts = []
    for _ in range(_COUNTS):
        counts.append(server.counts())
        time.sleep(_COUNT_PAUSE_S)
    return State(always_held(counts), server.held())


def print_report(report: Report, options: Options) -> None:
    """Print what was found."""
    answered, left = Counter[str](), Counter[str]()
    for outcome in report.outcomes:
        answered.update(outcome.answered)
        left.update(outcome.left)
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    checked = sum(outcome.checked for outcome in report.outcomes)
    print(f"{cpu_model()}, {usable_cores()} cores; {options}")
    print(
        f"{options.requests} requests in {seconds:.0f} s, {options.requests / seconds:.0f}/s; "
        f"the numbers of {checked} answers compared"
    )
    print("answered: " + ", ".join(f"{code} {count}" for code, count in answered.most_common()))
    print("left: " + ", ".join(f"{point} {count}" for point, count in left.most_common()))
    for name, state in (("warm-up", report.states[0]), ("end", report.states[-1])):
        held = state.held.values()
        rss_mb, threads, files = (sum(getattr(each, f) for each in held) for f in ("rss_bytes", "threads", "files"))
        print(f"after {name}: {rss_mb / _MB:.1f} MB, {threads} threads, {files} descriptors")
        print(f"  {summary(state.counts.values())}")
    if report.trend is not None:
        trend = report.trend
        print(f"memory: {trend.slope:+.2f} bytes per request [{trend.low:+.2f}, {trend.high:+.2f}]")


def main() -> int:
    """Soak, print, and return 1 if the server kept anything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument(
        "--leaving", type=float, default=0.05, help="share of clients that leave (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=32, help="requests in flight (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes for HTTP (default: %(default)s)")
    parser.add_argument("--cache-bytes", type=int, default=0, help="of the response cache (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="write the memory over requests as SVG")
    parser.add_argument("--raw", type=Path, help="write everything that was found as JSON")
    asked = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server and the load end first
    plot, raw = asked.pop("plot"), asked.pop("raw")
    options = Options(**asked)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            report = soak(options, progress)
    except ServerFailed as exc:
        print(f"python -m benchmarks.soak: {exc}", file=sys.stderr)
        return 1
    print_report(report, options)
    if plot is not None and report.trend is not None:
        save_plot(plot, report.samples, report.warm_up, report.trend)
    if raw is not None:
        raw.write_bytes(msgspec.json.encode(report))
    verdict = growth(report.trend) if report.trend is not None else "too few requests to judge memory"
    faults = [*report.faults, *([verdict] if verdict else [])]
    print("kept" if not faults else "not kept:\n" + "\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
