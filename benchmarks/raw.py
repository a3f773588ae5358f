"""The limit: ``session.run`` in a loop, on as many threads as the server runs lanes, without any server."""

import threading
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.workloads import Row, Workload
from server.providers import Device, open_ort_session

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


class RawSession:
    """The session of a workload, opened as the server opens it."""

    def __init__(self, workload: Workload) -> None:
        self._session = open_ort_session(workload.model, Device("cpu"), workload.options)
        self._rows = workload.rows

    def run(self, rows: int, lanes: int, seconds: float) -> tuple[list[float], float, float]:
        """Run batches of ``rows`` on ``lanes`` threads at a time.

        Returns:
            Milliseconds of every run, CPU seconds of this process, seconds from start to end.
        """
        batches = batches_of(self._rows, rows)
        times_ms: list[float] = []
        starts: list[tuple[float, float]] = []
        # Every thread has run once, outside the measurement, before the first passes.
        barrier = threading.Barrier(lanes, action=lambda: starts.append((time.perf_counter(), time.process_time())))
        threads = [
            threading.Thread(target=self._loop, args=(batches, seconds, barrier, times_ms)) for _ in range(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        started_s, started_cpu_s = starts[0]
        return times_ms, time.process_time() - started_cpu_s, time.perf_counter() - started_s

    def best_rows(self, lanes: int, seconds: float) -> int:
        """Return the batch size with the least CPU time per row; a larger one must save 2 % to be taken."""
        best, least = 1, float("inf")
        for rows in BATCH_SIZES:
            times_ms, cpu_s, _ = self.run(rows, lanes, seconds)
            per_row = cpu_s / (len(times_ms) * rows)
            if per_row < 0.98 * least:
                best, least = rows, per_row
        return best

    def _loop(self, batches: Sequence[Row], seconds: float, barrier: threading.Barrier, times_ms: list[float]) -> None:
        session, clock = self._session, time.perf_counter
        session.run(None, batches[0])
        barrier.wait()
        until_s, index = clock() + seconds, 0
        while (started_s := clock()) < until_s:
            session.run(None, batches[index % len(batches)])
            times_ms.append((clock() - started_s) * 1e3)
            index += 1


def batches_of(rows: Sequence[Row], size: int) -> list[Row]:
    """Join rows to full batches; the last one is filled up with the first rows."""
    padded = [rows[i % len(rows)] for i in range(-(-len(rows) // size) * size)]
    return [
        {name: np.concatenate([row[name] for row in padded[start : start + size]]) for name in rows[0]}
        for start in range(0, len(padded), size)
    ]
