"""``python -m benchmarks.overload``: goodput within a deadline as the arrival rate goes past saturation, and memory.

First the peak is found in a closed loop; then requests arrive at shares of it, whatever the answers do (open loop).
Every request has the same deadline; *goodput* counts the answers that came within it.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.__main__ import WORKLOADS, open_workloads
from benchmarks.open_loop import OpenLoad, OpenOutcome, connections_for
from benchmarks.servers import HOST, RunningServer, offer, offer_open, slipstream
from benchmarks.summary import percentile
from benchmarks.workloads import Workload, binary_request, with_header

SHARES = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
COLUMNS = (
    "rate / peak",
    "requests/s",
    "goodput/s",
    "p50 ms",
    "p99 ms",
    "in time",
    "refused, by reason",
    "server RSS MB",
    "generator late ms",
)
_LEAST_GOODPUT = 0.9
_CALM_S = 0.5
"""How late answers may be while the latency at half of the peak is measured."""


def main() -> int:
    """Measure and print; return 1 where goodput at twice the peak falls below 0.9 of the best."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--only", choices=WORKLOADS, help="one model")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every rate (default: %(default)s)")
    parser.add_argument(
        "--deadline-ms", type=float, help="(default: 8 times the latency at half of the peak, at least 50)"
    )
    parser.add_argument("--burst", type=int, default=1, help="requests per arrival (default: %(default)s)")
    arguments = parser.parse_args()
    kept = True
    with tempfile.TemporaryDirectory() as scratch:
        for workload in open_workloads(arguments.only, Path(scratch)):
            with slipstream(workload.repository) as server:
                kept = sweep(workload, server, arguments) and kept
    return 0 if kept else 1


def sweep(workload: Workload, server: RunningServer, arguments: argparse.Namespace) -> bool:
    """Measure one model at all rates; return whether the goodput stays."""
    requests = [binary_request(workload, row) for row in workload.rows]
    seconds, burst = arguments.seconds, arguments.burst

    def offer_rate(rate: float, what: list[bytes], lasting_s: float, at_once: int, patience_s: float) -> OpenOutcome:
        connections = connections_for(rate, patience_s)
        load = OpenLoad(HOST, server.port, server.pid, rate, lasting_s, connections, what, at_once)
        return offer_open(server, load)

    closed = offer(server, requests, 16, max(3.0, seconds / 2), 1.0)
    peak = len(closed.latencies_ms) / closed.seconds
    calm = offer_rate(peak / 2, requests, seconds / 2, 1, _CALM_S)
    deadline_ms = arguments.deadline_ms or max(50.0, 8 * percentile(calm.ok_ms, 0.5))
    due = [with_header(request, f"slipstream-timeout-ms: {deadline_ms:g}") for request in requests]
    print(f"\n## {workload.name}: peak {peak:.0f} requests/s in a closed loop of 16, deadline {deadline_ms:.0f} ms\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}")
    goodputs = {}
    for share in SHARES:
        outcome = offer_rate(peak * share, due, seconds, burst, deadline_ms / 1e3)
        in_time = [ms for ms in outcome.ok_ms if ms <= deadline_ms]
        goodputs[share] = len(in_time) / outcome.seconds
        refused = ", ".join(f"{code} {n}" for code, n in sorted(outcome.answered.items()) if code != "ok") or "none"
        print(
            f"| {share:g} | {outcome.sent / outcome.seconds:.0f} | {goodputs[share]:.0f} "
            f"| {percentile(outcome.ok_ms, 0.5):.1f} | {percentile(outcome.ok_ms, 0.99):.1f} "
            f"| {len(in_time) / max(1, len(outcome.ok_ms)):.2%} | {refused} | {rss_mb(server.pid):.0f} "
            f"| {outcome.late_ms:.0f} |",
            flush=True,
        )
    kept = goodputs[2.0] / max(goodputs.values())
    print(f"\nGoodput at twice the peak is {kept:.2f} of the best.")
    return kept >= _LEAST_GOODPUT


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    raise SystemExit(main())
