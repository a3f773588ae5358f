"""Decisions: which one each kind of model takes, what counts as the same, and what does not."""

from collections.abc import Callable

import numpy as np
import pytest

from optimizers.decisions import agreements, classes_of, decision_for, require_outputs
from optimizers.errors import PassFailed, RecipeError
from server.tensors import Signature, TensorSpec

RNG = np.random.default_rng


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return RNG(seed).standard_normal(shape).astype(np.float32)


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def rounded(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What FP16 leaves."""
    return {name: array.astype(np.float16).astype(array.dtype) for name, array in outputs.items()}


def noisy(outputs: dict[str, np.ndarray], db: float) -> dict[str, np.ndarray]:
    found = {}
    for name, array in outputs.items():
        scale = np.sqrt(np.mean(array.astype(np.float64) ** 2)) * 10 ** (-db / 20)
        found[name] = (array + scale * RNG(9).standard_normal(array.shape)).astype(array.dtype)
    return found


def share(reference: dict, candidate: dict) -> float:
    return float(agreements(reference, candidate, decision_for(reference)).mean())


def detector(n: int = 32) -> dict[str, np.ndarray]:
    """A heatmap with one smooth peak in three of four samples, and sizes, on a grid of 16 x 16; like CenterFace."""
    rng = RNG(0)
    y, x = np.mgrid[0:16, 0:16]
    heat = np.full((n, 1, 16, 16), 0.01, np.float32)
    for i in range(n):
        heat[i] += 0.01 * rng.random((1, 16, 16), dtype=np.float32)
        if i % 4:
            at_y, at_x = rng.integers(3, 13, 2)
            heat[i, 0] += 0.9 * np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / 6)
    return {"heatmap": heat, "scale": 2 + normal(n, 2, 16, 16)}


def segmentation(n: int = 20) -> np.ndarray:
    logits = normal(n, 5, 1, 1) + np.zeros((n, 5, 16, 16), np.float32)
    logits[:, :, 8:] = np.roll(logits[:, :, 8:], 1, axis=1)
    return logits


def tags(n: int = 40, positions: int = 12, classes: int = 9) -> np.ndarray:
    return 3 * normal(n, positions, classes)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"logits": normal(50, 5)}, "top1"),
        ({"label": np.arange(50) % 10, "probabilities": softmax(normal(50, 10))}, "top1"),
        ({"label": np.arange(50) % 2, "score": normal(50, 1)}, "top1"),
        ({"logits": normal(50, 1)}, "binary"),
        ({"logit": normal(50)}, "binary"),
        ({"y": sigmoid(9 * normal(50, 1))}, "binary"),
        ({"probability": sigmoid(normal(50, 1))}, "binary"),
        ({"price": normal(50, 1)}, "close"),
        ({"price": normal(50)}, "close"),
        ({"quality": RNG(0).random((50, 1), np.float32)}, "close"),
        ({"probability": 0.4 * RNG(0).random((50, 1), np.float32)}, "close"),  # never the other class
        ({"several": normal(50, 3) + np.array([0, 50, 500], np.float32)}, "close"),
        ({"tags": tags()}, "tokens"),
        ({"words": softmax(normal(4, 6, 1000))}, "tokens"),
        ({"hidden": normal(20, 12, 384)}, "near"),
        (
            {"boxes": 100 * RNG(0).random((20, 30, 4), np.float32), "scores": RNG(0).random((20, 30), np.float32)},
            "near",
        ),
        ({"offsets": normal(20, 30, 4)}, "near"),
        ({"yolo": np.concatenate([320 + 99 * normal(20, 30, 4), 0.01 * normal(20, 30, 80)], axis=2)}, "near"),
        ({"corners": RNG(0).random((20, 30, 4), np.float32), "scores": RNG(0).random((20, 30), np.float32)}, "near"),
        ({"segments": segmentation()}, "pixels"),
        ({"segments": softmax(segmentation(), axis=1)}, "pixels"),
        (detector(), "maps"),
        (dict(reversed(detector().items())), "maps"),
        ({"roll": sigmoid(normal(8, 40, 20) - 4)}, "maps"),
        ({"small": normal(20, 2, 2, 1)}, "close"),
    ],
)
def test_decision_follows_the_outputs(outputs: dict[str, np.ndarray], expected: str):
    assert decision_for(outputs) == expected


def test_labels_tell_a_binary_classifier_from_a_regression():
    outputs = {"y": normal(50, 1)}
    assert decision_for(outputs, labels=np.arange(50) % 2) == "binary"
    assert decision_for(outputs, labels=np.arange(50) % 3) == "close"
    assert decision_for(outputs, labels=np.zeros(50, np.int64)) == "close"


DECIDING = {
    "top1": {"label": np.arange(50) % 10, "probabilities": softmax(3 * normal(50, 10))},
    "binary": {"logit": normal(200, 1)},
    "tokens": {"tags": tags()},
    "pixels": {"segments": segmentation()},
    "maps": detector(),
    "near": {"hidden": normal(20, 12, 384)},
}


@pytest.mark.parametrize("decision", DECIDING)
def test_rounding_to_fp16_changes_no_decision(decision: str):
    outputs = DECIDING[decision]
    assert decision_for(outputs) == decision
    assert share(outputs, rounded(outputs)) == 1.0


def test_every_element_within_1_percent_would_be_asking_for_too_much():
    """Why detectors have a decision of their own: good INT8 is about 30 dB."""
    outputs = detector()
    candidate = noisy(outputs, 30)
    assert agreements(outputs, candidate, "close").mean() == 0.0
    assert share(outputs, candidate) > 0.9


def test_label_beside_the_scores_must_agree_too():
    scores = normal(50, 4)
    outputs = {"label": scores.argmax(axis=1), "scores": scores}
    changed = {**outputs, "label": np.where(np.arange(50) < 5, 77, outputs["label"])}
    assert share(outputs, changed) == pytest.approx(0.9)
    assert np.array_equal(classes_of(changed, outputs, "top1"), changed["label"])


def test_integers_that_are_no_labels_of_the_scores_do_not_count():
    scores = normal(50, 4)
    outputs = {"scores": scores, "tokens_seen": np.arange(50)}
    assert share(outputs, {**outputs, "tokens_seen": np.arange(50) + 1}) == 1.0


def test_binary_counts_the_side_of_the_threshold():
    logit = np.array([[-2.0], [-0.1], [0.1], [3.0]] * 5, np.float32)
    assert share({"logit": logit}, {"logit": logit * 0.3}) == 1.0
    assert share({"logit": logit}, {"logit": logit + 0.2}) == pytest.approx(0.75)
    probability = sigmoid(4 * logit)
    assert share({"probability": probability}, {"probability": probability + np.float32(0.15)}) == pytest.approx(0.75)


def test_tokens_need_99_percent_of_the_positions():
    scores = tags(2, 200)
    candidate = scores.copy()
    candidate[0, :2] *= -1
    candidate[1, :3] *= -1
    assert agreements({"y": scores}, {"y": candidate}, "tokens").tolist() == [True, False]


def test_one_wrong_token_of_a_short_sequence_is_one_too_many():
    scores = tags(2, 12)
    scores[:, 6:] = 0  # padding, which must not water the share down
    candidate = scores.copy()
    candidate[0, 0] *= -1
    candidate[1, 9] = -1  # nobody reads what stands there
    assert agreements({"y": scores}, {"y": candidate}, "tokens").tolist() == [False, True]


def test_pixels_need_99_percent_of_the_positions():
    scores = segmentation(2)
    candidate = scores.copy()
    candidate[0, :, 0, :2] *= -1
    candidate[1, :, 0, :4] *= -1
    assert agreements({"y": scores}, {"y": candidate}, "pixels").tolist() == [True, False]


@pytest.mark.parametrize(
    "harm",
    [
        lambda o: {**o, "heatmap": np.roll(o["heatmap"], 1, axis=3)},  # the peak moves
        lambda o: {**o, "heatmap": o["heatmap"] * np.float32(0.3)},  # it vanishes
        lambda o: {**o, "scale": o["scale"] * np.float32(1.8)},  # boxes of another size
    ],
)
def test_detections_that_move_vanish_or_change_their_size_differ(harm: Callable[[dict], dict]):
    outputs = detector()
    same = agreements(outputs, harm(outputs), "maps")
    assert not same[1::4].any()
    assert same[::4].all()  # nothing is shown there, neither before nor after


def test_outputs_at_the_peaks_may_be_off_by_a_tenth_of_their_range():
    outputs = detector()
    tenth = np.ptp(outputs["scale"]) / 10
    assert share(outputs, {**outputs, "scale": outputs["scale"] + 0.98 * tenth}) == 1.0
    assert share(outputs, {**outputs, "scale": outputs["scale"] + 1.02 * tenth}) == pytest.approx(0.25)


def test_detection_where_the_original_has_none_differs():
    outputs = detector()
    heat = outputs["heatmap"].copy()
    heat[0, 0, 5, 5] = 0.8
    assert agreements(outputs, {**outputs, "heatmap": heat}, "maps").tolist() == [False] + [True] * 31


def test_what_stands_away_from_the_peaks_does_not_count():
    outputs = detector()
    away = np.where(outputs["heatmap"] > 0.1, outputs["scale"], 0)
    assert share(outputs, {**outputs, "scale": away}) == 1.0


def test_near_is_20_decibel_per_sample():
    outputs = {"hidden": normal(20, 12, 384)}
    candidate = {"hidden": outputs["hidden"].copy()}
    candidate["hidden"][:5] *= np.float32(1.11)
    candidate["hidden"][5:10] *= np.float32(1.09)
    assert agreements(outputs, candidate, "near").tolist() == [False] * 5 + [True] * 15


def test_near_compares_a_sample_of_zeros_with_what_the_output_usually_is():
    outputs = {"hidden": normal(20, 12, 384)}
    outputs["hidden"][:2] = 0
    candidate = {"hidden": outputs["hidden"].copy()}
    candidate["hidden"][0] = 0.009
    candidate["hidden"][1] = 0.011
    assert agreements(outputs, candidate, "near").tolist() == [True, False] + [True] * 18


def test_near_compares_nan_and_integers_exactly():
    hidden = normal(4, 12, 384)
    hidden[0, 0, 0] = np.nan
    outputs = {"hidden": hidden, "length": np.array([[3]] * 4)}
    assert agreements(outputs, {**outputs, "hidden": np.nan_to_num(hidden)}, "near").tolist() == [False] + [True] * 3
    assert agreements(outputs, {**outputs, "length": np.array([[3]] * 3 + [[4]])}, "near")[3] == np.False_


def test_part_of_the_samples_keeps_the_decision_of_all():
    """Some samples alone would look like a regression; nothing to compare must never count as agreement."""
    scores = normal(20, 3)
    scores[:, 1] += 50
    assert agreements({"y": scores}, {"y": -scores}, "top1").mean() == 0.0
    hidden = np.zeros((3, 12, 9), np.float32)
    hidden[:, 0] = 1 + normal(3, 9)
    assert agreements({"y": hidden}, {"y": -hidden}, "tokens").mean() == 0.0


@pytest.mark.parametrize("decision", ["top1", "binary", "nearest_neighbour", "tokens", "pixels", "maps"])
def test_outputs_that_do_not_allow_the_decision_are_refused(decision: str):
    outputs = {"y": np.ones((4, 1, 1, 1, 1), np.float32)}
    with pytest.raises(PassFailed, match="no output holds"):
        agreements(outputs, outputs, decision)


def test_named_decision_wins_over_what_the_output_looks_like():
    """Three targets of a regression, whose ranges overlap, look like scores of classes."""
    targets = normal(40, 3)
    assert decision_for({"y": targets}) == "top1"
    named = decision_for({"y": targets}, named={"y": "close"})
    assert named == "close of y"
    shifted = {"y": targets + np.float32(0.5)}
    assert agreements({"y": targets}, shifted, "top1").all()
    assert not agreements({"y": targets}, shifted, named).any()
    assert classes_of(shifted, {"y": targets}, named) is None


def test_named_outputs_decide_together_and_alone():
    outputs = {"size": normal(6, 1), "b": normal(6, 4), "a": normal(6, 4, seed=1), "label": np.arange(6)}
    named = decision_for(outputs, named={"label": "top1", "a": "top1", "size": "close"})
    assert named == "close of size; top1 of a; top1 of label"  # as the signature orders them
    changed = {name: array.copy() for name, array in outputs.items()}
    changed["size"][0] += 9
    changed["a"][1] *= -1
    changed["label"][2] = 99
    changed["b"] *= -1  # is not named
    assert agreements(outputs, changed, named).tolist() == [False] * 3 + [True] * 3
    classes = classes_of(changed, outputs, named)
    assert classes is not None
    assert np.array_equal(classes, changed["a"].argmax(axis=1))


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((9,), ["binary", "near", "close"]),
        ((9, 1), ["binary", "near", "close"]),
        ((9, 3), ["top1", "nearest_neighbour", "near", "close"]),
        ((9, 5, 3), ["tokens", "maps", "near", "close"]),
        ((9, 3, 4, 4), ["pixels", "maps", "near", "close"]),
        ((9, 1, 4, 4), ["maps", "near", "close"]),
        ((9, 2, 2, 2, 2), ["near", "close"]),
    ],
)
def test_every_kind_that_a_shape_allows_can_be_named_and_no_other(shape: tuple[int, ...], kinds: list[str]):
    outputs = {"y": normal(*shape)}
    harmed = {"y": -10 * outputs["y"]}
    for kind in ("top1", "binary", "nearest_neighbour", "tokens", "pixels", "maps", "near", "close"):
        if kind not in kinds:
            with pytest.raises(RecipeError, match=f"'{kind}' does not fit the output 'y'.*{', '.join(kinds)}"):
                decision_for(outputs, named={"y": kind})
            continue
        named = decision_for(outputs, named={"y": kind})
        assert agreements(outputs, outputs, named).all()
        if kind != "nearest_neighbour":  # which does not ask for the size of a vector
            assert not agreements(outputs, harmed, named).all()


def test_labels_are_classes_or_values():
    outputs = {"label": np.arange(6), "pair": np.zeros((6, 2), np.int64)}
    changed = {**outputs, "label": np.array([0, 1, 2, 3, 4, 9])}
    for kind in ("top1", "close"):
        assert agreements(outputs, changed, decision_for(outputs, named={"label": kind})).sum() == 5
    with pytest.raises(RecipeError, match=r"label \[6\]: top1, near, close; pair \[6, 2\]: near, close"):
        decision_for(outputs, named={"pair": "top1"})


def test_named_embeddings_need_no_unit_norm():
    rows = normal(30, 8)
    named = decision_for({"y": rows}, named={"y": "nearest_neighbour"})
    assert agreements({"y": rows}, {"y": 3 * rows}, named).all()
    assert agreements({"y": rows}, {"y": normal(30, 8, seed=2)}, named).mean() < 0.4


def test_named_map_is_compared_with_what_lies_at_its_peaks():
    outputs = detector()
    named = decision_for(outputs, named={"heatmap": "maps"})
    spoiled = {name: array if name == "heatmap" else -array for name, array in outputs.items()}
    assert agreements(outputs, outputs, named).all()
    assert not agreements(outputs, spoiled, named).all()


def test_unknown_output_is_refused_with_the_outputs_and_the_kinds():
    signature = Signature((), (TensorSpec("y", "FP32", (None, 3)), TensorSpec("z", "INT64", (None,))))
    require_outputs({"y": "close", "z": "top1"}, signature)
    with pytest.raises(RecipeError, match=r"output 'logits', which .* outputs are y, z; kinds of decisions are top1, "):
        require_outputs({"y": "close", "logits": "top1"}, signature)
