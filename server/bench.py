"""Measuring how a model splits the cores: sessions of each split, run alone and all at once as lanes would run them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from server.artifact import LatencyTable
from server.host import available_memory_bytes
from server.session import Opened, measure_latency
from server.split import Load, Split
from server.tensors import Tensors

logger = logging.getLogger(__name__)

LEAST_BUDGET_S = 2.0
"""What measuring the splits of one model may always take."""

_ALONE_S = 0.15
_WINDOW_S = 0.1
_MEMORY_SHARE = 0.25  # of the free memory, for copies of the weights
_SESSION_PER_FILE = 2  # a session holds its weights, and most of them again as its kernels want them


class Subject(msgspec.Struct, frozen=True):
    """What is measured.

    Attributes:
        session: Of one thread, warmed up.
        reopen: Opens another session with so many threads; called from several threads at once. Whoever opens it
            closes it.
        inputs: Makes a batch of so many rows.
        sizes: Batch sizes in rows, ascending from 1.
        size_bytes: Of the model's files.
    """

    session: Opened
    reopen: Callable[[int], Opened]
    inputs: Callable[[int], Tensors]
    sizes: tuple[int, ...]
    size_bytes: int


class SessionBench:
    """A ``Bench`` of real sessions.

    Use it in one thread. Sessions of several threads that it opened are open until ``keep`` or ``close``.

    Args:
        subject: What is measured.
        budget_s: Seconds within which nothing more is begun; what has begun then may take a moment longer.
        is_quiet: Whether nobody else needs the cores; once false, nothing more is measured.
        memory_bytes: Memory that is free; by default as the system tells.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        subject: Subject,
        budget_s: float,
        is_quiet: Callable[[], bool],
        memory_bytes: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._subject, self._is_quiet, self._clock = subject, is_quiet, clock
        self._end_s = clock() + budget_s
        free = available_memory_bytes() if memory_bytes is None else memory_bytes
        self._spare_bytes = free * _MEMORY_SHARE
        self._opened: dict[int, list[Opened]] = {}
        self._open_s = 0.0

    def alone(self, splits: Sequence[Split]) -> dict[Split, LatencyTable]:
        """Measure one instance of each split; splits for which there is no memory or no time are left out.

        The split of one thread is always measured.

        Raises:
            InferenceFailed: If a run fails.
            StartupError: If a session does not open.
        """
        fitting = [split for split in splits if self._fits(split)]
        started_s = self._clock()
        if self._may_go_on():
            self._grow({split.threads: 1 for split in fitting})
        self._open_s = self._clock() - started_s
        tables: dict[Split, LatencyTable] = {}
        for split in fitting:
            if split.threads == 1 or self._may_go_on():
                session = self._sessions(split)[0]
                tables[split] = measure_latency(
                    session, self._subject.sizes, _ALONE_S, self._clock, self._subject.inputs
                )
        return tables

    def together(self, split: Split, sizes: Sequence[int]) -> Load | None:
        """Run all instances at once, each in a thread; ``None`` when time is up or the cores are needed.

        Raises:
            InferenceFailed: If a run fails.
            StartupError: If a session does not open.
        """
        missing = split.instances - len(self._sessions(split))
        wait_s = self._open_s if missing else 0.0
        if not self._is_quiet() or (split.threads > 1 and self._clock() + wait_s > self._end_s):
            return None
        self._grow({split.threads: split.instances})
        loads = [self._run(self._sessions(split), rows) for rows in sizes]
        return Load(max(load.rows_per_s for load in loads), min(load.cpu_share for load in loads))

    def keep(self, split: Split) -> list[Opened]:
        """Return a session for each instance of a split, opening what is missing, and close all others.

        Instances of one thread share the subject's session.

        Raises:
            StartupError: If a session does not open.
        """
        self._grow({split.threads: split.instances})
        kept = self._sessions(split)
        self._opened.pop(split.threads, None)
        self.close()
        if split.threads > 1:
            self._subject.session.close()
        return kept

    def close(self) -> None:
        """Close the sessions that were opened here and not kept."""
        for session in _flat(self._opened.values()):
            session.close()
        self._opened.clear()

    def _fits(self, split: Split) -> bool:
        needed = split.instances * _SESSION_PER_FILE * self._subject.size_bytes
        return split.threads == 1 or not self._spare_bytes or needed <= self._spare_bytes

    def _may_go_on(self) -> bool:
        return self._is_quiet() and self._clock() < self._end_s

    def _sessions(self, split: Split) -> list[Opened]:
        if split.threads == 1:
            return [self._subject.session] * split.instances
        return self._opened.get(split.threads, [])

    def _grow(self, wanted: dict[int, int]) -> None:
        """Open sessions, all at the same time, until there are so many for each number of threads."""
        missing = [
            threads
            for threads, count in wanted.items()
            if threads > 1
            for _ in range(count - len(self._opened.get(threads, [])))
        ]
        if not missing:
            return
        with ThreadPoolExecutor(len(missing), "split-open") as pool:
            opening = [(threads, pool.submit(self._open, threads)) for threads in missing]
        for threads, future in opening:
            if future.exception() is None:
                self._opened.setdefault(threads, []).append(future.result())
        for _, future in opening:
            future.result()

    def _open(self, threads: int) -> Opened:
        session = self._subject.reopen(threads)
        session.run(self._subject.inputs(1))
        return session

    def _run(self, sessions: Sequence[Opened], rows: int) -> Load:
        batch, barrier = self._subject.inputs(rows), threading.Barrier(len(sessions))
        with ThreadPoolExecutor(len(sessions), "split-run") as pool:
            works = [pool.submit(self._repeat, session, batch, barrier) for session in sessions]
        done = [work.result() for work in works]
        rows_per_s = sum(rows * runs / wall_s for runs, wall_s, _ in done)
        cpu_share = sum(cpu_s for _, _, cpu_s in done) / sum(wall_s for _, wall_s, _ in done)
        return Load(rows_per_s, min(cpu_share, 1.0))

    def _repeat(self, session: Opened, batch: Tensors, barrier: threading.Barrier) -> tuple[int, float, float]:
        """Run a batch again and again; return the runs, and the seconds by the clock and on a core."""
        barrier.wait()
        start_s, start_cpu_s, runs = self._clock(), time.thread_time(), 0
        while not runs or self._clock() - start_s < _WINDOW_S:
            session.run(batch)
            runs += 1
        return runs, max(self._clock() - start_s, 1e-9), time.thread_time() - start_cpu_s


def _flat(groups: Iterable[list[Opened]]) -> list[Opened]:
    return [session for group in groups for session in group]
