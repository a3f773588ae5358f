"""Latency races: every session runs every batch size once per round, so that noise hits all of them alike.

What makes the numbers comparable:

* Interleaved and shuffled. A round visits every session and batch size; speed-ups are medians of *paired* ratios (the
  two runs of one round), with a 95 % interval from order statistics, which assumes no distribution.
* Apart. Worker threads of a session that spins keep burning a core for about 40 ms after its last run (onnxruntime's
  default; measured). Each session that spins runs in a block of its own, and the others wait until its threads sleep;
  otherwise the baseline would slow the candidates down, and two that spin each other.
* Warm. The first run of each session and batch size is discarded, and cheap runs are repeated within a sample until it
  lasts a millisecond.

CPU seconds of the whole process are taken beside the wall time: a session that answers sooner by burning two cores is
not the same as one that needs less work.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np

from server.artifact import LatencyTable
from server.tensors import Array, Tensors

Verdict = Literal["faster", "slower", "indistinguishable"]
Cell = tuple[str, int]
"""A session's name and a batch size."""

METHOD = 2
"""Raised whenever races are measured in another way, so that results of different ways are not mixed."""

_Z95 = 1.959964
_LONG_RUN_S = 0.1
_MOST_DIGITS = 6


class Runner(Protocol):
    """What a race needs of a session."""

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        """Run one batch."""
        ...


class RacePlan(msgspec.Struct, frozen=True):
    """How long and how carefully to measure.

    Attributes:
        budget_s: Wall seconds that the rounds may take, warm-up not counted; the least number of rounds wins over it.
        min_rounds: Rounds for batch sizes whose share of the budget allows them.
        least_rounds: Rounds even for the slowest batch size.
        max_rounds: Rounds at most.
        sample_s: Least duration of one sample; shorter runs are repeated within it.
        settle_s: Pause after each session that spins.
        seed: Seed of the order within rounds.
    """

    budget_s: float = 10.0
    min_rounds: int = 15
    least_rounds: int = 5
    max_rounds: int = 60
    sample_s: float = 1e-3
    settle_s: float = 0.05
    seed: int = 0


class Sample(msgspec.Struct, frozen=True):
    """One sample: seconds of wall and of CPU time per run."""

    round: int
    wall_s: float
    cpu_s: float


class Comparison(msgspec.Struct, frozen=True):
    """Speed of a candidate against a baseline at one batch size, paired by round.

    Attributes:
        rows: The batch size.
        speedup: Median of baseline time / candidate time; above 1 the candidate is faster.
        low: Lower end of its 95 % interval.
        high: Upper end.
        pairs: Rounds that were compared.
        cpu_ratio: The candidate's CPU time per run / the baseline's.
    """

    rows: int
    speedup: float
    low: float
    high: float
    pairs: int
    cpu_ratio: float

    @property
    def verdict(self) -> Verdict:
        """``faster`` or ``slower`` when the interval excludes 1, else ``indistinguishable``."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "indistinguishable"

    def __str__(self) -> str:
        return f"{self.speedup:.2f}x ({bound_text(self.low)}-{bound_text(self.high)}) at batch {self.rows}"


class Race(msgspec.Struct, frozen=True):
    """The samples of one race, and what follows from them."""

    samples: dict[Cell, list[Sample]]

    @property
    def rows(self) -> tuple[int, ...]:
        """Batch sizes measured, ascending."""
        return tuple(sorted({rows for _, rows in self.samples}))

    def has(self, name: str) -> bool:
        """Whether a session took part."""
        return any(name == seen for seen, _ in self.samples)

    def table(self, name: str) -> LatencyTable:
        """Return a session's latency table: median, p99 and the median's 95 % interval, in milliseconds."""
        times = [sorted(s.wall_s * 1e3 for s in self.samples[name, rows]) for rows in self.rows]
        intervals = [median_interval(t) for t in times]
        return LatencyTable(
            rows=self.rows,
            p50_ms=tuple(float(np.median(t)) for t in times),
            p99_ms=tuple(float(np.percentile(t, 99)) for t in times),
            low_ms=tuple(low for low, _ in intervals),
            high_ms=tuple(high for _, high in intervals),
        )

    def cpu_ms(self, name: str) -> tuple[float, ...]:
        """Return CPU milliseconds of the process per run, for each of ``rows``."""
        return tuple(float(np.mean([s.cpu_s for s in self.samples[name, rows]]) * 1e3) for rows in self.rows)

    def compare(self, name: str, baseline: str, rows: int) -> Comparison:
        """Compare a session with a baseline at one batch size; above 1 means ``name`` is faster."""
        theirs = {s.round: s for s in self.samples[baseline, rows]}
        pairs = [(theirs[s.round], s) for s in self.samples[name, rows] if s.round in theirs]
        ratios = sorted(base.wall_s / mine.wall_s for base, mine in pairs)
        low, high = median_interval(ratios)
        cpu = sum(mine.cpu_s for _, mine in pairs) / max(sum(base.cpu_s for base, _ in pairs), 1e-12)
        return Comparison(rows, float(np.median(ratios)), low, high, len(pairs), cpu)


def race(
    sessions: Mapping[str, Runner],
    batches: Mapping[int, Tensors],
    spinning: frozenset[str] = frozenset(),
    plan: RacePlan | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Race:
    """Measure all sessions on all batches in interleaved rounds. Blocks; one run at a time.

    Args:
        sessions: Name -> open session.
        batches: Batch size -> inputs with that many rows.
        spinning: Names of the sessions whose worker threads spin.
        plan: How long to measure.
        progress: Called with the share done, 0 to 1.

    Raises:
        InferenceFailed: If a session fails on a batch.
    """
    plan = plan or RacePlan()
    cost_s = {(name, rows): _warm_up(sessions[name], batch) for rows, batch in batches.items() for name in sessions}
    rounds = _rounds_per_size(cost_s, sorted(batches), plan, pauses=len(spinning.intersection(sessions)))
    samples: dict[Cell, list[Sample]] = {cell: [] for cell in cost_s}
    generator = np.random.default_rng(plan.seed)
    total = max(rounds.values())
    for number in range(total):
        sizes = [rows for rows in rounds if _takes_part(number, rounds[rows], total)]
        for block in _blocks(sessions, spinning, swap=number % 2 == 1):
            cells = [(name, rows) for rows in sizes for name in block]
            for index in generator.permutation(len(cells)):
                cell = cells[index]
                repeats = max(1, math.ceil(plan.sample_s / max(cost_s[cell], 1e-9)))
                samples[cell].append(_sample(sessions[cell[0]], batches[cell[1]], repeats, number))
            if spinning.intersection(block):
                time.sleep(plan.settle_s)
        progress((number + 1) / total)
    return Race(samples)


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median of sorted values, by order statistics (normal approximation of ranks).

    With fewer than six values it is their whole range, which covers a little less than 95 %.
    """
    n = len(ordered)
    half = _Z95 * math.sqrt(n) / 2
    low = max(math.floor((n - 1) / 2 - half), 0)
    return float(ordered[low]), float(ordered[n - 1 - low])


def bound_text(ratio: float) -> str:
    """Write an end of an interval of ratios: two digits, or as many as it takes to see on which side of 1 it lies."""
    digits = next((n for n in range(2, _MOST_DIGITS) if f"{ratio:.{n}f}" != f"{1:.{n}f}"), _MOST_DIGITS)
    return "1.00" if ratio == 1 else f"{ratio:.{digits}f}"


def _warm_up(session: Runner, batch: Tensors) -> float:
    """Discard the first run; return the seconds of the next one, of the faster of two when they are short."""
    session.run(batch)
    fastest = math.inf
    for _ in range(2):
        start = time.perf_counter()
        session.run(batch)
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > _LONG_RUN_S:
            break
    return fastest


def _rounds_per_size(
    cost_s: Mapping[Cell, float], sizes: Sequence[int], plan: RacePlan, *, pauses: int
) -> dict[int, int]:
    """Share the budget: an equal part for each batch size, so that small ones get many rounds and large ones few."""
    part_s, most = plan.budget_s / len(sizes), plan.max_rounds
    if pauses:
        # Every round holds that many pauses; they may take half of the budget.
        most = min(most, max(plan.min_rounds, int(plan.budget_s / 2 / (pauses * plan.settle_s))))
    rounds = {}
    for size in sizes:
        round_s = sum(max(cost, plan.sample_s) for (_, rows), cost in cost_s.items() if rows == size)
        affordable = int(part_s / round_s)
        # Small batches matter most for the verdict: they may overdraw their part threefold to reach min_rounds.
        least = plan.min_rounds if affordable * 3 >= plan.min_rounds else plan.least_rounds
        rounds[size] = min(max(affordable, least), most)
    return rounds


def _takes_part(number: int, rounds: int, total: int) -> bool:
    """Spread ``rounds`` of a batch size evenly over ``total`` rounds."""
    return (number + 1) * rounds // total > number * rounds // total


def _blocks(sessions: Mapping[str, Runner], spinning: frozenset[str], *, swap: bool) -> list[list[str]]:
    """Give each session that spins a block of its own, and the others one; every other round runs in reverse."""
    blocks = [*([name] for name in sessions if name in spinning), [n for n in sessions if n not in spinning]]
    blocks = [block for block in blocks if block]
    return blocks[::-1] if swap else blocks


def _sample(session: Runner, batch: Tensors, repeats: int, number: int) -> Sample:
    """Time ``repeats`` runs as one sample."""
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        session.run(batch)
    wall_s = time.perf_counter() - start
    return Sample(number, wall_s / repeats, (time.process_time() - cpu) / repeats)
