"""The exploration of lossy candidates on real models: what is tried, what is repaired, and what is not worth it."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import numpy_helper

from optimizers.building import Chain
from optimizers.explore import Appraisal, Explorer, Found, Quest, unproven
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


def root_of(step: Light, name: str = "light", family: str = "light", **fields: object) -> Root:
    return Root(name, family, "int8", (step,), **fields)


def explore(
    bench: Bench,
    *roots: Root,
    base: Chain = BASE,
    gate: Gate = GATE,
    wants_speed: bool = True,
    left_s: float = 600.0,
) -> Found:
    """Explore from a base that bears a burden, so that what sheds it is faster beyond all noise."""
    baseline = bench.line.build("fp32", base, "fp32", exact=True)
    quest = Quest(base, baseline, gate, wants_speed, time.monotonic() + left_s, 0)
    return Explorer(bench.line, bench.exam, bench.track, bench.context, quest, lambda *_: None).run(roots)


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


def test_no_member_and_no_repair_starts_when_the_time_is_spent(bench: Bench):
    roots = (root_of(COARSE, "a", repairs=(RESTORE,)), root_of(FINE, "b"))
    found = explore(bench, *roots, left_s=0.02)  # less than the first one takes
    assert outcomes(found) == [("a", "tried"), ("b", "not tried"), ("restore", "not tried")]
    assert {step.reason for step in found.steps[1:]} == {"the time budget is spent"}
    assert found.appraised[0].failure.startswith("agreement at most")


def test_mixed_precision_does_not_start_when_the_time_is_spent(bench: Bench):
    found = explore(bench, root_of(COARSE, mixes=True), left_s=0.02)
    assert outcomes(found) == [("light", "tried"), ("mixed precision", "not tried")]


def test_no_family_starts_when_the_time_is_spent(bench: Bench):
    found = explore(bench, root_of(FINE, "a"), root_of(FINE, "b", "other", pruned="no GPU is in use"), left_s=-1)
    assert outcomes(found) == [("a", "not tried"), ("b", "pruned")]
    assert by_name(found)["a"].failure == found.steps[0].reason == "the time budget is spent"
    assert [record.name for record in bench.line.records] == ["burden"]


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
