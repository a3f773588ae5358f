"""Splitting the usable cores among the lanes of a model: so many instances, each with so many threads.

Pure: times come from a ``Bench``. Instances of one thread never wait for each other and mostly serve the most rows per
second; instances of many threads answer a lone request sooner. One number, ``LATENCY_WEIGHT``, says which trade pays.

The search is best first. One instance of each split is measured alone; its throughput times their number is what the
split can reach at most. All instances at once are measured only of splits that could still beat the best one so far.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from server.artifact import LatencyTable

LATENCY_WEIGHT = 0.1
"""Of a lone request's time against rows per second: answering it in half the time is worth 7 % of them.

Under load, requests wait for each other, and rows per second decide; a server that is not full answers in the time of
one run. With this weight eight times the time must gain a quarter more rows, and a few per cent never buy a factor.
"""

LEAST_CPU_SHARE = 0.85
"""Of the time that threads which never wait must get on the cores; with less, something else runs on them."""

_MOST_DRIFT = 0.15
_NEEDED = "requests came"


class Split(msgspec.Struct, frozen=True):
    """Instances of a model that run at the same time, and the threads of each."""

    instances: int
    threads: int

    def __str__(self) -> str:
        return f"{self.instances} x {self.threads} thread{'s' * (self.threads > 1)}"


class Load(msgspec.Struct, frozen=True):
    """All instances of a split at work at once.

    Attributes:
        rows_per_s: Of all together, at the better one of the batch sizes that were run.
        cpu_share: Part of the time that the calling threads spent on a core, 0 to 1; they are all there is to an
            instance of one thread.
    """

    rows_per_s: float
    cpu_share: float


class Trial(msgspec.Struct, frozen=True):
    """What was measured of a split.

    Attributes:
        split: The split.
        latency: Of one instance alone.
        rows_per_s: Of all instances at once.
        is_bound: Whether they were not run, and this is what they can reach at most.
    """

    split: Split
    latency: LatencyTable
    rows_per_s: float
    is_bound: bool = False

    @property
    def worth(self) -> float:
        """What is made as large as possible: rows per second, times a lone request's speed to a small power."""
        return self.rows_per_s * math.pow(max(self.latency.predict_s(1), 1e-9), -LATENCY_WEIGHT)

    def __str__(self) -> str:
        most = "at most " if self.is_bound else ""
        return f"{self.split}: {most}{self.rows_per_s:.4g} rows/s, {self.latency.p50_ms[0]:.3g} ms for one row alone"


class Finding(msgspec.Struct, frozen=True):
    """The outcome of a comparison.

    Attributes:
        trials: What was measured, the best first; those that were not run with all instances are last.
        failure: Why none of it may be trusted; empty when the first one is to be used.
    """

    trials: tuple[Trial, ...]
    failure: str = ""


class Bench(Protocol):
    """Measures splits of one model."""

    def alone(self, splits: Sequence[Split]) -> Mapping[Split, LatencyTable]:
        """Measure one instance of each split; splits for which there is no memory or time are left out."""
        ...

    def together(self, split: Split, sizes: Sequence[int]) -> Load | None:
        """Run all instances at once at these batch sizes; ``None`` when there is no time, or requests came."""
        ...


class Splits:
    """The splits of a process's models: measured before the first request is served, remembered afterwards.

    Measuring takes all cores: beside requests it would delay them, and tell nothing. A version that is opened later is
    split as the one before it.

    Args:
        is_quiet: Whether no request has been served yet; once false it stays so. Called from any thread.
    """

    def __init__(self, is_quiet: Callable[[], bool]) -> None:
        self.is_quiet = is_quiet
        self._known: dict[str, Split] = {}

    def known(self, model: str) -> Split | None:
        """Return the split that was last measured for a model."""
        return self._known.get(model)

    def remember(self, model: str, split: Split) -> None:
        """Keep the split for later versions of a model."""
        self._known[model] = split

    def may_start_threads(self, model: str) -> bool:
        """Whether a version that is opened now may get sessions with a pool of threads."""
        known = self.known(model)
        return self.is_quiet() or (known is not None and known.threads > 1)


def splits_of(cores: int) -> tuple[Split, ...]:
    """Return the splits to compare, the one with one thread each first and the one with all threads last.

    Threads double from one to the next; what is left over goes to them. Each split fills the cores: fewer instances
    would only leave cores idle, and look as good as more while a neighbour takes those.
    """
    found: dict[int, Split] = {}
    threads = 1
    while threads <= cores:
        instances = cores // threads
        found[instances] = Split(instances, cores // instances)
        threads *= 2
    return tuple(found.values())


def compare(bench: Bench, cores: int) -> Finding:
    """Find the split that is worth most.

    The measurement is not trusted when the instances of one thread did not get the cores, or when they are not as fast
    at its end as at its beginning.

    Args:
        bench: Measures.
        cores: Usable cores.

    Raises:
        InferenceFailed: If a run fails.
        StartupError: If a session does not open.
    """
    plain, *others = splits_of(cores)
    alone = bench.alone((plain,))[plain]
    load = bench.together(plain, _sizes(alone))
    if load is None or (failure := _distrust(load)):
        return Finding((), failure if load is not None else _NEEDED)
    trials = [first := Trial(plain, alone, load.rows_per_s)]
    bounds = _sorted(_bound(split, table) for split, table in bench.alone(others).items())
    left: list[Trial] = []
    for bound in bounds:
        is_hopeless = bound.worth <= trials[0].worth
        load = None if is_hopeless else bench.together(bound.split, _sizes(bound.latency))
        if load is None:
            left.append(bound)
        else:
            trials = _sorted([*trials, Trial(bound.split, bound.latency, load.rows_per_s)])
    finding = Finding((*trials, *left))
    if len(trials) == 1:
        return finding
    again = bench.together(plain, _sizes(first.latency))
    failure = _distrust(again) or _drift(first, again) if again is not None else _NEEDED
    return msgspec.structs.replace(finding, failure=failure)


def _bound(split: Split, alone: LatencyTable) -> Trial:
    rows = alone.best_rows(0.0)
    return Trial(split, alone, split.instances * rows / max(alone.predict_s(rows), 1e-9), is_bound=True)


def _sorted(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.worth, reverse=True)


def _sizes(alone: LatencyTable) -> tuple[int, ...]:
    """Return the batch sizes at which splits are compared: one row, and from where throughput grows no more."""
    return tuple(sorted({alone.rows[0], alone.best_rows()}))


def _distrust(plain: Load) -> str:
    if plain.cpu_share < LEAST_CPU_SHARE:
        return f"its threads got {plain.cpu_share:.0%} of the cores' time, something else runs on them"
    return ""


def _drift(first: Trial, again: Load) -> str:
    before, after = first.rows_per_s, again.rows_per_s
    if abs(after - before) > _MOST_DRIFT * max(before, after):
        return f"{before:.4g} rows/s at its beginning and {after:.4g} at its end, something else runs on the cores"
    return ""
