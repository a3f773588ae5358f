"""The trial of the candidates: open them, compare them with the original, race them, choose what is served.

Two races. In the first, every candidate that opened runs one thread, beside the original with onnxruntime's defaults;
it decides what is served. In the second, the served variants run with one thread and with all cores, again beside the
original; it decides the threads, and its numbers go into the manifest.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec

from optimizers.building import Built
from optimizers.errors import PassFailed
from optimizers.evidence import HeldOut, fidelity_of, join
from optimizers.fidelity import describe
from optimizers.measurement import Comparison, Race, RacePlan, race
from optimizers.report import ORIGINAL, CandidateRecord, ServedRecord, Speed
from optimizers.search import Candidate, Decision, Gate, ThreadChoice, Verdict, choose_threads, decide, deciding_rows
from server.artifact import Batching, Fidelity, LatencyTable, SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Tensors

UNTOUCHED = "original-1thread"
FALLBACK = "fp32"
DEFAULTS = SessionOptions(intra_op_threads=0, spinning=True, graph_level="all")
"""How a user opens a model who sets nothing."""

Observe = Callable[[str, float], None]
"""Called with the current stage and the share of the trial that is done, 0 to 1."""


class TrialPlan(msgspec.Struct, frozen=True):
    """What the trial needs beside the candidates.

    Attributes:
        source: The user's own file, opened with defaults as the baseline.
        gate: The fidelity that is required.
        batch_rows: Batch sizes to measure.
        cores: Usable cores.
        budget_s: Seconds for both races.
        seed: Seed of the order of runs.
    """

    source: Path
    gate: Gate
    batch_rows: tuple[int, ...]
    cores: int
    budget_s: float
    seed: int


class Chosen(msgspec.Struct, frozen=True):
    """A variant that will be served, with its evidence."""

    name: str
    built: Built
    options: SessionOptions
    fidelity: Fidelity | None
    latency: LatencyTable


class Outcome(msgspec.Struct, frozen=True):
    """The result of a trial; ``chosen`` is in order of preference."""

    candidates: tuple[CandidateRecord, ...]
    chosen: tuple[Chosen, ...]
    served: tuple[ServedRecord, ...]
    threads: tuple[ThreadChoice, ...]


class _Field(msgspec.Struct):
    """Who takes part: what was built, what is open, what was found out so far."""

    built: dict[str, Built]
    sessions: dict[str, Session]
    failures: dict[str, str]
    fidelity: dict[str, Fidelity]
    batches: dict[int, Tensors]


def run_trial(
    built: Sequence[Built], held_out: HeldOut, batching: Batching, plan: TrialPlan, observe: Observe
) -> Outcome:
    """Compare and measure all candidates, and choose.

    Args:
        built: The candidates, also those that no pass could build; the first one is the untouched original, named
            ``UNTOUCHED``, as a file that can be copied.
        held_out: Samples with the original's answers.
        batching: Whether batches are proven; batches are measured only then.
        plan: Gates, batch sizes, budget.
        observe: Told about progress.

    Raises:
        StartupError: If the original itself does not open.
        InferenceFailed: If the original itself fails.
    """
    rows = batching.max_rows if batching.batchable else 1
    sizes = sorted({1, *(r for r in plan.batch_rows if r <= rows)})
    batches = {size: _batch(held_out.singles, size) for size in sizes}
    with ExitStack() as stack:
        field = _Field({b.name: b for b in built}, {}, {b.name: b.failure for b in built if b.failure}, {}, batches)
        field.sessions[ORIGINAL] = stack.enter_context(closing(Session(plan.source, Device("cpu"), DEFAULTS)))
        _open(field, stack)
        _compare(field, held_out, rows, plan.cores, observe)
        first = _race(
            field, field.sessions, plan.budget_s * 2 / 3, plan.seed, lambda s: observe("latency race", 0.5 + 0.3 * s)
        )
        decision = decide(
            UNTOUCHED, [_candidate(field, name) for name in field.built if name != UNTOUCHED], plan.gate, first
        )
        served, threads, chosen = _tune(field, decision.kept, plan, stack, observe)
    return Outcome(_records(field, decision, first), chosen, served, threads)


def headline(outcome: Outcome) -> str:
    """Say in one sentence what is served, and how fast and faithful it is."""
    best = outcome.chosen[0]
    speeds = next(record.against_original for record in outcome.served if record.chosen and record.variant == best.name)
    seen = " and ".join(f"{s.speedup:.2f}x ({s.low:.2f}-{s.high:.2f}) at batch {s.rows}" for s in speeds)
    text = f"{best.name} is served: {seen} the speed of the original with onnxruntime's defaults"
    if best.fidelity is None:
        return f"{text}; no candidate was both faithful and faster."
    return f"{text}; {describe(best.fidelity)}."


def served_name(name: str) -> str:
    """Return the name under which a candidate is served: the untouched original serves as ``fp32``."""
    return FALLBACK if name == UNTOUCHED else name


def _batch(singles: Sequence[Tensors], rows: int) -> Tensors:
    return singles[0] if rows == 1 else join([singles[i % len(singles)] for i in range(rows)])


def _session(built: Built, threads: int) -> Session:
    options = msgspec.structs.replace(built.options, intra_op_threads=threads)
    return Session(built.model, Device(built.provider), options)


def _open(field: _Field, stack: ExitStack) -> None:
    """Open every candidate and run the largest batch once, so that no failure can end the race."""
    for name, built in field.built.items():
        if name in field.failures:
            continue
        try:
            session = stack.enter_context(closing(_session(built, 1)))
            for batch in field.batches.values():
                session.run(batch)
            field.sessions[name] = session
        except SlipstreamError as exc:
            if name == UNTOUCHED:
                raise
            field.failures[name] = f"does not run: {exc}"


def _compare(field: _Field, held_out: HeldOut, rows: int, workers: int, observe: Observe) -> None:
    names = [name for name in field.sessions if name not in (ORIGINAL, UNTOUCHED)]
    for done, name in enumerate(names):
        observe(f"fidelity of {name}", 0.5 * done / len(names))
        try:
            field.fidelity[name] = fidelity_of(field.sessions[name], held_out, rows, workers)
        except (PassFailed, SlipstreamError) as exc:
            field.failures[name] = f"fails on held-out samples: {exc}"
            del field.sessions[name]


def _race(
    field: _Field, sessions: Mapping[str, Session], budget_s: float, seed: int, progress: Callable[[float], None]
) -> Race:
    return race(sessions, field.batches, frozenset({ORIGINAL}), RacePlan(budget_s=budget_s, seed=seed), progress)


def _candidate(field: _Field, name: str) -> Candidate:
    built = field.built[name]
    return Candidate(name, built.provider, built.exact, field.failures.get(name, ""), field.fidelity.get(name))


def _tune(
    field: _Field, kept: Sequence[str], plan: TrialPlan, stack: ExitStack, observe: Observe
) -> tuple[tuple[ServedRecord, ...], tuple[ThreadChoice, ...], tuple[Chosen, ...]]:
    """Run the second race and choose the threads of each served variant."""
    entrants = {(name, 1): field.sessions[name] for name in kept}
    if plan.cores > 1:
        for name in kept:
            if field.built[name].provider == "cpu":
                entrants[name, plan.cores] = stack.enter_context(closing(_session(field.built[name], plan.cores)))
    sessions = {ORIGINAL: field.sessions[ORIGINAL], **{_label(*key): session for key, session in entrants.items()}}
    second = _race(
        field, sessions, plan.budget_s / 3, plan.seed + 1, lambda s: observe("race of thread counts", 0.8 + 0.2 * s)
    )
    served = [_served(second, (ORIGINAL, 0), ORIGINAL, chosen=True)]
    choices, chosen = [], []
    for name in kept:
        many = (name, plan.cores)
        alternative = plan.cores > 1 and many in entrants
        pairs = _against(second, _label(*many), _label(name, 1)) if alternative else ()
        choice = choose_threads(served_name(name), plan.cores, pairs)
        choices.append(choice)
        served += [
            _served(second, key, _label(*key), chosen=key[1] == choice.threads) for key in entrants if key[0] == name
        ]
        options = msgspec.structs.replace(field.built[name].options, intra_op_threads=choice.threads)
        table = second.table(_label(name, choice.threads))
        chosen.append(Chosen(served_name(name), field.built[name], options, field.fidelity.get(name), table))
    return tuple(served), tuple(choices), tuple(chosen)


def _label(name: str, threads: int) -> str:
    return f"{name}, {threads} threads"


def _against(race_: Race, name: str, baseline: str) -> tuple[Comparison, ...]:
    return tuple(race_.compare(name, baseline, rows) for rows in deciding_rows(race_.rows))


def _speeds(race_: Race, name: str, baseline: str) -> tuple[Speed, ...]:
    return tuple(Speed.of(comparison) for comparison in _against(race_, name, baseline))


def _served(race_: Race, key: tuple[str, int], label: str, *, chosen: bool) -> ServedRecord:
    name, threads = key
    speeds = () if name == ORIGINAL else _speeds(race_, label, ORIGINAL)
    return ServedRecord(served_name(name), threads, chosen, race_.table(label), race_.cpu_ms(label), speeds)


def _records(field: _Field, decision: Decision, first: Race) -> tuple[CandidateRecord, ...]:
    """Describe every candidate for the report, the baselines first."""
    user = field.built[UNTOUCHED]
    records = [
        CandidateRecord(
            name=ORIGINAL,
            precision=user.precision,
            provider=user.provider,
            threads=0,
            verdict="baseline",
            reason="the file as onnxruntime opens it by default: what a user has today",
            size_bytes=user.size_bytes,
            latency=first.table(ORIGINAL),
            cpu_ms=first.cpu_ms(ORIGINAL),
        )
    ]
    return (*records, *(_record(field, decision, first, name) for name in field.built))


def _record(field: _Field, decision: Decision, first: Race, name: str) -> CandidateRecord:
    built, ran = field.built[name], name not in field.failures
    kept = name in decision.kept
    if name == UNTOUCHED:
        reason = "the file as the server opens it: one thread, which does not spin"
        verdict = Verdict(kept, f"{reason}; served as {FALLBACK}" if kept else reason)
    else:
        verdict = decision.verdicts[name]
    return CandidateRecord(
        name=name,
        precision=built.precision,
        provider=built.provider,
        threads=1,
        verdict="served" if kept else "baseline" if name == UNTOUCHED else "refused",
        reason=verdict.reason,
        size_bytes=built.size_bytes,
        fidelity=field.fidelity.get(name),
        latency=first.table(name) if ran else None,
        cpu_ms=first.cpu_ms(name) if ran else (),
        against_original=_speeds(first, name, ORIGINAL) if ran else (),
        against_exact=tuple(Speed.of(c) for c in decision.speed.get(name, ())),
    )
