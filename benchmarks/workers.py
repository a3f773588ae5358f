"""What front-end processes cost: CPU per request of ``--workers N`` against one process, on a model that costs nothing.

``python -m benchmarks.workers`` runs both servers, in turn in every round, and prints requests per CPU second of all
processes of each, and the ratio of the two: medians over the rounds of ratios within a round. It ends with 1 if a ratio
is below the bar or an answer is wrong.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks.cpu import cpu_model
from benchmarks.servers import RunningServer, ServerFailed, offer, slipstream
from benchmarks.workloads import Workload, binary_request, check_answers, json_request, save_tiny
from server.cores import usable_cores

BAR = 0.8
CONNECTIONS = (16, 64)
KINDS = {"json": json_request, "binary": binary_request}


class Cell(msgspec.Struct, frozen=True):
    """One server in one round: requests per CPU second and per second, and latency in milliseconds."""

    per_cpu_s: float
    per_s: float
    p99_ms: float


def measure(server: RunningServer, workload: Workload, kind: str, connections: int, seconds: float) -> Cell:
    """Offer one load.

    Raises:
        ServerFailed: If an answer is wrong.
    """
    requests = [KINDS[kind](workload, row) for row in workload.rows]
    outcome = offer(server, requests, connections, seconds, min(1.0, seconds / 2))
    check = check_answers(outcome.answers, workload.expected)
    if check.failed or check.wrong:
        raise ServerFailed(f"{check.failed} requests failed and {check.wrong} got another one's answer")
    count = len(outcome.latencies_ms)
    ordered = sorted(outcome.latencies_ms)
    return Cell(count / outcome.server_cpu_s, count / outcome.seconds, ordered[int(0.99 * (count - 1))])


def main() -> int:
    """Measure and print; return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="front ends (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of every load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    asked = parser.parse_args()
    print(f"{cpu_model()}, {usable_cores()} cores, {asked.rounds} rounds of {asked.seconds:g} s")
    print(f"{'load':<14} {'1: /CPU s':>10} {f'{asked.workers}: /CPU s':>10} {'ratio':>6} {'[low-high]':>12}", end="")
    print(f" {'1: /s':>8} {f'{asked.workers}: /s':>8} {'1: p99 ms':>10} {f'{asked.workers}: p99 ms':>10}")
    missed = False
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload = save_tiny(folder / "models")
        one = stack.enter_context(slipstream(workload.repository))
        many = stack.enter_context(slipstream(workload.repository, "--workers", str(asked.workers)))
        for kind in KINDS:
            for connections in CONNECTIONS:
                pairs = [
                    tuple(measure(server, workload, kind, connections, asked.seconds) for server in (one, many))
                    for _ in range(asked.rounds)
                ]
                ratios = [after.per_cpu_s / before.per_cpu_s for before, after in pairs]
                before, after = (
                    [statistics.median(getattr(pair[i], field) for pair in pairs) for field in Cell.__struct_fields__]
                    for i in (0, 1)
                )
                ratio = statistics.median(ratios)
                missed |= ratio < BAR
                span = f"[{min(ratios):.2f}-{max(ratios):.2f}]"
                print(
                    f"{kind:<7} c={connections:<4} {before[0]:>10.0f} {after[0]:>10.0f} {ratio:>6.2f} {span:>12}",
                    end="",
                )
                print(f" {before[1]:>8.0f} {after[1]:>8.0f} {before[2]:>10.2f} {after[2]:>10.2f}", flush=True)
    print(f"bar: at least {BAR}: {'missed' if missed else 'kept'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
