"""The trial of the candidates: compare them with the original on held-out samples, race them, choose what is served.

Three races, all beside the original with onnxruntime's defaults. In the first, a short one, lossy candidates that are
slower than the best exact form leave. The others are compared on the held-out samples, which takes longest. In the
second, all that are faithful run one thread at every batch size; it decides what is served.
In the third, the served variants try other session settings; the numbers of the setting that they are served with go
into the manifest. A candidate that loses for one row and wins for many may be served for large batches, see ``bulk``.
"""

from collections.abc import Callable, Sequence

import msgspec

from optimizers.building import Built
from optimizers.bulk import Bulk, find_bulk, gains_from, promises_bulk, with_bulk
from optimizers.errors import PassFailed
from optimizers.exact import FUSED
from optimizers.exam import Exam
from optimizers.explore import Appraisal
from optimizers.fidelity import describe
from optimizers.measurement import Comparison, Race, RacePlan
from optimizers.memory import session_memory
from optimizers.pareto import Policy, Standing, standing_of
from optimizers.racing import Track, with_knobs
from optimizers.records import ORIGINAL, UNTOUCHED, CandidateRecord, ServedRecord, Speed
from optimizers.search import (
    Candidate,
    Decision,
    Gate,
    KnobChoice,
    Knobs,
    Verdict,
    choose_knobs,
    decide,
    deciding,
    deciding_rows,
    racing_rows,
    speed_of,
    unfaithful,
)
from optimizers.tuning import LEAST_SPINNING_MS, Tried, alternatives, open_alternatives
from server.artifact import Fidelity, LatencyTable, SessionOptions
from server.errors import SlipstreamError
from server.providers import Device

FALLBACK = "fp32"

Measured = tuple[Race, str]
"""A race and a label in it."""

Observe = Callable[[str, float], None]
"""Called with the current stage and the share of the trial that is done, 0 to 1."""


class TrialPlan(msgspec.Struct, frozen=True):
    """What the trial needs beside the candidates.

    Attributes:
        gate: The fidelity that is required.
        policy: What is wanted of the faithful ones.
        cores: Usable cores.
        budget_s: Seconds for the races.
        seed: Seed of the order of runs.
    """

    gate: Gate
    policy: Policy
    cores: int
    budget_s: float
    seed: int


class Chosen(msgspec.Struct, frozen=True):
    """A variant that will be served, with its evidence; ``from_rows`` as in ``server.artifact.Variant``."""

    name: str
    built: Built
    options: SessionOptions
    fidelity: Fidelity | None
    latency: LatencyTable
    from_rows: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """The result of a trial; ``chosen`` is in order of preference."""

    candidates: tuple[CandidateRecord, ...]
    chosen: tuple[Chosen, ...]
    served: tuple[ServedRecord, ...]
    knobs: tuple[KnobChoice, ...]
    policy: str


class Trial:
    """One trial; ``run`` is the order of its stages.

    Args:
        untouched: The original as a file that can be copied.
        appraised: The candidates with their cheap evidence, also those that are out.
        exam: The held-out samples.
        track: Where sessions are open.
        plan: Gates, policy, budget.
        observe: Told about progress.
    """

    def __init__(
        self,
        untouched: Built,
        appraised: Sequence[Appraisal],
        exam: Exam,
        track: Track,
        plan: TrialPlan,
        observe: Observe,
    ) -> None:
        self._built = {untouched.name: untouched} | {a.built.name: a.built for a in appraised}
        self._search = {a.built.name: a.fidelity for a in appraised}
        self._failures = {a.built.name: a.failure for a in appraised if a.failure}
        self._exam, self._track, self._plan, self._observe = exam, track, plan, observe
        self._fidelity: dict[str, Fidelity] = {}
        self._memory: dict[str, int | None] = {}
        self._first: Race | None = None

    def run(self) -> Outcome:
        """Compare, race and choose.

        Raises:
            StartupError: If the original itself does not open.
            InferenceFailed: If the original itself fails.
        """
        self._open()
        self._qualify()
        self._compare()
        race = self._race_all()
        decision = self._decide(race)
        bulk = self._find_bulk(decision, race)
        choices, final = self._tune(decision.kept, bulk, race)
        bulk = _confirmed(bulk, decision.kept[0], choices, final)
        decision = with_bulk(decision, bulk) if bulk is not None else decision
        from_rows = {bulk.name: bulk.from_rows} if bulk is not None else {}
        chosen = tuple(
            self._chosen(name, choices[name].knobs, final[name], from_rows.get(name, 0)) for name in decision.kept
        )
        served = [self._served(ORIGINAL, "onnxruntime's defaults", race, ORIGINAL)]
        served += [self._served(name, str(choices[name].knobs), *final[name]) for name in decision.kept]
        records = self._records(decision, race)
        return Outcome(records, chosen, tuple(served), tuple(choices[name] for name in decision.kept), decision.policy)

    @property
    def _alive(self) -> list[str]:
        return [name for name in self._built if name not in self._failures]

    def _open(self) -> None:
        for name in self._alive:
            try:
                self._track.enter(self._built[name])
            except SlipstreamError as exc:
                if name == UNTOUCHED:
                    raise
                self._failures[name] = f"does not run: {exc}"

    def _qualify(self) -> None:
        """Let lossy candidates leave that are slower than the best exact form, unless speed is not what is wanted."""
        rows = racing_rows(tuple(self._track.batches))
        names = self._alive
        self._first = self._race([ORIGINAL, *names], rows, 0.25, "first race", 0.0)
        if self._plan.policy.objective not in ("latency", "throughput"):
            return
        for name in names:
            against = self._against_exact(name)
            is_slower = speed_of(deciding(against)) == "slower" and not promises_bulk(against)
            if not self._built[name].exact and is_slower:
                self._failures[name] = f"slower than exact FP32: {', '.join(str(c) for c in against)}"

    def _against_exact(self, name: str) -> tuple[Comparison, ...]:
        """Compare a candidate with the fastest exact form of the first race."""
        first = self._first
        if first is None:
            return ()
        rows = first.rows
        exact = [other for other in self._alive if self._built[other].exact and other != name]
        best = min(exact or [UNTOUCHED], key=lambda other: sum(_ms(first, other, r) for r in rows))
        return _against(first, name, best, rows)

    def _compare(self) -> None:
        """Compare with the original on the held-out samples; who is not faithful needs no further race."""
        names = [name for name in self._alive if name != UNTOUCHED]
        for done, name in enumerate(names):
            self._observe(f"fidelity of {name}", 0.15 + 0.4 * done / len(names))
            try:
                self._fidelity[name] = self._exam.fidelity(self._built[name], self._track.session(name))
            except (PassFailed, SlipstreamError) as exc:
                self._failures[name] = f"fails on held-out samples: {exc}"
                continue
            refusal = unfaithful(self._fidelity[name], self._plan.gate)
            if refusal:
                seen = ", ".join(str(c) for c in self._against_exact(name))
                self._failures[name] = f"{refusal}; {seen} of exact FP32"

    def _race_all(self) -> Race:
        return self._race([ORIGINAL, *self._alive], tuple(self._track.batches), 0.4, "latency race", 0.55)

    def _race(self, labels: Sequence[str], rows: Sequence[int], share: float, stage: str, start: float) -> Race:
        plan = RacePlan(budget_s=self._plan.budget_s * share, seed=self._plan.seed)
        self._observe(stage, start)
        return self._track.race(labels, rows, plan, lambda done: self._observe(stage, start + 0.15 * done))

    def _decide(self, race: Race) -> Decision:
        for name in self._alive:
            built = self._built[name]
            rows = deciding_rows(race.rows)[-1]
            options = msgspec.structs.replace(built.options, intra_op_threads=1)
            self._memory[name] = session_memory(built.model, Device(built.provider), options, self._track.batches[rows])
        candidates = [self._candidate(name, race) for name in self._built if name != UNTOUCHED]
        return decide(self._candidate(UNTOUCHED, race), candidates, self._plan.gate, race, self._plan.policy)

    def _candidate(self, name: str, race: Race) -> Candidate:
        built = self._built[name]
        return Candidate(
            name,
            built.provider,
            built.exact,
            built.host_bound,
            self._failures.get(name, ""),
            self._fidelity.get(name),
            self._standing(name, race),
        )

    def _standing(self, name: str, race: Race) -> Standing | None:
        if name in self._failures:
            return None
        fidelity = self._fidelity.get(name)
        agreement = fidelity.agreement if fidelity is not None else 1.0
        size = self._built[name].size_bytes
        return standing_of(name, race.table(name), size, agreement, self._memory.get(name), self._plan.policy.slo_ms)

    def _find_bulk(self, decision: Decision, race: Race) -> Bulk | None:
        first, *others = (self._candidate(n, race) for n in (decision.kept[0], *self._built))
        return find_bulk(first, others, self._plan.gate, race, self._plan.policy)

    def _tune(
        self, kept: Sequence[str], bulk: Bulk | None, race: Race
    ) -> tuple[dict[str, KnobChoice], dict[str, Measured]]:
        """Try other session settings for each served variant; return its choice, and where it was measured."""
        names = list(dict.fromkeys([*kept, bulk.name] if bulk is not None else kept))
        for name in self._built.keys() - set(names):
            self._track.leave(self._built[name])
        tried: dict[str, Tried] = {}
        for name in names:
            built, row_ms = self._built[name], race.table(name).p50_ms[0]
            may_spin = row_ms >= LEAST_SPINNING_MS and not (bulk is not None and name == bulk.name)
            settings = alternatives(built, self._plan.cores, may_spin=may_spin)
            tried[name] = open_alternatives(self._track, built, settings, self._memory.get(name))
        labels = [*names, *(label for settings in tried.values() for label in settings.labels.values())]
        rows = deciding_rows(race.rows)
        second = self._race(labels, racing_rows(race.rows) if bulk else rows, 0.2, "race of session settings", 0.7)
        choices = {name: self._choose(name, tried[name], second, rows) for name in kept}
        if bulk is not None:
            large = [r for r in second.rows if r >= bulk.from_rows]
            choices[bulk.name] = self._choose(bulk.name, tried[bulk.name], second, large)
        return choices, self._final(choices, bulk, tried, race)

    def _choose(self, name: str, tried: Tried, second: Race, rows: Sequence[int]) -> KnobChoice:
        plain = Knobs(graph_level=self._built[name].options.graph_level)
        others = {knobs: _against(second, label, name, rows) for knobs, label in tried.labels.items()}
        return tried.noted(choose_knobs(served_name(name), plain, others, self._plan.policy.objective))

    def _final(
        self,
        choices: dict[str, KnobChoice],
        bulk: Bulk | None,
        tried: dict[str, Tried],
        race: Race,
    ) -> dict[str, Measured]:
        """Measure the chosen settings at all batch sizes, where they are not the plain ones."""
        other = {n: tried[n].labels[c.knobs] for n, c in choices.items() if c.knobs in tried[n].labels}
        if not other:
            return {name: (race, name) for name in choices}
        if bulk is not None:  # it is compared with the first choice, so both belong into one race
            other = {name: name for name in (next(iter(choices)), bulk.name)} | other
        last = self._race([ORIGINAL, *other.values()], race.rows, 0.15, "race of the chosen settings", 0.85)
        return {name: (last, other[name]) if name in other else (race, name) for name in choices}

    def _chosen(self, name: str, knobs: Knobs, measured: Measured, from_rows: int) -> Chosen:
        built, (race, label) = self._built[name], measured
        options = with_knobs(built.options, knobs)
        return Chosen(served_name(name), built, options, self._fidelity.get(name), race.table(label), from_rows)

    def _served(self, name: str, knobs: str, race: Race, label: str) -> ServedRecord:
        speeds = () if name == ORIGINAL else _speeds(race, label, ORIGINAL)
        return ServedRecord(served_name(name), name, knobs, race.table(label), race.cpu_ms(label), speeds)

    def _records(self, decision: Decision, race: Race) -> tuple[CandidateRecord, ...]:
        """Describe every candidate for the report, the baselines first."""
        user = self._built[UNTOUCHED]
        original = CandidateRecord(
            name=ORIGINAL,
            precision=user.precision,
            provider=user.provider,
            threads=0,
            verdict="baseline",
            reason="the file as onnxruntime opens it by default: what a user has today",
            size_bytes=user.size_bytes,
            latency=race.table(ORIGINAL),
            cpu_ms=race.cpu_ms(ORIGINAL),
        )
        return (original, *(self._record(decision, race, name) for name in self._built))

    def _record(self, decision: Decision, race: Race, name: str) -> CandidateRecord:
        built, kept = self._built[name], name in decision.kept
        ran = next((r for r in (race, self._first) if r is not None and r.has(name)), None)
        if name == UNTOUCHED:
            reason = "the file as the server opens it: one thread, which does not spin"
            verdict = Verdict(kept, f"{reason}; served as {FALLBACK}" if kept else reason)
        else:
            verdict = decision.verdicts[name]
        word = "served" if kept else "baseline" if name == UNTOUCHED else "proven" if verdict.proven else "refused"
        return CandidateRecord(
            name=name,
            precision=built.precision,
            provider=built.provider,
            threads=1,
            verdict=word,
            reason=verdict.reason,
            size_bytes=built.size_bytes,
            fidelity=self._fidelity.get(name),
            latency=ran.table(name) if ran is not None else None,
            cpu_ms=ran.cpu_ms(name) if ran is not None else (),
            against_original=_speeds(ran, name, ORIGINAL) if ran is not None else (),
            against_exact=tuple(Speed.of(c) for c in decision.speed.get(name, ())),
            passes=built.passes,
            standing=self._standing(name, race),
            search_fidelity=self._search.get(name),
            placement=self._track.placement(built) if name in self._alive else {},
            pareto=name in decision.pareto,
            host_bound=built.host_bound,
        )


def headline(outcome: Outcome) -> str:
    """Say in one sentence what is served, and how fast and faithful it is."""
    best = outcome.chosen[0]
    speeds = next(record.against_original for record in outcome.served if record.variant == best.name)
    seen = " and ".join(f"{s.speedup:.2f}x ({s.low:.2f}-{s.high:.2f}) at batch {s.rows}" for s in speeds)
    text = f"{best.name} is served: {seen} the speed of the original with onnxruntime's defaults"
    bulk = [choice for choice in outcome.chosen if choice.from_rows]
    if not best.built.exact and best.fidelity is not None:
        text = f"{text}; {describe(best.fidelity)}"
    elif not bulk:
        text = f"{text}; no lossy candidate was both faithful and better"
    for other in bulk:
        proof = f"; {describe(other.fidelity)}" if other.fidelity is not None and not other.built.exact else ""
        text = f"{text}. Batches of {other.from_rows} rows and more are run by {other.name}{proof}"
    return f"{text}."


def served_name(name: str) -> str:
    """Return the name under which a candidate is served: the original, fused or untouched, serves as ``fp32``."""
    return FALLBACK if name == UNTOUCHED else name.replace(FUSED, FALLBACK, 1)


def _confirmed(
    bulk: Bulk | None, first: str, choices: dict[str, KnobChoice], final: dict[str, Measured]
) -> Bulk | None:
    """Return the variant for large batches as it is with the chosen settings, or ``None`` when it is none."""
    if bulk is None or choices[first].knobs.spinning:
        return None
    (race, label), (_, baseline) = final[bulk.name], final[first]
    again = gains_from(label, baseline, [r for r in race.rows if r >= bulk.from_rows], race)
    return msgspec.structs.replace(again, name=bulk.name) if again is not None else None


def _ms(race: Race, name: str, rows: int) -> float:
    table = race.table(name)
    return table.p50_ms[table.rows.index(rows)] / rows


def _against(race: Race, name: str, baseline: str, rows: Sequence[int]) -> tuple[Comparison, ...]:
    return tuple(race.compare(name, baseline, r) for r in rows)


def _speeds(race: Race, name: str, baseline: str) -> tuple[Speed, ...]:
    return tuple(Speed.of(c) for c in _against(race, name, baseline, deciding_rows(race.rows)))
