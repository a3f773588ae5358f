"""The exploration of lossy candidates on real models: what is tried, what is repaired, and what is not worth it."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import numpy_helper

from optimizers.budget import Budget
from optimizers.building import Chain
from optimizers.explore import Appraisal, Explorer, Found, Observe, Quest, unproven
from optimizers.forecast import Cost, Forecast
from optimizers.nursery import Nursery
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.smoothquant import SmoothQuant
from optimizers.roots import Repair, Root, roots_for
from optimizers.search import Gate
from tests.models import save_mlp
from tests.optimizers.graphs import weights_of
from tests.optimizers.test_building import (
    Bench,
    Burden,
    Light,
    Refine,
    Restore,
    Worsen,
    without_processes,
)
from tests.optimizers.test_isolation import NotANumber, Refuse

FINE, COARSE, GARBLED = Light(512), Light(6), Light(3)
SLOW_COARSE = Light(6, burdened=True)
BASE: Chain = (Burden(),)
GATE = Gate(0.99)
RESTORE, WORSEN, REFINE = Repair(Restore()), Repair(Worsen()), Repair(Refine())


@pytest.fixture
def bench(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    without_processes(monkeypatch)
    made = Bench(mlp, tmp_path)
    yield made
    made.close()


FORECAST = Forecast(search=60, held_out=60, rows=1, workers=1)


def root_of(step: Light, name: str = "light", family: str = "light", **fields: object) -> Root:
    return Root(name, family, "int8", (step,), **fields)


def explore(
    bench: Bench,
    *roots: Root,
    base: Chain = BASE,
    gate: Gate = GATE,
    wants_speed: bool = True,
    budget: Budget | None = None,
    forecast: Forecast = FORECAST,
    observe: Observe = lambda *_: None,
) -> Found:
    """Explore from a base that bears a burden, so that what sheds it is faster beyond all noise."""
    baseline = bench.line.build("fp32", base, "fp32", exact=True)
    quest = Quest(base, baseline, gate, wants_speed, budget or Budget(), forecast, 0)
    return Explorer(bench.line, bench.exam, bench.track, bench.context, quest, observe).run(roots)


def outcomes(found: Found) -> list[tuple[str, str]]:
    return [(step.what, step.outcome) for step in found.steps]


def by_name(found: Found) -> dict[str, Appraisal]:
    return {appraisal.built.name: appraisal for appraisal in found.appraised}


def reason_of(found: Found, what: str) -> str:
    (reason,) = (step.reason for step in found.steps if step.what == what)
    return reason


def agreement_of(appraisal: Appraisal) -> float:
    assert appraisal.fidelity is not None
    return appraisal.fidelity.agreement


def test_faithful_and_fast_candidate_is_left_with_its_evidence(bench: Bench):
    found = explore(bench, root_of(FINE))
    (light,) = found.appraised
    assert light.failure == ""
    assert light.fidelity is not None
    assert (light.fidelity.agreement, light.fidelity.samples) == (1.0, 60)
    assert light.speedup > 1.5
    assert light.built.passes == ("burden", "light")
    assert re.fullmatch(r"agreement 1\.000, \d+\.\d dB \(n=60\), \d+\.\d\dx of exact FP32", reason_of(found, "light"))


def test_family_ends_with_its_first_faithful_member(bench: Bench):
    found = explore(bench, root_of(FINE, "a"), root_of(COARSE, "b"), root_of(FINE, "c", "other"))
    assert outcomes(found) == [("a", "tried"), ("c", "tried")]
    assert list(by_name(found)) == ["a", "c"]


def test_other_settings_do_not_help_a_family_that_is_too_slow(bench: Bench):
    roots = (root_of(SLOW_COARSE, "a"), root_of(FINE, "b"))
    assert outcomes(explore(bench, *roots))[0] == ("a", "tried")
    assert "b" not in by_name(explore(bench, *roots))
    assert ("b", "tried") in outcomes(explore(bench, *roots, wants_speed=False))


def test_best_member_goes_on_and_the_others_say_who_is_nearer(bench: Bench):
    found = explore(bench, root_of(GARBLED, "worst"), root_of(COARSE, "best"), gate=Gate(0.999))
    members = by_name(found)
    assert agreement_of(members["worst"]) < agreement_of(members["best"])
    assert members["worst"].failure.startswith("best is nearer to the original on the search samples: agreement 0.")
    assert members["best"].failure.startswith("agreement at most 0.")


def test_pruned_root_is_named_with_its_reason_and_never_built(bench: Bench):
    found = explore(bench, root_of(FINE, "a", pruned="no GPU is in use"), root_of(FINE, "b", "other"))
    assert outcomes(found) == [("a", "pruned"), ("b", "tried")]
    assert reason_of(found, "a") == by_name(found)["a"].failure == by_name(found)["a"].built.failure
    assert reason_of(found, "a") == "no GPU is in use"
    assert [record.name for record in bench.line.records] == ["burden", "light"]


def test_pass_that_fails_drops_its_candidate_and_the_family_goes_on(bench: Bench):
    refusing = Root("a", "light", "int8", (Refuse(),))
    found = explore(bench, refusing, root_of(FINE, "b"))
    assert outcomes(found) == [("a", "dropped"), ("b", "tried")]
    assert reason_of(found, "a") == by_name(found)["a"].failure == "this model has no convolutions"


def test_candidate_with_nan_is_dropped(bench: Bench):
    (appraisal,) = explore(bench, Root("a", "a", "int8", (NotANumber(),))).appraised
    assert "NaN" in appraisal.failure


def test_candidate_that_fails_on_the_track_is_dropped(bench: Bench):
    (appraisal,) = explore(with_bad_batches(bench), root_of(FINE)).appraised
    assert appraisal.failure.startswith("does not run: ")
    assert appraisal.fidelity is None


def with_bad_batches(bench: Bench) -> Bench:
    """Let the baseline run, and then nothing any more."""
    bench.track.enter(bench.line.build("fp32", BASE, "fp32", exact=True))
    bench.track.batches[1] = {"x": np.zeros((1, 63), np.float32)}
    return bench


def test_repair_is_kept_when_the_error_falls_beyond_chance(bench: Bench):
    found = explore(bench, root_of(COARSE, repairs=(WORSEN, RESTORE, REFINE)))
    assert outcomes(found) == [("light", "tried"), ("light + worsen", "dropped"), ("light + restore", "kept")]
    (light,) = found.appraised
    assert (light.failure, agreement_of(light)) == ("", 1.0)
    assert light.built.passes == ("burden", "light(steps=6)", "restore")
    assert reason_of(found, "light + restore").endswith("error changes by -100.0% to -100.0%")
    assert re.search(r"error changes by \+\d+\.\d% to \+", reason_of(found, "light + worsen"))
    served = weights_of(onnx.load(light.built.model))["w2"]
    np.testing.assert_array_equal(served, weights_of(onnx.load(bench.model))["w2"])


def test_repair_that_changes_no_answer_is_dropped(bench: Bench):
    found = explore(bench, root_of(COARSE, repairs=(Repair(Worsen(1.0)),)))
    assert outcomes(found)[-1] == ("light + worsen(factor=1.0)", "dropped")
    assert reason_of(found, "light + worsen(factor=1.0)").endswith("error changes by +0.0% to +0.0%")
    assert found.appraised[0].built.passes == ("burden", "light(steps=6)")


def test_repair_that_fails_leaves_the_candidate_as_it_was(bench: Bench):
    found = explore(bench, root_of(COARSE, repairs=(Repair(Refuse()), RESTORE)))
    assert outcomes(found)[1:] == [("light + refuse", "dropped"), ("light + restore", "kept")]
    assert reason_of(found, "light + refuse") == "refuse: this model has no convolutions"


def test_repair_that_makes_fp32_goes_before_the_quantizer_and_is_not_raced_again(bench: Bench):
    found = explore(bench, root_of(COARSE, repairs=(REFINE,)))
    (light,) = found.appraised
    assert light.built.passes == ("burden", "refine", "light(steps=6)")
    assert agreement_of(light) == 1.0
    before, after = (re.search(r"[\d.]+x of exact", step.reason) for step in found.steps)
    assert before is not None
    assert after is not None
    assert before[0] == after[0]


def test_final_form_is_the_one_that_the_track_holds(bench: Bench):
    """What was tried and dropped must not answer or race in the name of what was kept."""
    (light,) = explore(bench, root_of(COARSE, repairs=(RESTORE, WORSEN))).appraised
    session = bench.track.session(bench.track.enter(light.built))
    fidelity, answers = bench.exam.glance(session)
    assert fidelity == light.fidelity
    np.testing.assert_array_equal(answers["y"], light.answers["y"])


def test_slow_candidate_is_not_worth_a_repair_unless_size_counts(bench: Bench):
    slow = root_of(SLOW_COARSE, repairs=(RESTORE,))
    found = explore(bench, slow)
    assert [outcome for _, outcome in outcomes(found)] == ["tried", "not repaired"]
    assert re.fullmatch(r"[01]\.\d\dx of exact FP32: not worth it", found.steps[-1].reason)
    assert found.appraised[0].failure.startswith("agreement at most 0.")
    found = explore(bench, slow, wants_speed=False)
    assert outcomes(found)[-1] == ("light + restore", "kept")
    assert found.appraised[0].failure == ""


def test_candidate_that_misses_beyond_chance_is_dropped_with_the_bound(bench: Bench):
    (light,) = explore(bench, root_of(COARSE)).appraised
    match = re.match(r"agreement at most (0\.\d+) \(95 %\) on the search samples: agreement (0\.\d+), ", light.failure)
    assert match is not None
    assert float(match[2]) < float(match[1]) < GATE.min_agreement
    assert float(match[2]) == pytest.approx(agreement_of(light), abs=5e-4)


def test_candidate_that_may_have_missed_by_chance_is_left_to_the_held_out_samples(bench: Bench):
    agreement = agreement_of(explore(bench, root_of(COARSE)).appraised[0])
    (light,) = explore(bench, root_of(COARSE), gate=Gate(agreement + 0.02)).appraised
    assert light.failure == ""


def test_repair_aims_at_half_of_the_allowed_misses(bench: Bench):
    """The held-out samples must pass as well, so that a bare pass of the search samples is not enough."""
    agreement = agreement_of(explore(bench, root_of(COARSE)).appraised[0])
    found = explore(bench, root_of(COARSE, repairs=(RESTORE,)), gate=Gate(agreement - 0.01))
    assert outcomes(found)[-1] == ("light + restore", "kept")
    found = explore(bench, root_of(COARSE, repairs=(RESTORE,)), gate=Gate(1 - 2.1 * (1 - agreement)))
    assert outcomes(found) == [("light", "tried")]


def test_accuracy_on_labels_counts_as_well(bench: Bench):
    found = explore(bench, root_of(COARSE), gate=Gate(0.1, 0.0))
    assert outcomes(found) == [("light", "tried")]
    labels = bench.samples.reference["y"].argmax(axis=1)
    bench.exam = replace(bench.exam, samples=replace(bench.samples, labels=labels), digest="with labels")
    found = explore(bench, root_of(COARSE, repairs=(RESTORE,)), gate=Gate(0.1, 0.0))
    assert outcomes(found)[-1] == ("light + restore", "kept")


class Known(Forecast):
    """Predicts 2 s for an appraisal, 1 s of which is its race, and 5 s for a trial; 1 s for that of a slow form."""

    def glance_s(self, cost: Cost) -> float:
        return 1.0

    def race_s(self, costs: Sequence[Cost], sizes: Collection[int], budget_s: float = 0.0) -> float:
        return 1.0

    def trial_s(self, cost: Cost) -> float:
        return 5.0


class Clock:
    """Stands still until a stage begins, and is then ``late_s`` seconds later."""

    def __init__(self, stage: str = "", late_s: float = 0.0) -> None:
        self.now_s, self._stage, self._late_s = 0.0, stage, late_s

    def __call__(self) -> float:
        return self.now_s

    def observe(self, stage: str, _: float) -> None:
        self.now_s = self._late_s if self._stage and stage.startswith(self._stage) else self.now_s


def explore_within(
    bench: Bench, left_s: float, *roots: Root, clock: Clock | None = None, base: Chain = BASE
) -> tuple[Found, Budget]:
    """Explore with known needs and a clock of its own; return what was found, and the budget as it was left."""
    clock = clock or Clock()
    budget = Budget(left_s, clock)
    budget.begin()
    forecast = Known(60, 60, 1, 1)
    return explore(bench, *roots, base=base, budget=budget, forecast=forecast, observe=clock.observe), budget


NEEDS = "would not finish within the time budget (needs about {} s)"


def test_root_starts_only_if_its_appraisal_and_its_trial_fit(bench: Bench):
    found, budget = explore_within(bench, 6.9, root_of(FINE))
    assert outcomes(found) == [("light", "not tried")]
    (light,) = found.appraised
    assert found.steps[0].reason == light.failure == light.built.failure == NEEDS.format(7)
    assert [record.name for record in bench.line.records] == ["burden"]
    assert budget.left_s() == 6.9
    found, budget = explore_within(bench, 7.0, root_of(FINE))
    assert outcomes(found) == [("light", "tried")]
    assert budget.left_s() == 2.0, "the trial of what was found is reserved"


def test_no_family_starts_when_the_time_is_spent(bench: Bench):
    roots = (root_of(FINE, "a"), root_of(FINE, "b", "other", pruned="no GPU is in use"))
    found, _ = explore_within(bench, 0.0, *roots)
    assert outcomes(found) == [("a", "not tried"), ("b", "pruned")]
    assert by_name(found)["a"].failure == found.steps[0].reason == "the time budget is spent"


def test_other_member_must_fit_beside_the_proof_of_the_first(bench: Bench):
    roots = (root_of(COARSE, "a"), root_of(FINE, "b"))
    found, _ = explore_within(bench, 11.9, *roots)
    assert outcomes(found) == [("a", "tried"), ("b", "not tried")]
    assert reason_of(found, "b") == NEEDS.format(7)
    found, budget = explore_within(bench, 12.0, *roots)
    assert outcomes(found) == [("a", "tried"), ("b", "tried")]
    assert budget.left_s() == 7.0, "only the better one has a trial"


def test_time_of_a_candidate_that_is_dropped_is_free_for_others(bench: Bench):
    found, budget = explore_within(bench, 7.0, root_of(COARSE, "a"), root_of(FINE, "b", "other"))
    assert outcomes(found) == [("a", "tried"), ("b", "tried")]
    assert by_name(found)["a"].failure.startswith("agreement at most")
    assert budget.left_s() == 2.0


def test_candidate_that_is_slower_needs_time_for_its_first_race_only(bench: Bench):
    slow = Root("slow", "slow", "int8", (Burden(), Light(512, burdened=True)))
    _, budget = explore_within(bench, 7.0, slow, base=())
    assert budget.left_s() == 6.0


@pytest.mark.parametrize(("left_s", "reason"), [(1.9, NEEDS.format(2)), (0.0, "the time budget is spent")])
@pytest.mark.parametrize(
    ("fields", "stage", "what"),
    [({"repairs": (RESTORE,)}, "repair", "restore"), ({"mixes": True}, "sensitivity", "mixed precision")],
)
def test_nothing_is_repaired_without_time_for_it(
    bench: Bench, fields: dict[str, object], stage: str, what: str, left_s: float, reason: str
):
    clock = Clock(stage, 2.0 - left_s)
    found, _ = explore_within(bench, 7.0, root_of(COARSE, **fields), clock=clock)
    assert outcomes(found) == [("light", "tried"), (what, "not tried")]
    assert reason_of(found, what) == reason
    assert found.appraised[0].failure.startswith("agreement at most"), "it is judged as it is"


def test_repair_needs_no_trial_of_its_own(bench: Bench):
    found, budget = explore_within(bench, 7.0, root_of(COARSE, repairs=(RESTORE,)))
    assert outcomes(found) == [("light", "tried"), ("light + restore", "kept")]
    assert budget.left_s() == 2.0


def test_passes_leave_time_to_appraise_their_result_and_repairs_leave_half_to_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    limits: list[float] = []
    run = Nursery.run

    def watched(nursery: Nursery, folder: Path, limit_s: float, memory_bytes: int) -> str:
        limits.append(limit_s)
        return "stopped" if len(limits) > 2 else run(nursery, folder, limit_s, memory_bytes)

    monkeypatch.setattr(Nursery, "run", watched)
    budget = Budget(50.0, lambda: 0.0)
    bench.line._workshop = replace(bench.workshop, budget=budget)
    bench.line.build("fp32", BASE, "fp32", exact=True)
    budget.begin()
    root = root_of(COARSE, repairs=(RESTORE,))
    found = explore(bench, root, budget=budget, forecast=Known(60, 60, 1, 1))
    assert outcomes(found) == [("light", "tried"), ("light + restore", "dropped")]
    assert reason_of(found, "light + restore") == "stopped"
    assert limits == [600.0, 43.0, 22.5], (
        "the base is mandatory; 2 s for the appraisal, 5 s for the trial; half of 45 s"
    )


def test_candidate_whose_comparison_would_take_too_long_is_dropped_after_its_build(bench: Bench):
    class Slower(Known):
        def glance_s(self, cost: Cost) -> float:
            return 1.0 if cost is bench.track.cost("fp32") else 20.0

    bench.track.enter(bench.line.build("fp32", BASE, "fp32", exact=True))
    budget = Budget(10.0, lambda: 0.0)
    budget.begin()
    found = explore(bench, root_of(FINE), budget=budget, forecast=Slower(60, 60, 1, 1))
    assert outcomes(found) == [("light", "dropped")]
    assert reason_of(found, "light") == NEEDS.format(21)
    assert budget.left_s() == 10.0


def test_candidate_whose_proof_would_take_too_long_is_dropped_with_what_was_seen(bench: Bench):
    class Slower(Known):
        def trial_s(self, cost: Cost) -> float:
            return 5.0 if cost is bench.track.cost("fp32") else 30.0

    bench.track.enter(bench.line.build("fp32", BASE, "fp32", exact=True))
    budget = Budget(10.0, lambda: 0.0)
    budget.begin()
    found = explore(bench, root_of(FINE), budget=budget, forecast=Slower(60, 60, 1, 1))
    assert outcomes(found) == [("light", "dropped")]
    (light,) = found.appraised
    assert light.failure.startswith(f"not proven: {NEEDS.format(30)}; agreement 1.000, ")
    assert budget.left_s() == 10.0


def test_only_candidates_that_go_on_have_a_session(bench: Bench):
    roots = (
        root_of(GARBLED, "worst"),
        root_of(COARSE, "repaired", repairs=(WORSEN, RESTORE)),
        root_of(COARSE, "dropped", "other"),
        Root("broken", "broken", "int8", (NotANumber(),)),
        root_of(FINE, "fine", "fine"),
    )
    found = explore(bench, *roots)
    alive = {name for name, appraisal in by_name(found).items() if not appraisal.failure}
    assert alive == {"repaired", "fine"}
    assert set(bench.track._sessions) == {"original", "fp32", *alive}


def test_repair_that_is_dropped_leaves_its_session(bench: Bench):
    agreement = agreement_of(explore(bench, root_of(COARSE)).appraised[0])
    found = explore(bench, root_of(COARSE, repairs=(WORSEN,)), gate=Gate(agreement + 0.02))
    assert outcomes(found)[-1] == ("light + worsen", "dropped")
    assert found.appraised[0].failure == ""
    assert set(bench.track._sessions) == {"original", "fp32"}


def test_progress_never_goes_back(bench: Bench):
    seen: list[float] = []
    repaired = root_of(COARSE, "a", repairs=(WORSEN, RESTORE), mixes=True)
    roots = (repaired, root_of(GARBLED, "b"), root_of(COARSE, "c", "other", mixes=True))
    explore(bench, *roots, observe=lambda _, share: seen.append(share))
    assert len(seen) == 6
    assert seen == sorted(seen)
    assert seen[-1] < 1


def test_mixed_precision_needs_a_quantizer_of_layers(bench: Bench):
    found = explore(bench, root_of(COARSE, mixes=True))
    assert outcomes(found)[-1] == ("light: mixed precision", "dropped")
    assert reason_of(found, "light: mixed precision") == "light quantizes no layers one by one"
    assert found.sensitivity == {}


@pytest.fixture
def outlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A model one of whose input channels is 500 times as large as the others, and counts no more than they do."""
    without_processes(monkeypatch)
    model = onnx.load(save_mlp(tmp_path / "mlp.onnx"))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "w1")
    weight = numpy_helper.to_array(tensor).copy()
    weight[0] /= 500
    tensor.CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, tmp_path / "outlier.onnx")
    inputs = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)
    inputs[:, 0] *= 500
    made = Bench(tmp_path / "outlier.onnx", tmp_path, inputs)
    yield made
    made.close()


INT8 = Root("int8-static", "int8-static", "int8-static", (Int8Static(),))
SMOOTH = (Repair(SmoothQuant(insert=True)),)


def test_int8_of_a_model_with_an_outlier_channel_is_refused_without_repair(outlier: Bench):
    found = explore(outlier, INT8, base=(), gate=Gate(0.95), wants_speed=False)
    assert outcomes(found) == [("int8-static", "tried")]
    assert found.appraised[0].failure.startswith("agreement at most 0.")


def test_int8_of_a_model_with_an_outlier_channel_is_repaired_by_smoothquant(outlier: Bench):
    root = replace(INT8, repairs=SMOOTH, mixes=True)
    found = explore(outlier, root, base=(), gate=Gate(0.95), wants_speed=False)
    assert outcomes(found) == [("int8-static", "tried"), ("int8-static + smoothquant(insert=True)", "kept")]
    (repaired,) = found.appraised
    assert (repaired.failure, repaired.built.passes) == ("", ("smoothquant(insert=True)", "int8-static"))
    assert agreement_of(repaired) >= 0.975
    assert repaired.fidelity is not None
    assert re.search(r"error changes by -\d+\.\d% to -\d+\.\d%$", found.steps[1].reason)


def test_int8_of_a_model_with_an_outlier_channel_is_repaired_by_mixed_precision(outlier: Bench):
    root = replace(INT8, mixes=True)
    found = explore(outlier, root, base=(), gate=Gate(0.95), wants_speed=False)
    assert outcomes(found) == [("int8-static", "tried"), ("int8-static: mixed precision", "kept")]
    assert found.steps[1].reason.startswith("1 of 2 layers stay in float")
    (mixed,) = found.appraised
    assert mixed.failure == ""
    assert agreement_of(mixed) >= 0.975
    (step,) = mixed.built.chain
    assert isinstance(step, Int8Static)
    ranking = found.sensitivity["int8-static"]
    assert step.keep == (ranking[0].node,)
    assert ranking[0].error > 10 * ranking[1].error
    nodes = {node.name: node for node in onnx.load(mixed.built.model).graph.node}
    assert "w1" in nodes[step.keep[0]].input, "the layer that sees the outlier is the one that stays in float"


def test_without_samples_every_root_is_refused_with_its_reason(bench: Bench):
    roots = roots_for(("int8", "bf16"), (), ("cpu",))
    found = unproven(bench.line, BASE, roots, "no proof possible: no samples")
    reasons = {name: appraisal.failure for name, appraisal in by_name(found).items()}
    assert reasons.pop("bf16").startswith("onnxruntime's CPU kernels do not compute in BF16")
    assert set(reasons.values()) == {"no proof possible: no samples"}
    assert len(found.appraised) == len(roots)
    assert found.steps == ()
    assert bench.line.records == []
