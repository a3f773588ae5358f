"""Gate and choice: what is served, in which order, how sessions are set. Pure; every refusal says why.

The rules, in order:

1. A candidate that a pass could not build, or that did not open, is refused with that reason.
2. Fidelity. The agreement measured on held-out samples must reach ``min_agreement`` (the point estimate; its 95 % lower
   bound is reported beside it), and the task metric, when there is one, may drop by ``max_accuracy_drop``.
3. Gain. A lossy candidate must be better than the best exact form by ``LEAST_GAIN`` in the objective: less is no
   reason to give up exactness, and changes from run to run. For ``latency`` and ``throughput`` it must also be *faster*
   with the same number of threads (so that a change of the thread count is not mistaken for an optimization): faster at
   one of ``DECIDING_ROWS``, slower at none, each time by an interval that excludes 1. With a wanted p99, one row must
   keep it.
4. The served variants: the best by the objective first, then at most one other lossy one that no other dominates, then
   the exact forms: the fastest, and last a portable one, which opens everywhere.
5. Session. A served variant is opened otherwise than with one thread that does not spin when that is faster by rule 3.
   For ``latency`` the fastest setting is taken, whatever it costs. For the other objectives it may cost at most
   ``MAX_CPU_RATIO`` of the CPU time per row: beyond that, the same cores answer more requests with one thread each.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from optimizers.measurement import Comparison, Race
from optimizers.measurement import Verdict as Speed
from optimizers.pareto import Policy, Standing, gain, pareto
from optimizers.recipe import Objective
from server.artifact import Fidelity

DECIDING_ROWS = (1, 8)
LEAST_GAIN = 1.1
MAX_CPU_RATIO = 1.25
MOST_LOSSY = 2
NO_DATA = "no data: nothing can be proven; give --calibration DATA.npz"


class Gate(msgspec.Struct, frozen=True):
    """The fidelity that a served variant must have.

    Attributes:
        min_agreement: Least share of held-out samples with the original's decision, 0 to 1.
        max_accuracy_drop: Largest loss of task accuracy, or of the evaluator's metric, against the original, 0 to 1.
    """

    min_agreement: float = 0.99
    max_accuracy_drop: float = 0.01


class Candidate(msgspec.Struct, frozen=True):
    """What is known of one candidate when it is judged.

    Attributes:
        name: Its name in the race.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        exact: Whether its passes keep the arithmetic (FP32); exact candidates need not be faster.
        host_bound: Whether it opens on this kind of CPU only.
        failure: Why it cannot be judged at all; empty when it can.
        fidelity: Evidence against the original; the untouched original needs none.
        standing: Where it stands; ``None`` when it was not raced.
    """

    name: str
    provider: str = "cpu"
    exact: bool = False
    host_bound: bool = False
    failure: str = ""
    fidelity: Fidelity | None = None
    standing: Standing | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Whether a candidate is served, and why.

    Attributes:
        kept: Whether it is.
        reason: Why, or why not.
        proven: Whether it could be: it passes every gate.
    """

    kept: bool
    reason: str
    proven: bool = False


class Decision(msgspec.Struct, frozen=True):
    """What is served.

    Attributes:
        verdicts: Verdict of each candidate.
        speed: Each candidate against the exact form that it had to beat, at the deciding batch sizes.
        kept: Names of the served candidates in order of preference.
        pareto: Names of the faithful candidates that no other one dominates.
        policy: The rule that chose, in words.
    """

    verdicts: dict[str, Verdict]
    speed: dict[str, tuple[Comparison, ...]]
    kept: tuple[str, ...]
    pareto: tuple[str, ...] = ()
    policy: str = ""


class Knobs(msgspec.Struct, frozen=True):
    """How a session is set.

    Attributes:
        threads: Of one session.
        spinning: Whether its idle threads spin.
        graph_level: onnxruntime's graph optimization level.
    """

    threads: int = 1
    spinning: bool = False
    graph_level: str = "all"

    def __str__(self) -> str:
        text = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        text += ", spinning" if self.spinning else ""
        return text if self.graph_level == "all" else f"{text}, graph level {self.graph_level}"


class KnobChoice(msgspec.Struct, frozen=True):
    """How a variant's session is set, and why."""

    variant: str
    knobs: Knobs
    reason: str


def deciding_rows(measured: Sequence[int]) -> tuple[int, ...]:
    """Return the batch sizes that decide, among those measured; the smallest one when none of them was."""
    return tuple(rows for rows in DECIDING_ROWS if rows in measured) or (min(measured),)


def racing_rows(measured: Sequence[int]) -> tuple[int, ...]:
    """Return the deciding batch sizes and the largest one, at which a variant for large batches shows its gain."""
    return tuple(sorted({*deciding_rows(measured), max(measured)}))


def deciding(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Return those at the deciding batch sizes."""
    rows = deciding_rows([c.rows for c in comparisons]) if comparisons else ()
    return tuple(c for c in comparisons if c.rows in rows)


def best_speedup(comparisons: Sequence[Comparison]) -> float:
    """Return the mean speed-up at the deciding batch sizes, or that at the largest one if it is more."""
    largest = max(comparisons, key=lambda c: c.rows, default=None)
    return max(mean_speedup(deciding(comparisons)), largest.speedup if largest is not None else 0.0)


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


def decide(
    untouched: Candidate, candidates: Sequence[Candidate], gate: Gate, race: Race, policy: Policy | None = None
) -> Decision:
    """Apply rules 1 to 4.

    Args:
        untouched: The original, opened with one thread as it would be served: the last resort.
        candidates: All others; those without ``failure`` took part in the race.
        gate: The fidelity that is required.
        race: Latencies, all with the same number of threads.
        policy: What is wanted.
    """
    policy = policy or Policy()
    rows = deciding_rows(race.rows)
    exact = {"cpu": untouched}
    portable = untouched
    verdicts: dict[str, Verdict] = {}
    speed: dict[str, tuple[Comparison, ...]] = {}
    # Portable exact forms first, since a build for this CPU must beat them; then what must beat all exact forms.
    for candidate in sorted(candidates, key=lambda c: (not c.exact, c.host_bound)):
        baseline = exact.get(candidate.provider, untouched)
        against = () if candidate.failure else tuple(race.compare(candidate.name, baseline.name, r) for r in rows)
        speed[candidate.name] = against
        verdicts[candidate.name] = judge(candidate, gate, against, policy, baseline)
        if candidate.exact and verdicts[candidate.name].kept:
            exact[candidate.provider] = candidate
            portable = candidate if candidate.provider == "cpu" and not candidate.host_bound else portable
    kept = [c for c in candidates if not c.exact and verdicts[c.name].kept]
    gains = {c.name: _gain(c, exact.get(c.provider, untouched), speed[c.name], policy) for c in kept}
    lossy = _served(sorted(kept, key=lambda c: -gains[c.name]), verdicts)
    # A GPU's exact form comes before the CPU's; the portable one stays last: it opens everywhere.
    last = [c.name for provider, c in exact.items() if provider != "cpu"] + [exact["cpu"].name, portable.name]
    faithful = [c.standing for c in (untouched, *kept, *exact.values()) if c.standing is not None]
    return Decision(
        verdicts, speed, tuple(dict.fromkeys([*lossy, *last])), tuple(dict.fromkeys(pareto(faithful))), in_words(policy)
    )


def judge(
    candidate: Candidate,
    gate: Gate,
    speed: Sequence[Comparison],
    policy: Policy | None = None,
    baseline: Candidate | None = None,
) -> Verdict:
    """Judge one candidate.

    Args:
        candidate: What is known of it.
        gate: The fidelity that is required.
        speed: Against the best exact form at the deciding batch sizes; an exact candidate against the one before.
        policy: What is wanted.
        baseline: The best exact form.
    """
    policy = policy or Policy()
    if candidate.failure:
        return Verdict(False, candidate.failure)
    if candidate.fidelity is None:
        return Verdict(False, NO_DATA)
    refusal = unfaithful(candidate.fidelity, gate)
    if refusal:
        return Verdict(False, refusal)
    seen = ", ".join(str(c) for c in speed)
    if candidate.exact:
        return _judge_exact(candidate, speed, seen)
    refusal = _too_late(candidate, policy)
    if refusal:
        return Verdict(False, refusal)
    if policy.objective in ("latency", "throughput") and speed_of(speed) != "faster":
        return Verdict(False, f"not faster than exact FP32: {seen}")
    gained = _gain(candidate, baseline, speed, policy)
    if gained < LEAST_GAIN:
        much = f"{gained:.2f}x on average < {LEAST_GAIN}x"
        word = "faster" if policy.objective == "latency" else f"better in {policy.objective}"
        return Verdict(False, f"not {word} enough than exact FP32: {much}; {seen}")
    word = "faster" if policy.objective == "latency" else f"{gained:.2f}x better in {policy.objective}"
    return Verdict(True, f"faithful, and {word} than exact FP32: {seen}", proven=True)


def choose_knobs(
    variant: str, plain: Knobs, alternatives: Mapping[Knobs, Sequence[Comparison]], objective: Objective = "throughput"
) -> KnobChoice:
    """Apply rule 5.

    Args:
        variant: The variant's name, for the record.
        plain: The setting of the races: one thread that does not spin.
        alternatives: Other settings -> the variant so set against itself with the plain ones, at the deciding sizes.
        objective: What is wanted.
    """
    if not alternatives:
        return KnobChoice(variant, plain, f"{plain}: nothing else was measured")
    most = math.inf if objective == "latency" else MAX_CPU_RATIO
    reasons, best = [], (1.0, plain)
    for knobs, comparisons in alternatives.items():
        speed, cost = speed_of(comparisons), max(c.cpu_ratio for c in comparisons)
        seen = f"{knobs}: {', '.join(str(c) for c in comparisons)} for {cost:.2f}x of the CPU time per row"
        if speed != "faster":
            reasons.append(f"{seen}, {speed}")
        elif cost > most:
            reasons.append(f"{seen}, more than {most}x")
        else:
            reasons.append(seen)
            best = max(best, (mean_speedup(comparisons), knobs), key=lambda pair: pair[0])
    return KnobChoice(variant, best[1], f"{best[1]} chosen; " + "; ".join(reasons))


def unfaithful(fidelity: Fidelity, gate: Gate) -> str:
    """Return why a candidate's evidence does not pass the gate, or nothing when it does."""
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


def in_words(policy: Policy) -> str:
    """Return the rule of the choice as one sentence."""
    most = {
        "latency": "the fastest",
        "throughput": "the one with the most rows per second",
        "memory": "the one that takes the least memory",
        "size": "the smallest",
    }[policy.objective]
    limit = f" whose p99 at one row is at most {policy.slo_ms:g} ms" if policy.slo_ms is not None else ""
    return f"{most} of the faithful candidates{limit}, if it beats the best exact form by {LEAST_GAIN}x; else that form"


def _judge_exact(candidate: Candidate, speed: Sequence[Comparison], seen: str) -> Verdict:
    if speed_of(speed) == "slower":
        return Verdict(False, f"slower than the best exact form so far: {seen}")
    if candidate.host_bound and (speed_of(speed) != "faster" or mean_speedup(speed) < 1 / 0.95):
        return Verdict(False, f"a build for this CPU only, not 5 % faster than the portable form: {seen}")
    return Verdict(True, f"exact; {seen} against the best exact form before it")


def _too_late(candidate: Candidate, policy: Policy) -> str:
    standing = candidate.standing
    if standing is None or policy.slo_ms is None or standing.p99_ms <= policy.slo_ms:
        return ""
    return f"p99 of one row is {standing.p99_ms:.2f} ms; wanted are {policy.slo_ms:g} ms"


def _gain(candidate: Candidate, baseline: Candidate | None, speed: Sequence[Comparison], policy: Policy) -> float:
    if candidate.standing is None or baseline is None or baseline.standing is None:
        return mean_speedup(speed)
    return gain(candidate.standing, baseline.standing, policy.objective, mean_speedup(speed))


def _served(best_first: Sequence[Candidate], verdicts: dict[str, Verdict]) -> list[str]:
    """Return the first one and those that it leaves a reason for; say in their verdicts why others are not served."""
    standings = [c.standing for c in best_first if c.standing is not None]
    worthy = set(pareto(standings)) if len(standings) == len(best_first) else {c.name for c in best_first}
    served: list[str] = []
    for candidate in best_first:
        if not served or (candidate.name in worthy and len(served) < MOST_LOSSY):
            served.append(candidate.name)
            continue
        why = "others serve already" if candidate.name in worthy else "another one is at least as good in everything"
        verdicts[candidate.name] = Verdict(False, f"{why}; {verdicts[candidate.name].reason}", proven=True)
    return served
