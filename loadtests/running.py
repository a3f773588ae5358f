"""A load test under way: its plan, its clock, what is counted, and the result."""

import bisect
import itertools
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loadtests.objectives import Objective
from loadtests.report import Line, Result, lines_of
from loadtests.shapes import WARM_UP, Course, Phase, expovariate, next_arrival, phases_of
from loadtests.tallies import UNANSWERED, Recording, Row, Tally
from loadtests.traffic import Prepared


class LoadTest:
    """The state of one process of a load test; that of the master has what all of them counted.

    Args:
        course: The shape of the load.
        objective: What must be reached.
        prepared: Kinds of requests with their bodies.
        processes: That send this load together.

    Attributes:
        phases: The parts of the test, in order.
        paced: Whether requests are due at times; each user sends as soon as it can otherwise.
        recording: What was counted.
        over_s: When the test ends, in seconds since its start.
        is_drained: Whether the last answers were waited for long enough: what is missing now has no answer.
        workers_cpu: Worker -> share of a core.
        ended: Workers that have nothing more to report.

    Raises:
        ShapeError: If the course lacks what its shape needs.
    """

    def __init__(self, course: Course, objective: Objective, prepared: Sequence[Prepared], processes: int = 1) -> None:
        self.course, self.objective, self.prepared = course, objective, prepared
        self.phases = phases_of(course)
        self.paced = self.phases[0].rate_per_s > 0
        self.recording = Recording()
        self.over_s = self.phases[-1].end_s
        self.is_drained = False
        self.workers_cpu: dict[str, float] = {}
        self.ended: set[str] = set()
        self._rate_share, self._last_due_s = 1 / processes, 0.0
        self._shares = list(itertools.accumulate(each.kind.weight for each in prepared))
        self._started_s, self._started_cpu_s = time.perf_counter(), time.process_time()

    def elapsed_s(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._started_s

    def cpu_share(self) -> float:
        """Return the share of a core that this process took."""
        return (time.process_time() - self._started_cpu_s) / max(self.elapsed_s(), 1e-9)

    def next_due_s(self) -> float:
        """Take the next request of this process; return when it is due, infinite when there is none.

        Any user that is free takes it, so that it is late only when all of them are busy.
        """
        self._last_due_s = next_arrival(self._last_due_s, self.phases, self._rate_share, expovariate)
        return self._last_due_s if self._last_due_s < self.over_s else math.inf

    def count_unsent(self) -> None:
        """Count what was due and was never sent."""
        while self.paced and self.next_due_s() < math.inf:
            self.recording.at(self._last_due_s, self.draw_kind()).add(UNANSWERED, 0.0, in_time=False)

    def draw_kind(self) -> int:
        """Draw the kind of the next request."""
        if len(self._shares) == 1:
            return 0
        return bisect.bisect(self._shares, random.random() * self._shares[-1], hi=len(self._shares) - 1)

    def add(self, worker: str, rows: Iterable[Row], cpu: float) -> None:
        """Add what a worker counted."""
        self.recording.give(rows)
        self.workers_cpu[worker] = cpu

    def end(self, at_s: float) -> None:
        """End the test: what would be due later is not sent."""
        self.over_s = min(at_s, self.over_s)

    def counted(self) -> list[tuple[Phase, Tally]]:
        """Return the phases that took place, the last one by its whole seconds, with what was counted in each."""
        ended_s = math.floor(self.over_s)
        phases = [
            replace(phase, end_s=min(phase.end_s, ended_s))
            for phase in self.phases
            if min(phase.end_s, ended_s) > phase.start_s
        ]
        return [(phase, self.recording.between(phase.start_s, phase.end_s)) for phase in phases]

    def result(self) -> Result:
        """Judge what was counted."""
        title = f"{self.course.shape} of {'; '.join(each.kind.title for each in self.prepared)}"
        counted = self.counted()
        measured = [phase for phase, _ in counted if phase.name != WARM_UP]
        start_s, end_s = (measured[0].start_s, measured[-1].end_s) if measured else (0.0, 1.0)
        by_kind = [self.recording.between(start_s, end_s, number) for number in range(len(self.prepared))]
        kinds = [
            Line(each.kind.title, end_s - start_s, 0.0, tally)
            for each, tally in zip(self.prepared, by_kind, strict=True)
        ]
        timeline = [
            Line(str(second), 1.0, phase.rate_per_s, self.recording.between(second, second + 1))
            for phase, _ in counted
            for second in range(int(phase.start_s), int(phase.end_s))
        ]
        missed = self.objective.missed(counted)
        cpu = list(self.workers_cpu.values()) or [self.cpu_share()]
        return Result(title, lines_of(counted), kinds, timeline, missed, cpu, self._findings(counted))

    def _findings(self, counted: Sequence[tuple[Phase, Tally]]) -> list[str]:
        """Say where steps have found the limit."""
        steps = [(phase, tally) for phase, tally in counted if phase.name != WARM_UP]
        if self.course.shape != "steps" or not steps:
            return []
        peak_per_s = max(tally.good / phase.seconds for phase, tally in steps)
        held_per_s = self.objective.highest_held(steps)
        return [f"the objective holds up to {held_per_s:.4g} requests/s; goodput peaks at {peak_per_s:.4g}/s"]
