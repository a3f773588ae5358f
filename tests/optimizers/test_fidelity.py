"""Fidelity: which decision counts, and how far a candidate is from the original."""

import numpy as np
import pytest

from optimizers.errors import PassFailed
from optimizers.fidelity import compare, decision_for, describe, wilson, worse, worst_sqnr_db


def scores(n: int = 100, classes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def embeddings(n: int = 50, size: int = 16, seed: int = 0) -> np.ndarray:
    rows = scores(n, size, seed)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_wilson_matches_published_values():
    # 18 of 20, and no miss in 512: the closed form n / (n + z^2).
    assert wilson(18, 20) == pytest.approx((0.699, 0.972), abs=1e-3)
    assert wilson(512, 512) == pytest.approx((512 / (512 + 1.959964**2), 1.0))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)


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
