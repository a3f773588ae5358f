"""Gate and choice: which candidates are served, in which order, with how many threads. Pure; every refusal says why.

The rules, in order:

1. A candidate that a pass could not build, or that did not open, is refused with that reason.
2. Fidelity. The agreement measured on held-out samples must reach ``min_agreement`` (the point estimate; its 95 % lower
   bound is reported beside it), and the accuracy, when labels are given, may drop by ``max_accuracy_drop``.
3. Speed. A lossy candidate must be *faster* than the best exact FP32 form with the same number of threads (so that a
   change of the thread count is not mistaken for an optimization): faster at one of ``DECIDING_ROWS``, slower at none,
   each time by an interval that excludes 1, and by ``LEAST_GAIN`` on (geometric) average: less is no reason to give up
   exactness, and changes from run to run.
4. The served variants: the lossy ones, the fastest first, then FP32, which is always kept as the fallback.
5. Threads. A served variant gets all usable cores instead of one thread when that is faster by rule 3 and costs at most
   ``MAX_CPU_RATIO`` of the CPU time per row: beyond that, the same cores answer more requests with one thread each.
"""

import math
from collections.abc import Sequence

import msgspec

from optimizers.measurement import Comparison, Race
from optimizers.measurement import Verdict as Speed
from server.artifact import Fidelity

DECIDING_ROWS = (1, 8)
LEAST_GAIN = 1.1
MAX_CPU_RATIO = 1.25
NO_DATA = "no data: nothing can be proven; give --calibration DATA.npz"


class Gate(msgspec.Struct, frozen=True):
    """The fidelity that a served variant must have.

    Attributes:
        min_agreement: Least share of held-out samples with the original's decision, 0 to 1.
        max_accuracy_drop: Largest loss of task accuracy against the original, 0 to 1.
    """

    min_agreement: float = 0.99
    max_accuracy_drop: float = 0.01


class Candidate(msgspec.Struct, frozen=True):
    """What is known of one candidate when it is judged.

    Attributes:
        name: Its name in the race.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        exact: Whether its passes keep the arithmetic (FP32); exact candidates need not be faster.
        failure: Why it cannot be judged at all; empty when it can.
        fidelity: Evidence against the original; the untouched original needs none.
    """

    name: str
    provider: str = "cpu"
    exact: bool = False
    failure: str = ""
    fidelity: Fidelity | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Whether a candidate is served, and why."""

    kept: bool
    reason: str


class Decision(msgspec.Struct, frozen=True):
    """What is served.

    Attributes:
        verdicts: Verdict of each candidate.
        speed: Each candidate against the exact form that it had to beat, at the deciding batch sizes.
        kept: Names of the served candidates in order of preference.
    """

    verdicts: dict[str, Verdict]
    speed: dict[str, tuple[Comparison, ...]]
    kept: tuple[str, ...]


class ThreadChoice(msgspec.Struct, frozen=True):
    """Threads of a variant's session, and why."""

    variant: str
    threads: int
    reason: str


def deciding_rows(measured: Sequence[int]) -> tuple[int, ...]:
    """Return the batch sizes that decide, among those measured; the smallest one when none of them was."""
    return tuple(rows for rows in DECIDING_ROWS if rows in measured) or (min(measured),)


def speed_of(comparisons: Sequence[Comparison]) -> Speed:
    """Join the verdicts of several batch sizes: slower at one is slower; else faster at one is faster."""
    verdicts = {comparison.verdict for comparison in comparisons}
    if "slower" in verdicts:
        return "slower"
    return "faster" if "faster" in verdicts else "indistinguishable"


def mean_speedup(comparisons: Sequence[Comparison]) -> float:
    """Return the geometric mean of the speed-ups; 1 when there are none."""
    if not comparisons:
        return 1.0
    return math.exp(sum(math.log(max(c.speedup, 1e-12)) for c in comparisons) / len(comparisons))


def decide(untouched: str, candidates: Sequence[Candidate], gate: Gate, race: Race) -> Decision:
    """Apply rules 1 to 4.

    Args:
        untouched: Name in the race of the original, opened with one thread as it would be served: the last resort.
        candidates: All others; those without ``failure`` took part in the race.
        gate: The fidelity that is required.
        race: Latencies, all with the same number of threads.
    """
    rows = deciding_rows(race.rows)
    exact = {"cpu": untouched}
    verdicts: dict[str, Verdict] = {}
    speed: dict[str, tuple[Comparison, ...]] = {}
    for candidate in sorted(candidates, key=lambda c: not c.exact):
        name, baseline = candidate.name, exact.get(candidate.provider, untouched)
        speed[name] = () if candidate.failure else tuple(race.compare(name, baseline, r) for r in rows)
        verdicts[name] = judge(candidate, gate, speed[name])
        if candidate.exact and verdicts[name].kept:
            exact[candidate.provider] = name
    lossy = [c.name for c in candidates if not c.exact and verdicts[c.name].kept]
    fastest_first = sorted(lossy, key=lambda name: -_speedup(race, name, untouched, rows))
    # A GPU's exact form comes before the CPU's, which stays last: it opens everywhere.
    last = [name for provider, name in exact.items() if provider != "cpu"] + [exact["cpu"]]
    return Decision(verdicts, speed, (*fastest_first, *last))


def judge(candidate: Candidate, gate: Gate, speed: Sequence[Comparison]) -> Verdict:
    """Judge one candidate.

    Args:
        candidate: What is known of it.
        gate: The fidelity that is required.
        speed: Against the best exact form at the deciding batch sizes; an exact candidate against the untouched one.
    """
    if candidate.failure:
        return Verdict(False, candidate.failure)
    if candidate.fidelity is None:
        return Verdict(False, NO_DATA)
    refusal = _unfaithful(candidate.fidelity, gate)
    if refusal:
        return Verdict(False, refusal)
    seen = ", ".join(str(c) for c in speed)
    if candidate.exact:
        if speed_of(speed) == "slower":
            return Verdict(False, f"slower than the untouched model: {seen}")
        return Verdict(True, f"exact; {seen} against the untouched model")
    if speed_of(speed) != "faster":
        return Verdict(False, f"not faster than exact FP32: {seen}")
    gain = mean_speedup(speed)
    if gain < LEAST_GAIN:
        return Verdict(False, f"not faster enough than exact FP32: {gain:.2f}x on average < {LEAST_GAIN}x; {seen}")
    return Verdict(True, f"faithful, and faster than exact FP32: {seen}")


def choose_threads(variant: str, cores: int, comparisons: Sequence[Comparison]) -> ThreadChoice:
    """Apply rule 5.

    Args:
        variant: The variant's name, for the record.
        cores: Usable cores, the alternative to one thread.
        comparisons: The variant with ``cores`` threads against itself with one thread, at the deciding batch sizes.
    """
    if not comparisons:
        return ThreadChoice(variant, 1, "one usable core" if cores == 1 else "more threads were not measured")
    speed, cost = speed_of(comparisons), max(c.cpu_ratio for c in comparisons)
    listed = ", ".join(str(c) for c in comparisons)
    seen = f"{cores} threads are {listed} for {cost:.2f}x of the CPU time per row"
    if speed != "faster":
        return ThreadChoice(variant, 1, f"1 thread: {seen}, {speed}")
    if cost > MAX_CPU_RATIO:
        return ThreadChoice(variant, 1, f"1 thread: {seen}, more than {MAX_CPU_RATIO}x")
    return ThreadChoice(variant, cores, f"{cores} threads: {seen}, within {MAX_CPU_RATIO}x")


def _unfaithful(fidelity: Fidelity, gate: Gate) -> str:
    if fidelity.agreement < gate.min_agreement:
        return (
            f"agreement {fidelity.agreement:.3f} < {gate.min_agreement:g} "
            f"(n={fidelity.samples}, 95 % lower bound {fidelity.agreement_low:.3f})"
        )
    if fidelity.accuracy is not None and fidelity.accuracy_original is not None:
        drop = fidelity.accuracy_original - fidelity.accuracy
        if drop > gate.max_accuracy_drop + 1e-12:
            return (
                f"accuracy {fidelity.accuracy:.3f} is {drop:.3f} below the original's "
                f"{fidelity.accuracy_original:.3f}; allowed is {gate.max_accuracy_drop:g} (n={fidelity.samples})"
            )
    return ""


def _speedup(race: Race, name: str, baseline: str, rows: Sequence[int]) -> float:
    return mean_speedup([race.compare(name, baseline, r) for r in rows])
