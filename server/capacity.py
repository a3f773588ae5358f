"""How much a replica can serve: its latency tables, played against random arrivals. Pure.

A queue in front of equal lanes that take what waits, up to a largest batch: the rule of the scheduler without its
deadlines, as capacity is what can be served before any request has to be refused. Requests arrive as a Poisson process;
run times are lognormal with the median and the 99th percentile of the table.
"""

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator

import msgspec

from server.artifact import LatencyTable

REQUESTS = 20_000
"""Simulated per rate; the first tenth is left out. The p99 of the rest moves by a few percent with the seed."""
_STEPS = 12
_Z99 = 2.3263


class Replica(msgspec.Struct, frozen=True):
    """One pod, or one machine.

    Attributes:
        tables: From which batch size on -> latency table; the first one from 0 on.
        lanes: Runs at a time.
        most_rows: Of a batch.
        cores: Shared by the lanes and by the work around a run.
        overhead_s: CPU seconds of a request outside of its run: HTTP, decoding, batching.
        shares_cores: Whether runs take the same cores as that.
    """

    tables: tuple[tuple[int, LatencyTable], ...]
    lanes: int
    most_rows: int
    cores: int
    overhead_s: float
    shares_cores: bool = True

    def run_s(self, rows: int) -> float:
        """Return the median time of a run."""
        return self._table(rows).predict_s(rows)

    def spread(self, rows: int) -> float:
        """Return the standard deviation of the logarithm of a run's time."""
        table = self._table(rows)
        nearest = min(max(bisect_right(table.rows, rows) - 1, 0), len(table.rows) - 1)
        return max(0.0, math.log(table.p99_ms[nearest] / table.p50_ms[nearest]) / _Z99)

    def most_per_s(self, rows: int) -> float:
        """Return requests of so many rows per second that all of it, always busy, would serve."""
        best = max(batch / self.run_s(batch * rows) for batch in range(1, max(1, self.most_rows // rows) + 1))
        around_s = self.overhead_s / self.cores
        return 1 / (1 / (self.lanes * best) + around_s) if self.shares_cores else min(self.lanes * best, 1 / around_s)

    def capped(self, slo_s: float, rows: int) -> "Replica":
        """Return it with batches so small that a request can wait for one and be served by the next in time."""
        fitting = [batch for batch in range(rows, self.most_rows + 1) if 2 * self.run_s(batch) <= slo_s]
        return msgspec.structs.replace(self, most_rows=max(fitting, default=rows))

    def _table(self, rows: int) -> LatencyTable:
        return [table for start, table in self.tables if start <= rows][-1]


class Service(msgspec.Struct, frozen=True):
    """What a replica does at a rate.

    Attributes:
        rate_per_s: Requests per second.
        p50_s: Median latency, from arrival to answer.
        p99_s: Its 99th percentile.
        busy: Share of the lanes' time in runs.
        batch: Mean requests per run.
    """

    rate_per_s: float
    p50_s: float
    p99_s: float
    busy: float
    batch: float


def serve(replica: Replica, rate_per_s: float, rows: int = 1, seed: int = 0, requests: int = REQUESTS) -> Service:
    """Play arrivals against a replica.

    Args:
        replica: Who serves.
        rate_per_s: Requests per second.
        rows: Of each request.
        seed: Of the arrivals and of the times of runs.
        requests: How many.
    """
    draw = random.Random(seed)  # noqa: S311  (a simulation)
    most = max(1, replica.most_rows // rows)
    # What the rest of a request takes from the cores, the runs do not get.
    taken_share = rate_per_s * replica.overhead_s / replica.cores if replica.shares_cores else 0.0
    slowed = 1 / max(1e-9, 1 - taken_share)
    free = [0.0] * replica.lanes
    waiting: deque[float] = deque()
    latencies, busy_s, runs, now_s = [], 0.0, 0, 0.0
    upcoming = _arrivals(draw, rate_per_s, requests)
    next_s = next(upcoming)
    while waiting or next_s < math.inf:
        lane_s = free[0]
        start_s = max(lane_s, waiting[0] if waiting else next_s)
        while next_s <= start_s:
            waiting.append(next_s)
            next_s = next(upcoming, math.inf)
        count = min(len(waiting), most)
        taken = count * rows
        run_s = replica.run_s(taken) * slowed * math.exp(replica.spread(taken) * draw.gauss(0, 1))
        now_s = start_s + run_s
        heapq.heapreplace(free, now_s)
        busy_s += run_s
        runs += 1
        latencies += [now_s - waiting.popleft() + replica.overhead_s for _ in range(count)]
    settled = sorted(latencies[len(latencies) // 10 :])
    end_s = max(free)
    return Service(
        rate_per_s,
        settled[len(settled) // 2],
        settled[math.ceil(0.99 * len(settled)) - 1],
        busy_s / (replica.lanes * end_s),
        len(latencies) / runs,
    )


def capacity(replica: Replica, slo_s: float, rows: int = 1) -> float:
    """Return the highest rate in requests per second with which the p99 stays within a limit; 0 if none does.

    Args:
        replica: Who serves.
        slo_s: Limit of the 99th percentile of the latency.
        rows: Of each request.
    """
    high = replica.most_per_s(rows)
    low = high * 1e-3
    if serve(replica, low, rows).p99_s > slo_s:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if serve(replica, middle, rows).p99_s <= slo_s:
            low = middle
        else:
            high = middle
    return low


def _arrivals(draw: random.Random, rate_per_s: float, count: int) -> Iterator[float]:
    at_s = 0.0
    for _ in range(count):
        at_s += draw.expovariate(rate_per_s)
        yield at_s
