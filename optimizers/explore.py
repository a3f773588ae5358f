"""Finds the lossy candidates worth proving: cheap evidence first, repair only where it can pay.

Everything here is judged on the *search* part of the samples and by short races, and decides only what is tried next.
Verdicts come from the held-out part and from long races, see ``trial``. The stages:

1. Roots: each precision with its plain settings. Those that this host cannot profit from are left out with the reason.
   Each is built, compared on the search samples, and raced briefly against the best exact form.
2. Repair, for a quantization that is fast enough and not faithful enough: SmoothQuant, equalization, AdaRound, bias
   correction, each kept only if the error falls by more than chance (paired bootstrap).
3. Mixed precision, if it still is not faithful: layers are ranked by what quantizing each one alone costs, and as few
   as possible stay in float.

Nothing starts that is not expected to end within the time budget. Proof goes before search: as soon as the speed of a
candidate is known, the time of its trial is reserved, and given back when the candidate is dropped.
"""

from collections.abc import Callable, Sequence

import msgspec

from optimizers.budget import Budget
from optimizers.building import Built, Chain, Line
from optimizers.errors import PassFailed
from optimizers.exam import Exam
from optimizers.fidelity import improves, wilson
from optimizers.forecast import Cost, Forecast
from optimizers.measurement import Comparison, RacePlan
from optimizers.mixing import Accept, Lab, mix
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
_TRYING = "what is being tried"
"""Purpose of the time that is reserved for the appraisal of what is being built."""

_PROMISING = 0.97 * LEAST_GAIN
"""Short races are less sure than long ones."""


class Appraisal(msgspec.Struct, frozen=True):
    """A candidate with cheap evidence.

    Attributes:
        built: The candidate.
        fidelity: On the search samples; ``None`` when it could not be compared.
        speed: Against the best exact form, from a short race.
        answers: Its outputs on the search samples.
        cost: Of single runs; empty when it did not run.
        failure: Why it is out; empty while it is not.
    """

    built: Built
    fidelity: Fidelity | None = None
    speed: tuple[Comparison, ...] = ()
    answers: Tensors = {}
    cost: Cost = {}
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
        budget: The time that there is.
        forecast: Predicts what comparisons and races take.
        seed: Of the races.
    """

    base: Chain
    baseline: Built
    gate: Gate
    wants_speed: bool
    budget: Budget
    forecast: Forecast
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
        self._quest, self._budget, self._forecast = quest, quest.budget, quest.forecast
        self._observe = observe
        self._accept = Accept(quest.gate)
        self._steps: list[StepRecord] = []
        self._sensitivity: dict[str, tuple[LayerSensitivity, ...]] = {}

    def run(self, roots: Sequence[Root]) -> Found:
        """Explore from these roots, which come in the order in which they should be tried."""
        appraised: list[Appraisal] = []
        families = list(dict.fromkeys(root.family for root in roots))
        for number, family in enumerate(families):
            members = [root for root in roots if root.family == family]
            appraised += self._family(members, part(self._observe, number / len(families), 1 / len(families)))
        return Found(tuple(appraised), tuple(self._steps), self._sensitivity)

    def _family(self, roots: Sequence[Root], observe: Observe) -> list[Appraisal]:
        """Appraise one family, whose members differ in settings only; repair its best member."""
        members: list[Appraisal] = []
        for number, root in enumerate(roots):
            observe(f"explore {root.name}", 0.5 * number / len(roots))
            if members and (self._is_settled(members) or self._refusal(root.name, self._usual_s())):
                break
            members.append(self._appraise_root(root))
        alive = [m for m in members if not m.failure]
        if not alive:
            return members
        best = max(alive, key=_faithfulness)
        outdone = [self._outdone(m, best) if m is not best and not m.failure else m for m in members]
        root = roots[members.index(best)]
        return [self._improve(root, best, observe) if m is best else m for m in outdone]

    def _appraise_root(self, root: Root) -> Appraisal:
        if root.pruned:
            self._note(root.name, "pruned", root.pruned, 0.0)
            return Appraisal(self._unbuilt(root, root.pruned), failure=root.pruned)
        late = self._refusal(root.name, self._usual_s())
        if late:
            return Appraisal(self._unbuilt(root, late), failure=late)
        start_s = self._budget.elapsed_s
        built = self._build(root, root.chain, self._usual_s())
        appraisal = self._with_trial(self._appraise(built))
        outcome = "dropped" if appraisal.failure else "tried"
        self._note(root.name, outcome, _seen(appraisal), self._budget.elapsed_s - start_s)
        return appraisal

    def _build(self, root: Root, chain: Chain, appraisal_s: float) -> Built:
        """Build a candidate; its passes have the time that the appraisal of their result leaves."""
        self._budget.reserve(_TRYING, appraisal_s)
        built = self._line.build(root.name, (*self._quest.base, *chain), root.precision)
        self._budget.reserve(_TRYING, 0.0)
        return built

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
            cost = self._track.cost(label)
            late = self._budget.refusal(self._appraisal_s(cost, is_raced=not speed))
            if late:
                self._track.leave(built)
                return Appraisal(built, failure=late)
            fidelity, answers = self._exam.glance(self._track.session(label))
            speed = speed or self._race(label)
        except (PassFailed, SlipstreamError) as exc:
            self._track.leave(built)
            return Appraisal(built, failure=f"does not run: {exc}")
        return Appraisal(built, fidelity, speed, answers, cost)

    def _with_trial(self, appraisal: Appraisal) -> Appraisal:
        """Reserve the time of a candidate's trial; drop it when there is not as much."""
        if appraisal.failure:
            return appraisal
        trial_s = self._trial_s(appraisal)
        late = self._budget.refusal(trial_s)
        if late:
            return self._dropped(appraisal, f"not proven: {late}; {_seen(appraisal)}")
        self._budget.reserve(appraisal.built.name, trial_s)
        return appraisal

    def _dropped(self, appraisal: Appraisal, reason: str) -> Appraisal:
        """Drop a candidate: its session and the time for its trial are free again."""
        self._track.leave(appraisal.built)
        self._budget.reserve(appraisal.built.name, 0.0)
        return msgspec.structs.replace(appraisal, failure=reason)

    def _race(self, label: str) -> tuple[Comparison, ...]:
        baseline = self._track.enter(self._quest.baseline)
        rows = racing_rows(tuple(self._track.batches))
        plan = RacePlan(budget_s=_RACE_S, min_rounds=7, least_rounds=5, max_rounds=25, seed=self._quest.seed)
        raced = self._track.race([baseline, label], rows, plan, lambda _: None)
        return tuple(raced.compare(label, baseline, r) for r in rows)

    def _trial_s(self, appraisal: Appraisal) -> float:
        """Return the seconds of a trial; a candidate that is clearly too slow leaves it after the first race."""
        if self._quest.wants_speed and appraisal.speedup < 1:
            return self._forecast.race_s([appraisal.cost], self._racing_rows)
        return self._forecast.trial_s(appraisal.cost)

    def _appraisal_s(self, cost: Cost, *, is_raced: bool) -> float:
        costs = [cost, self._baseline_cost]
        race_s = self._forecast.race_s(costs, self._racing_rows, _RACE_S) if is_raced else 0.0
        return self._forecast.glance_s(cost) + race_s

    def _usual_s(self) -> float:
        """Return the seconds of appraisal and trial of a candidate that is as fast as the baseline."""
        cost = self._baseline_cost
        return self._appraisal_s(cost, is_raced=True) + self._forecast.trial_s(cost)

    @property
    def _baseline_cost(self) -> Cost:
        return self._track.cost(self._track.enter(self._quest.baseline))

    @property
    def _racing_rows(self) -> tuple[int, ...]:
        return racing_rows(tuple(self._track.batches))

    def _outdone(self, loser: Appraisal, best: Appraisal) -> Appraisal:
        reason = f"{best.built.name} is nearer to the original on the search samples: {_seen(loser)}"
        return self._dropped(loser, reason)

    def _improve(self, root: Root, best: Appraisal, observe: Observe) -> Appraisal:
        """Repair a candidate as far as it needs it and can pay for it."""
        if self._is_faithful(best):
            return best
        if not root.repairs and not root.mixes:
            return self._hopeless_or(best)
        if self._quest.wants_speed and best.speedup < _PROMISING:
            self._note(best.built.name, "not repaired", f"{best.speedup:.2f}x of exact FP32: not worth it", 0.0)
            return self._hopeless_or(best)
        chain = root.chain
        for number, repair in enumerate(root.repairs):
            observe(f"repair {root.name}: {label_of(repair.step)}", 0.5 + 0.3 * number / len(root.repairs))
            needs_s = self._appraisal_s(best.cost, is_raced=repair.step.spec.produces != "fp32")
            if self._refusal(label_of(repair.step), needs_s):
                return self._hopeless_or(best)
            chain, best = self._try_repair(root, chain, best, repair.place(chain), repair.step)
            if self._is_faithful(best):
                return best
        if root.mixes:
            observe(f"sensitivity of {root.name}", 0.8)
            needs_s = self._appraisal_s(best.cost, is_raced=True)
            best = best if self._refusal("mixed precision", needs_s) else self._mix(root, chain, best)
        return self._hopeless_or(best)

    def _try_repair(
        self, root: Root, chain: Chain, best: Appraisal, tried: Chain, step: Pass
    ) -> tuple[Chain, Appraisal]:
        """Build the chain with a repair in it; keep it if the error on the search samples falls beyond chance."""
        start_s = self._budget.elapsed_s
        speed = best.speed if step.spec.produces == "fp32" else ()
        appraisal_s = self._appraisal_s(best.cost, is_raced=not speed)
        # How long a repair takes is unknown at first. It gets half of what is left: others want time as well.
        built = self._build(root, tried, max(appraisal_s, self._budget.left_s() / 2))
        appraisal = self._appraise(built, speed)
        name = f"{root.name} + {label_of(step)}"
        if appraisal.failure:
            self._note(name, "dropped", appraisal.failure, self._budget.elapsed_s - start_s)
            return chain, best
        better, low, high = improves(self._exam.samples.visible, best.answers, appraisal.answers)
        seen = f"{_seen(appraisal)}; error changes by {low:+.1%} to {high:+.1%}"
        self._note(name, "kept" if better else "dropped", seen, self._budget.elapsed_s - start_s)
        return (tried if better else chain), self._better(appraisal, best, is_better=better)

    def _better(self, tried: Appraisal, best: Appraisal, *, is_better: bool) -> Appraisal:
        """Go on with one of two forms of a candidate; the track knows both by one name, and holds the tried one."""
        if not is_better:
            self._track.leave(tried.built)
            return best
        self._budget.reserve(tried.built.name, self._trial_s(tried))
        return tried

    def _mix(self, root: Root, chain: Chain, best: Appraisal) -> Appraisal:
        """Keep as few layers in float as the gate needs, and build that."""
        start_s, appraisal_s = self._budget.elapsed_s, self._appraisal_s(best.cost, is_raced=True)
        what = f"{root.name}: mixed precision"
        self._budget.reserve(_TRYING, appraisal_s)
        try:
            lab = Lab(self._context, self._exam, self._accept, self._budget)
            mixed = mix(self._line, self._quest.base, chain, lab)
        except (PassFailed, SlipstreamError) as exc:
            self._note(what, "dropped", str(exc), self._budget.elapsed_s - start_s)
            return best
        finally:
            self._budget.reserve(_TRYING, 0.0)
        self._sensitivity[root.name] = mixed.ranking
        if mixed.keep is None:
            self._note(what, "dropped", mixed.reason, self._budget.elapsed_s - start_s)
            return best
        appraisal = self._appraise(self._build(root, mixed.applied_to(chain), appraisal_s))
        pays = not self._quest.wants_speed or appraisal.speedup >= _PROMISING
        kept = not appraisal.failure and pays and _faithfulness(appraisal) > _faithfulness(best)
        seen = f"{mixed.reason}; {_seen(appraisal)}"
        self._note(what, "kept" if kept else "dropped", seen, self._budget.elapsed_s - start_s)
        return self._better(appraisal, best, is_better=kept)

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
        return self._dropped(
            appraisal, f"agreement at most {high:.3f} (95 %) on the search samples: {_seen(appraisal)}"
        )

    def _is_settled(self, members: Sequence[Appraisal]) -> bool:
        """Whether more members cannot help: one is faithful, or they are too slow, since settings change no speed."""
        if any(self._is_faithful(m) for m in members):
            return True
        slow = [m for m in members if m.speed and m.speedup < _PROMISING]
        return self._quest.wants_speed and bool(slow)

    def _refusal(self, what: str, needs_s: float) -> str:
        """Return why there is no time for something, and note that; nothing when there is."""
        late = self._budget.refusal(needs_s)
        if late:
            self._note(what, "not tried", late, 0.0)
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


def part(observe: Observe, start: float, share: float) -> Observe:
    """Return what tells the progress of a part as progress of the whole.

    Args:
        observe: Told about the whole.
        start: Share of the whole that was done before the part, 0 to 1.
        share: The part's own share of the whole.
    """
    return lambda stage, done: observe(stage, start + share * done)


def unproven(line: Line, base: Chain, roots: Sequence[Root], reason: str) -> Found:
    """Return every root as refused: without samples nothing lossy can be proven."""
    appraised = []
    for root in roots:
        why = root.pruned or reason
        built = Built(root.name, root.precision, "cpu", False, line.original, (*base, *root.chain), why)
        appraised.append(Appraisal(built, failure=why))
    return Found(tuple(appraised), (), {})
