"""Slices and masks: how samples are told apart without labels, and which positions count."""

import numpy as np
import pytest

from optimizers.masks import hide, lengths_of, mask_of
from optimizers.slices import slices_of, worst_slice


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def requests(**inputs: np.ndarray) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(inputs.values())))
    return [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(count)]


def masks(*lengths: int, positions: int = 8) -> np.ndarray:
    return (np.arange(positions) < np.array(lengths)[:, None]).astype(np.int64)


def test_classifier_is_sliced_by_class_margin_and_label():
    scores = normal(80, 4)
    found = slices_of({"y": scores}, "top1", labels=np.arange(80) % 3)
    assert set(found) == {"class", "margin quarter", "label"}
    assert np.array_equal(found["class"], scores.argmax(axis=1))
    first, second = np.sort(scores, axis=1)[:, ::-1][:, :2].T
    least = np.argsort(first - second)[:20]
    assert set(np.flatnonzero(found["margin quarter"] == 1)) == set(least)
    assert np.bincount(found["margin quarter"])[1:].tolist() == [20, 20, 20, 20]


def test_one_column_is_sliced_by_side_and_by_distance_from_the_threshold():
    found = slices_of({"logit": np.linspace(-4, 4, 80, dtype=np.float32)[:, None]}, "binary")
    assert set(found) == {"class", "margin quarter"}
    assert found["class"].tolist() == [0] * 40 + [1] * 40
    assert set(np.flatnonzero(found["margin quarter"] == 1)) == set(range(30, 50))


def test_regression_is_sliced_by_value():
    assert slices_of({"price": np.arange(8.0)[:, None]}, "close")["value quarter"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_sequences_are_sliced_by_true_length():
    ids = np.ones((8, 8), np.int64)
    mask = masks(1, 2, 3, 4, 5, 6, 7, 8)
    for singles in (requests(ids=ids, mask=mask), [{"ids": ids[:1, :n]} for n in range(1, 9)]):
        found = slices_of({"v": normal(8, 3)}, "nearest_neighbour", singles)
        assert found["length quarter"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_equal_lengths_make_no_slices():
    singles = requests(mask=masks(5, 5, 5))
    assert slices_of({"v": normal(3, 3)}, "nearest_neighbour", singles) == {}


def test_worst_slice_needs_16_samples():
    same = np.ones(100, np.bool_)
    same[:15] = False
    assert worst_slice(same, {"part": (np.arange(100) >= 15).astype(np.int64)}).name == "part 1"
    same[:16] = False
    worst = worst_slice(same, {"part": (np.arange(100) >= 16).astype(np.int64)})
    assert (worst.name, worst.samples, worst.agreement, worst.agreement_low) == ("part 0", 16, 0.0, 0.0)
    assert worst_slice(same[:10], {"part": np.zeros(10, np.int64)}) is None


def test_among_equals_the_least_proven_slice_is_the_worst():
    assert worst_slice(np.ones(100, np.bool_), {"part": (np.arange(100) >= 70).astype(np.int64)}).samples == 30


def test_mask_is_found_by_name_or_by_its_form():
    right, left = masks(3, 8), masks(3, 8)[:, ::-1]
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    ids = np.full((2, 8), 7)
    assert np.array_equal(mask_of(requests(segments=segments, ids=ids, m=right)), right)
    assert np.array_equal(mask_of(requests(first=right, attention_mask=left)), left)
    assert mask_of(requests(segments=segments, ids=ids)) is None
    assert mask_of(requests(m=left)) is None
    assert mask_of(requests(attention_mask=masks(0, 8))) is None  # a sample without any position: no mask
    assert mask_of(requests(x=normal(2, 8))) is None
    assert mask_of([]) is None


def test_masks_of_unequal_size_are_filled_up():
    singles = [{"mask": np.ones((1, 2), np.int64)}, {"mask": np.array([[1, 1, 1, 0]])}]
    assert mask_of(singles).tolist() == [[True, True, False, False], [True, True, True, False]]
    assert lengths_of(singles).tolist() == [2, 3]


def test_hidden_positions_are_zero_and_everything_else_stays():
    mask = masks(3, 8).astype(np.bool_)
    outputs = {
        "tokens": 1 + normal(2, 8, 4),
        "starts": normal(2, 8),
        "pooled": normal(2, 4),
        "ids": np.ones((2, 8, 4), np.int64),
    }
    before = outputs["tokens"].copy()
    found = hide(outputs, mask)
    assert not found["tokens"][0, 3:].any()
    assert np.array_equal(found["tokens"][mask], before[mask])
    assert found["tokens"].dtype == np.float32
    assert all(found[name] is outputs[name] for name in ("starts", "pooled", "ids"))
    assert np.array_equal(outputs["tokens"], before)


@pytest.mark.parametrize("mask", [None, np.ones((2, 8), np.bool_)])
def test_without_hidden_positions_outputs_stay(mask: np.ndarray | None):
    outputs = {"tokens": normal(2, 8, 4)}
    assert hide(outputs, mask) is outputs
