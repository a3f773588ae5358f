"""Fidelity: which decision counts, and how far a candidate is from the original."""

import numpy as np
import pytest

from optimizers.errors import CalibrationError, PassFailed
from optimizers.fidelity import (
    compare,
    decision_for,
    describe,
    describe_accuracy,
    improves,
    promise,
    wilson,
    worse,
    worst_sqnr_db,
)
from optimizers.slices import slices_of
from server.artifact import Slice


def scores(n: int = 100, classes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def embeddings(n: int = 50, size: int = 16, seed: int = 0) -> np.ndarray:
    rows = scores(n, size, seed)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_decision_follows_the_outputs():
    assert decision_for({"logits": scores()}) == "top1"
    assert decision_for({"embedding": embeddings()}) == "nearest_neighbour"
    assert decision_for({"embedding": embeddings(2)}) == "close"
    assert decision_for({"embedding": embeddings(), "logits": scores(50)}) == "top1"
    assert decision_for({"price": scores(classes=1)}) == "close"
    assert decision_for({"mask": np.zeros((4, 2, 8, 8), np.float32)}) == "close"
    assert decision_for({"label": np.arange(9)}) == "top1"


def test_confident_probabilities_are_classes_not_embeddings():
    one_hot = np.eye(5, dtype=np.float32)[np.arange(50) % 5]
    assert decision_for({"probabilities": one_hot}) == "top1"


def test_top1_agreement_counts_changed_decisions():
    reference = scores()
    candidate = reference.copy()
    candidate[:7, :] = np.roll(candidate[:7, :], 1, axis=1)
    found = compare({"y": reference}, {"y": candidate}, "top1")
    assert found.agreement == pytest.approx(0.93)
    assert found.agreement_low == pytest.approx(wilson(93, 100)[0])
    assert found.samples == 100
    assert found.accuracy is None


def test_accuracy_is_taken_for_both_sides():
    reference = scores()
    labels = reference.argmax(axis=1)
    candidate = reference.copy()
    candidate[:4] *= -1
    found = compare({"y": reference}, {"y": candidate}, "top1", labels)
    assert (found.accuracy, found.accuracy_original) == (pytest.approx(0.96), 1.0)


def test_label_output_decides_when_there_are_no_scores():
    label = np.arange(10)
    changed = label.copy()
    changed[0] = 99
    found = compare({"label": label}, {"label": changed}, "top1", labels=label)
    assert found.agreement == pytest.approx(0.9)
    assert found.accuracy == pytest.approx(0.9)


def test_nearest_neighbour_survives_rotation_but_not_shuffling():
    reference = embeddings()
    rotation, _ = np.linalg.qr(scores(16, 16, seed=3))
    assert compare({"e": reference}, {"e": reference @ rotation}, "nearest_neighbour").agreement == 1.0
    assert compare({"e": reference}, {"e": embeddings(seed=9)}, "nearest_neighbour").agreement < 0.3


def test_duplicates_tie_as_nearest_neighbours():
    reference = np.repeat(embeddings(5), 3, axis=0) + 1e-4 * scores(15, 16, seed=3)
    noise = 1e-4 * scores(15, 16, seed=4)
    assert compare({"e": reference}, {"e": reference + noise}, "nearest_neighbour").agreement == 1.0


def test_close_is_relative_to_the_scale_of_the_original():
    reference = np.linspace(100, 200, 50, dtype=np.float32).reshape(50, 1)
    assert compare({"y": reference}, {"y": reference * 1.005}, "close").agreement == 1.0
    assert compare({"y": reference}, {"y": reference * 1.02}, "close").agreement == 0.0


def test_close_tolerates_small_elements_beside_large_ones():
    reference = np.array([[0.0, 10.0]], np.float32)
    assert compare({"y": reference}, {"y": reference + 0.01}, "close").agreement == 1.0


def test_close_needs_equal_integers():
    reference = {"y": np.ones((4, 1), np.float32), "count": np.array([[1, 2]] * 4)}
    candidate = {**reference, "count": np.array([[1, 2]] * 3 + [[1, 3]])}
    assert compare(reference, candidate, "close").agreement == pytest.approx(0.75)


def test_cosine_is_taken_per_sample():
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    candidate = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    found = compare({"y": reference}, {"y": candidate}, "close")
    assert found.cosine_worst == pytest.approx(0.0)
    assert found.cosine == pytest.approx(2 / 3)


def test_sqnr_is_that_of_the_worst_output():
    reference = {"a": np.full((4, 2), 100.0, np.float32), "b": np.ones((4, 2), np.float32)}
    candidate = {"a": reference["a"], "b": reference["b"] * np.float32(0.9)}
    assert worst_sqnr_db(reference, candidate) == pytest.approx(20.0, abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_candidate_is_a_failure_with_its_reason(value: float):
    reference = scores()
    candidate = reference.copy()
    candidate[3, 2] = value
    with pytest.raises(PassFailed, match="'y' holds 1 NaN or infinite"):
        compare({"y": reference}, {"y": candidate}, "top1")


def test_nan_that_the_original_has_too_is_no_failure():
    reference = np.ones((4, 3, 1), np.float32)
    reference[0, 0, 0] = np.nan
    assert compare({"y": reference}, {"y": reference.copy()}, "close").agreement == 1.0


def test_number_where_the_original_has_nan_is_not_close():
    reference = np.ones((4, 3, 1), np.float32)
    reference[0, 0, 0] = np.nan
    candidate = np.ones((4, 3, 1), np.float32)
    assert compare({"y": reference}, {"y": candidate}, "close").agreement == pytest.approx(0.75)


def test_other_shapes_and_missing_outputs_are_failures():
    with pytest.raises(PassFailed, match="'y' has shape"):
        compare({"y": scores()}, {"y": scores(classes=4)}, "top1")
    with pytest.raises(PassFailed, match="'y' is missing"):
        compare({"y": scores()}, {}, "top1")


def test_worse_takes_the_worse_of_every_number():
    reference = scores()
    one, two = reference.copy(), reference.copy()
    one[:3] *= -1
    two[:9, 0] += 9
    first = compare({"y": reference}, {"y": one}, "top1", reference.argmax(axis=1))
    second = compare({"y": reference}, {"y": two}, "top1", reference.argmax(axis=1))
    joined = worse(first, second)
    assert joined.agreement == min(first.agreement, second.agreement)
    assert joined.cosine_worst == first.cosine_worst
    assert joined.accuracy == min(first.accuracy, second.accuracy)


def test_no_miss_is_reported_with_the_rule_of_three():
    reference = {"y": scores(512)}
    assert "at most 3/512 = 0.6%" in describe(compare(reference, reference, "top1"))
    candidate = {"y": reference["y"].copy()}
    candidate["y"][0] *= -1
    assert "1 of 512 differ" in describe(compare(reference, candidate, "top1"))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_top5_forgives_what_top1_does_not():
    reference = np.tile(np.arange(8, 0, -1, dtype=np.float32), (20, 1))
    reference[10:] = np.roll(reference[10:], 1, axis=1)
    candidate = reference.copy()
    candidate[0, 0] = 3.5  # now the fifth largest
    candidate[1, 0] = 2.5  # now the sixth
    found = compare({"y": reference}, {"y": candidate}, "top1")
    assert (found.agreement, found.top5_agreement) == (pytest.approx(0.9), pytest.approx(0.95))
    assert compare({"y": scores()}, {"y": scores()}, "top1").top5_agreement is None


def test_kl_is_the_divergence_of_the_distributions_from_logits_and_from_probabilities():
    first, second = scores(), scores(seed=1)
    p, q = softmax(first.astype(np.float64)), softmax(second.astype(np.float64))
    expected = float(np.mean(np.sum(p * np.log(p / q), axis=1)))
    assert compare({"y": first}, {"y": second}, "top1").kl == pytest.approx(expected)
    probabilities = {"y": p.astype(np.float32)}, {"y": q.astype(np.float32)}
    assert compare(*probabilities, "top1").kl == pytest.approx(expected, rel=1e-5)
    assert compare({"y": first}, {"y": first + 7}, "top1").kl == pytest.approx(0, abs=1e-6)


def test_kl_of_one_column_and_of_independent_classes_adds_up_over_the_classes():
    p, q = 0.9, 0.6
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    signs = np.array([[1.0], [-1.0]] * 8)
    first, second = np.log(p / (1 - p)) * signs, np.log(q / (1 - q)) * signs
    assert compare({"logit": first}, {"logit": second}, "binary").kl == pytest.approx(expected)
    both = [np.concatenate([1 / (1 + np.exp(-side))] * 2, axis=1) for side in (first, second)]
    assert compare({"y": both[0]}, {"y": both[1]}, "top1").kl == pytest.approx(2 * expected)


def test_kl_stays_finite_where_the_candidate_is_sure_of_another_class():
    first, second = np.eye(4, dtype=np.float32), np.roll(np.eye(4, dtype=np.float32), 1, axis=1)
    assert 20 < compare({"y": first}, {"y": second}, "top1").kl < 30
    assert compare({"y": first}, {"y": first}, "top1").kl == pytest.approx(0, abs=1e-9)
    assert 20 < compare({"y": 1000 * first - 5}, {"y": 1000 * second - 5}, "top1").kl < 30


def test_regressions_have_neither_kl_nor_top5():
    found = compare({"price": scores(classes=1)}, {"price": scores(classes=1)}, "close")
    assert (found.kl, found.top5_agreement, found.accuracy_drop_high) == (None, None, None)


def test_sqnr_is_given_for_each_output():
    reference = {"a": np.full((4, 2), 100.0, np.float32), "b": np.ones((4, 2), np.float32), "n": np.arange(4)}
    found = compare(reference, {**reference, "b": reference["b"] * np.float32(0.9)}, "close")
    assert found.sqnr_by_output == {"a": 200.0, "b": pytest.approx(20, abs=0.01)}
    assert found.sqnr_db == found.sqnr_by_output["b"]


def test_mean_cosine_has_a_lower_bound():
    reference = scores(200)
    found = compare({"y": reference}, {"y": reference + scores(200, seed=5)}, "top1")
    assert found.cosine_worst < found.cosine_low < found.cosine < found.cosine_low + 0.1
    assert compare({"y": reference}, {"y": reference}, "top1").cosine_low == pytest.approx(1.0)


def test_loss_of_accuracy_has_an_upper_bound():
    reference = scores()
    labels = reference.argmax(axis=1)
    candidate = reference.copy()
    candidate[:4] *= -1
    found = compare({"y": reference}, {"y": candidate}, "top1", labels)
    assert 0.04 < found.accuracy_drop_high < 0.12
    same = compare({"y": reference}, {"y": reference}, "top1", labels)
    assert same.accuracy_drop_high == pytest.approx(1 - wilson(100, 100)[0])


def test_class_that_a_candidate_gives_up_is_the_worst_slice():
    reference = scores(400)
    candidate = reference.copy()
    candidate[:, 2] -= 2
    slices = slices_of({"y": reference}, "top1")
    found = compare({"y": reference}, {"y": candidate}, "top1", slices=slices)
    part = reference.argmax(axis=1) == 2
    hits = int(np.sum(candidate[part].argmax(axis=1) == 2))
    assert found.worst_slice.name == "class 2"
    assert found.worst_slice.samples == part.sum()
    assert found.worst_slice.agreement == pytest.approx(hits / part.sum())
    assert found.worst_slice.agreement_low == wilson(hits, int(part.sum()))[0]
    assert found.agreement - found.worst_slice.agreement > 0.5
    assert compare({"y": reference}, {"y": candidate}, "top1").worst_slice is None


def test_worse_joins_the_new_numbers_too():
    reference = scores(classes=8)
    labels = reference.argmax(axis=1)
    one, two = reference.copy(), reference + scores(classes=8, seed=4) / 2
    one[:20] *= -1
    slices = slices_of({"y": reference}, "top1")
    parts = [compare({"y": reference}, {"y": y}, "top1", labels, slices) for y in (one, two)]
    joined = worse(*parts)
    for name, pick in {
        "top5_agreement": min,
        "kl": max,
        "cosine_low": min,
        "accuracy_drop_high": max,
        "accuracy_difference_low": min,
    }.items():
        assert getattr(joined, name) == pick(getattr(part, name) for part in parts), name
        assert len({getattr(part, name) for part in parts}) == 2, name
    assert joined.sqnr_by_output == {"y": joined.sqnr_db}
    assert joined.worst_slice == min((part.worst_slice for part in parts), key=lambda s: s.agreement)
    assert joined == worse(*reversed(parts))


def test_worse_of_one_without_slices_keeps_those_of_the_other():
    whole = compare({"y": scores()}, {"y": scores()}, "top1")
    part = compare({"y": scores()}, {"y": scores()}, "top1", slices={"half": np.arange(100) % 2})
    assert worse(whole, part).worst_slice == Slice("half 0", 50, 1.0, wilson(50, 50)[0])


def test_evaluator_stands_in_the_place_of_the_accuracy_whatever_the_decision():
    def error(outputs, labels):
        assert labels is None
        return -float(np.abs(outputs["price"]).max())

    reference = {"price": np.abs(scores(classes=1))}
    most = float(reference["price"].max())
    found = compare(reference, {"price": reference["price"] + 1}, "close", evaluate=error)
    assert (found.accuracy, found.accuracy_original) == (pytest.approx(-most - 1), pytest.approx(-most))
    assert found.accuracy_drop_high is None
    assert found.accuracy_difference_low == pytest.approx(-1)


def test_evaluator_that_fails_on_the_original_ends_the_run_and_on_the_candidate_refuses_it():
    reference = {"y": scores()}

    def fragile(outputs, labels):
        return 1 / (outputs["y"][0, 0] - limit)

    limit = reference["y"][0, 0]
    with pytest.raises(CalibrationError, match=r"fragile returned inf"), np.errstate(divide="ignore"):
        compare(reference, {"y": scores(seed=1)}, "top1", evaluate=fragile)
    limit = scores(seed=1)[0, 0]
    with pytest.raises(PassFailed, match=r"on the candidate's outputs .*fragile"), np.errstate(divide="ignore"):
        compare(reference, {"y": scores(seed=1)}, "top1", evaluate=fragile)


def test_too_few_samples_are_said_with_what_they_can_promise():
    found = promise(512, 0.999)
    assert "512 samples with 0 misses prove that at most 3/512 = 0.6% of the decisions differ" in found
    assert "agreement at least 0.9926" in found
    assert "to show 0.999 at least 3838 samples without a miss are needed" in found
    assert promise(3838, 0.999) == ""
    assert promise(512, 0.99) == ""
    assert promise(1_000_000, 1.0).endswith("to show 1 no number of samples is enough")


def test_promise_of_a_comparison_counts_its_misses():
    reference = {"y": scores(1000)}
    candidate = {"y": reference["y"].copy()}
    assert promise(compare(reference, candidate, "top1"), 0.99) == ""
    candidate["y"][:8] *= -1
    found = compare(reference, candidate, "top1")
    assert found.agreement > 0.99 > found.agreement_low
    assert promise(found, 0.99) == f"{describe(found)}: 0.99 is not shown"
    assert promise(found, 0.98) == ""
    assert "3838 samples" in promise(found, 0.999)


def test_improvement_is_told_from_chance():
    reference = {"y": scores(200)}
    before = {"y": reference["y"] + scores(200, seed=1) / 10}
    better = {"y": reference["y"] + scores(200, seed=1) / 11}
    other = {"y": reference["y"] + scores(200, seed=2) / 10.1}
    found = improves(reference, before, better)
    assert found.better
    assert found.low <= (10 / 11) ** 2 - 1 <= found.high < 0
    chance = improves(reference, before, other)
    assert not chance.better
    assert chance.low < 0 < chance.high
    assert improves(reference, better, before).low > 0.2
    assert improves(reference, before, better) == found


def test_improvement_counts_every_output_alike():
    large, small = 1000 * scores(50), scores(50, seed=1)
    reference = {"large": large, "small": small}
    before = {"large": large + 10, "small": small * np.float32(1.5)}
    after = {"large": large + 20, "small": small}
    assert improves(reference, before, after).better


def test_improvement_without_floats_counts_equal_answers():
    label = np.arange(60)
    before, after = np.where(label < 20, 99, label), np.where(label < 5, 99, label)
    assert improves({"label": label}, {"label": before}, {"label": after}).better
    assert not improves({"label": label}, {"label": after}, {"label": before}).better


def test_nothing_to_improve_is_no_improvement():
    reference = {"y": scores()}
    assert improves(reference, reference, reference) == (False, 0.0, 0.0)
    worse_now = improves(reference, reference, {"y": reference["y"] + 1})
    assert not worse_now.better


def test_improvement_to_nan_is_a_failure():
    reference = {"y": scores()}
    with pytest.raises(PassFailed, match="NaN"):
        improves(reference, reference, {"y": reference["y"] * np.float32("nan")})


def test_difference_of_accuracies_has_a_lower_bound_from_pairs():
    reference = scores(400)
    labels = np.where(np.arange(400) < 200, reference.argmax(axis=1), -1)  # no one is ever right in the second half
    candidate = reference.copy()
    candidate[:20] *= -1
    found = compare({"y": reference}, {"y": candidate}, "top1", labels)
    assert found.accuracy_difference_low == pytest.approx(-0.05 - 1.96 * np.sqrt(0.05 * 0.95 / 400), abs=0.004)
    assert compare({"y": reference}, {"y": reference}, "top1", labels).accuracy_difference_low == 0.0
    assert compare({"y": reference}, {"y": candidate}, "top1").accuracy_difference_low is None


def test_accuracy_is_said_beside_the_original_s():
    reference = scores()
    candidate = reference.copy()
    candidate[:4] *= -1
    found = compare({"y": reference}, {"y": candidate}, "top1", reference.argmax(axis=1))
    low = found.accuracy_difference_low
    expected = f"accuracy 0.960, the original's 1.000 (difference -0.040, 95 % lower bound {low:+.3f})"
    assert describe_accuracy(found) == expected
    assert describe_accuracy(compare({"y": reference}, {"y": candidate}, "top1")) == ""


def test_named_classes_have_an_accuracy_and_a_divergence_of_their_own():
    """Unnamed, the first table of scores would decide."""
    other, reference = scores(seed=5), scores()
    candidate = reference.copy()
    candidate[:4] *= -1
    outputs = {"other": other, "y": reference}
    found = compare(outputs, {"other": other, "y": candidate}, "top1 of y", reference.argmax(axis=1))
    assert (found.agreement, found.accuracy, found.accuracy_original) == (0.96, 0.96, 1.0)
    assert found.kl == pytest.approx(compare({"y": reference}, {"y": candidate}, "top1").kl)
    assert compare(outputs, {"other": other, "y": candidate}, "close of other").kl is None
