"""Finds the lossy candidates worth proving: cheap evidence first, repair only where it can pay.

Everything here is judged on the *search* part of the samples and by short races, and decides only what is tried next.
Verdicts come from the held-out part and from long races, see ``trial``. The stages:

1. Roots: each precision with its plain settings. Those that this host cannot profit from are left out with the reason.
   Each is built, compared on the search samples, and raced briefly against the best exact form.
2. Repair, for a quantization that is fast enough and not faithful enough: SmoothQuant, equalization, AdaRound, bias
   correction, each kept only if the error falls by more than chance (paired bootstrap).
3. Mixed precision, if it still is not faithful: layers are ranked by what quantizing each one alone costs, and as few
   as possible stay in float.
"""

import time
from collections.abc import Callable, Sequence

import msgspec

from optimizers.building import Built, Chain, Line
from optimizers.errors import PassFailed
from optimizers.exam import Exam
from optimizers.fidelity import improves, wilson
from optimizers.measurement import Comparison, RacePlan
from optimizers.mixing import Accept, mix
from optimizers.passes import Pass, PassContext
from optimizers.passes.catalog import label_of
from optimizers.racing import Track
from optimizers.records import StepRecord
from optimizers.roots import Root
from optimizers.search import LEAST_GAIN, Gate, best_speedup, racing_rows
from optimizers.sensitivity import LayerSensitivity
from server.artifact import Fidelity
from server.errors import SlipstreamError
from server.tensors import Tensors

Observe = Callable[[str, float], None]
"""Called with the current step and the share of the exploration that is done, 0 to 1."""

NO_SEARCH = "no proof possible: too few samples for a search part"
_RACE_S = 1.5
_LATE = "the time budget is spent"
_PROMISING = 0.97 * LEAST_GAIN
"""Short races are less sure than long ones."""


class Appraisal(msgspec.Struct, frozen=True):
    """A candidate with cheap evidence.

    Attributes:
        built: The candidate.
        fidelity: On the search samples; ``None`` when it could not be compared.
        speed: Against the best exact form, from a short race.
        answers: Its outputs on the search samples.
        failure: Why it is out; empty while it is not.
    """

    built: Built
    fidelity: Fidelity | None = None
    speed: tuple[Comparison, ...] = ()
    answers: Tensors = {}
    failure: str = ""

    @property
    def speedup(self) -> float:
        """Its speed-up where it has the most: for small batches, or for the largest."""
        return best_speedup(self.speed)


class Quest(msgspec.Struct, frozen=True):
    """What is looked for.

    Attributes:
        base: The exact chain that every lossy one continues.
        baseline: The best exact form.
        gate: The fidelity that is required.
        wants_speed: Whether a candidate must be faster; not so for the objectives ``memory`` and ``size``.
        end_s: When to start nothing more, by ``time.monotonic``.
        seed: Of the races.
    """

    base: Chain
    baseline: Built
    gate: Gate
    wants_speed: bool
    end_s: float
    seed: int


class Found(msgspec.Struct, frozen=True):
    """What the exploration leaves.

    Attributes:
        appraised: Every candidate that was built or tried, in the order of the roots; ``failure`` tells which are out.
        steps: The path: what was tried and why it was kept or dropped.
        sensitivity: Name of a candidate -> its layers, the most sensitive first.
    """

    appraised: tuple[Appraisal, ...]
    steps: tuple[StepRecord, ...]
    sensitivity: dict[str, tuple[LayerSensitivity, ...]]


class Explorer:
    """Explores the lossy candidates of one model.

    Args:
        line: Builds chains.
        exam: The search samples.
        track: For short races.
        context: Calibration data, for the ranges of mixed precision.
        quest: What is looked for.
        observe: Told the current step and the share done.
    """

    def __init__(
        self, line: Line, exam: Exam, track: Track, context: PassContext, quest: Quest, observe: Observe
    ) -> None:
        self._line, self._exam, self._track, self._context = line, exam, track, context
        self._quest, self._observe = quest, observe
        self._accept = Accept(quest.gate)
        self._steps: list[StepRecord] = []
        self._sensitivity: dict[str, tuple[LayerSensitivity, ...]] = {}

    def run(self, roots: Sequence[Root]) -> Found:
        """Explore from these roots, which come in the order in which they should be tried."""
        appraised: list[Appraisal] = []
        families = list(dict.fromkeys(root.family for root in roots))
        for number, family in enumerate(families):
            members = [root for root in roots if root.family == family]
            self._observe(f"explore {family}", number / len(families))
            appraised += self._family(members)
        return Found(tuple(appraised), tuple(self._steps), self._sensitivity)

    def _family(self, roots: Sequence[Root]) -> list[Appraisal]:
        """Appraise one family, whose members differ in settings only; repair its best member."""
        members: list[Appraisal] = []
        for root in roots:
            if members and (self._is_settled(members) or self._is_late(root.name)):
                break
            members.append(self._appraise_root(root))
        alive = [m for m in members if not m.failure]
        if not alive:
            return members
        best = max(alive, key=_faithfulness)
        outdone = [self._outdone(m, best) if m is not best and not m.failure else m for m in members]
        root = roots[members.index(best)]
        return [self._improve(root, best) if m is best else m for m in outdone]

    def _appraise_root(self, root: Root) -> Appraisal:
        if root.pruned:
            self._note(root.name, "pruned", root.pruned, 0.0)
            return Appraisal(self._unbuilt(root, root.pruned), failure=root.pruned)
        if self._is_late(root.name):
            return Appraisal(self._unbuilt(root, _LATE), failure=_LATE)
        start = time.monotonic()
        appraisal = self._appraise(self._line.build(root.name, (*self._quest.base, *root.chain), root.precision))
        self._note(root.name, "dropped" if appraisal.failure else "tried", _seen(appraisal), time.monotonic() - start)
        return appraisal

    def _unbuilt(self, root: Root, reason: str) -> Built:
        chain = (*self._quest.base, *root.chain)
        return Built(
            root.name, root.precision, "cpu", exact=False, form=self._line.original, chain=chain, failure=reason
        )

    def _appraise(self, built: Built, speed: tuple[Comparison, ...] = ()) -> Appraisal:
        """Compare a candidate on the search samples and race it briefly, unless its speed is known."""
        if built.failure:
            return Appraisal(built, failure=built.failure)
        try:
            label = self._track.enter(built)
            fidelity, answers = self._exam.glance(self._track.session(label))
            speed = speed or self._race(label)
        except (PassFailed, SlipstreamError) as exc:
            return Appraisal(built, failure=f"does not run: {exc}")
        return Appraisal(built, fidelity, speed, answers)

    def _race(self, label: str) -> tuple[Comparison, ...]:
        baseline = self._track.enter(self._quest.baseline)
        rows = racing_rows(tuple(self._track.batches))
        plan = RacePlan(budget_s=_RACE_S, min_rounds=7, least_rounds=5, max_rounds=25, seed=self._quest.seed)
        raced = self._track.race([baseline, label], rows, plan, lambda _: None)
        return tuple(raced.compare(label, baseline, r) for r in rows)

    def _outdone(self, loser: Appraisal, best: Appraisal) -> Appraisal:
        reason = f"{best.built.name} is nearer to the original on the search samples: {_seen(loser)}"
        return msgspec.structs.replace(loser, failure=reason)

    def _improve(self, root: Root, best: Appraisal) -> Appraisal:
        """Repair a candidate as far as it needs it and can pay for it."""
        if self._is_faithful(best):
            return best
        if not root.repairs and not root.mixes:
            return self._hopeless_or(best)
        if self._quest.wants_speed and best.speedup < _PROMISING:
            self._note(best.built.name, "not repaired", f"{best.speedup:.2f}x of exact FP32: not worth it", 0.0)
            return self._hopeless_or(best)
        chain = root.chain
        for repair in root.repairs:
            if self._is_late(label_of(repair.step)):
                return self._hopeless_or(best)
            chain, best = self._try_repair(root, chain, best, repair.place(chain), repair.step)
            if self._is_faithful(best):
                return best
        if root.mixes and not self._is_late("mixed precision"):
            best = self._mix(root, chain, best)
        return self._hopeless_or(best)

    def _try_repair(
        self, root: Root, chain: Chain, best: Appraisal, tried: Chain, step: Pass
    ) -> tuple[Chain, Appraisal]:
        """Build the chain with a repair in it; keep it if the error on the search samples falls beyond chance."""
        start = time.monotonic()
        self._observe(f"repair {root.name}: {label_of(step)}", 0.5)
        built = self._line.build(root.name, (*self._quest.base, *tried), root.precision)
        appraisal = self._appraise(built, best.speed if step.spec.produces == "fp32" else ())
        name = f"{root.name} + {label_of(step)}"
        if appraisal.failure:
            self._note(name, "dropped", appraisal.failure, time.monotonic() - start)
            return chain, best
        better, low, high = improves(self._exam.samples.visible, best.answers, appraisal.answers)
        seen = f"{_seen(appraisal)}; error changes by {low:+.1%} to {high:+.1%}"
        self._note(name, "kept" if better else "dropped", seen, time.monotonic() - start)
        return (tried, appraisal) if better else (chain, best)

    def _mix(self, root: Root, chain: Chain, best: Appraisal) -> Appraisal:
        """Keep as few layers in float as the gate needs, and build that."""
        start = time.monotonic()
        self._observe(f"sensitivity of {root.name}", 0.7)
        try:
            mixed = mix(self._line, self._quest.base, chain, self._context, self._exam, self._accept)
        except (PassFailed, SlipstreamError) as exc:
            self._note(f"{root.name}: mixed precision", "dropped", str(exc), time.monotonic() - start)
            return best
        self._sensitivity[root.name] = mixed.ranking
        if mixed.keep is None:
            self._note(f"{root.name}: mixed precision", "dropped", mixed.reason, time.monotonic() - start)
            return best
        tried = mixed.applied_to(chain)
        appraisal = self._appraise(self._line.build(root.name, (*self._quest.base, *tried), root.precision))
        pays = not self._quest.wants_speed or appraisal.speedup >= _PROMISING
        kept = not appraisal.failure and pays and _faithfulness(appraisal) > _faithfulness(best)
        seen = f"{mixed.reason}; {_seen(appraisal)}"
        self._note(f"{root.name}: mixed precision", "kept" if kept else "dropped", seen, time.monotonic() - start)
        return appraisal if kept else best

    def _is_faithful(self, appraisal: Appraisal) -> bool:
        return appraisal.fidelity is not None and self._accept(appraisal.fidelity)

    def _hopeless_or(self, appraisal: Appraisal) -> Appraisal:
        """Drop a candidate that the search samples show to miss the gate beyond chance."""
        fidelity = appraisal.fidelity
        if appraisal.failure or fidelity is None:
            return appraisal
        high = wilson(round(fidelity.agreement * fidelity.samples), fidelity.samples)[1]
        if high >= self._quest.gate.min_agreement:
            return appraisal
        reason = f"agreement at most {high:.3f} (95 %) on the search samples: {_seen(appraisal)}"
        return msgspec.structs.replace(appraisal, failure=reason)

    def _is_settled(self, members: Sequence[Appraisal]) -> bool:
        """Whether more members cannot help: one is faithful, or they are too slow, since settings change no speed."""
        if any(self._is_faithful(m) for m in members):
            return True
        slow = [m for m in members if m.speed and m.speedup < _PROMISING]
        return self._quest.wants_speed and bool(slow)

    def _is_late(self, what: str) -> bool:
        late = time.monotonic() > self._quest.end_s
        if late:
            self._note(what, "not tried", _LATE, 0.0)
        return late

    def _note(self, what: str, outcome: str, reason: str, seconds: float) -> None:
        self._steps.append(StepRecord(what, outcome, reason, seconds))


def _faithfulness(appraisal: Appraisal) -> tuple[float, float]:
    fidelity = appraisal.fidelity
    return (fidelity.agreement, fidelity.sqnr_db) if fidelity is not None else (-1.0, 0.0)


def _seen(appraisal: Appraisal) -> str:
    if appraisal.fidelity is None:
        return appraisal.failure
    fidelity = appraisal.fidelity
    text = f"agreement {fidelity.agreement:.3f}, {fidelity.sqnr_db:.1f} dB (n={fidelity.samples})"
    return f"{text}, {appraisal.speedup:.2f}x of exact FP32" if appraisal.speed else text


def unproven(line: Line, base: Chain, roots: Sequence[Root], reason: str) -> Found:
    """Return every root as refused: without samples nothing lossy can be proven."""
    appraised = []
    for root in roots:
        why = root.pruned or reason
        built = Built(root.name, root.precision, "cpu", False, line.original, (*base, *root.chain), why)
        appraised.append(Appraisal(built, failure=why))
    return Found(tuple(appraised), (), {})
