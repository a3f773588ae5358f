from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers.graph import op_counts
from optimizers.passes import PassResult
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.equalize import Equalize
from optimizers.passes.int8_static import Int8Static
from server.artifact import SessionOptions
from tests.optimizers.graphs import FLOAT, NODE, context_of, model_of, normal, weights_of

CHANNELS = 8
IMAGES = {"x": normal(4, CHANNELS, 6, 6, seed=1)}
ROWS = {"x": normal(16, CHANNELS, seed=2)}
UNEVEN = np.geomspace(0.01, 10, CHANNELS).astype(np.float32)

RELU = NODE("Relu", ["a"], ["r"])
FIRST = NODE("Conv", ["x", "w1", "b1"], ["a"], name="first")
SECOND = NODE("Conv", ["r", "w2", "b2"], ["y"], name="second")
POINTWISE = {
    "w1": normal(CHANNELS, CHANNELS, 1, 1, seed=3) * UNEVEN[:, None, None, None],
    "b1": UNEVEN,
    "w2": normal(CHANNELS, CHANNELS, 1, 1, seed=4),
    "b2": normal(CHANNELS, seed=5),
}


def images(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], **outputs: list) -> onnx.ModelProto:
    """Build a model of images; outputs are rank 4 unless given."""
    shapes = {"y": ["n", "c", "h", "w"]} | outputs
    used = {name for node in nodes for name in node.input}
    return model_of(
        nodes, {"x": ["n", CHANNELS, 6, 6]}, shapes, {key: value for key, value in weights.items() if key in used}
    )


def rows(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    return model_of(nodes, {"x": ["b", CHANNELS]}, {"y": ["b", CHANNELS]}, weights)


def equalized(model: onnx.ModelProto, batch: dict[str, np.ndarray], work: Path, rounds: int = 3) -> PassResult:
    """Run the pass, and require that the answers stay."""
    before = model.SerializeToString(deterministic=True)
    result = Equalize(rounds).run(model, context_of(work))
    assert model.SerializeToString(deterministic=True) == before
    require_equivalent(model, result, "tolerance", [batch], work)
    assert op_counts(result.model) == op_counts(model)
    return result


def largest(weight: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(weight).max(axis=tuple(other for other in range(weight.ndim) if other != axis))


# The formula


def test_both_layers_get_the_geometric_mean_of_their_ranges(tmp_path: Path) -> None:
    model = images([FIRST, RELU, SECOND], POINTWISE)
    result = equalized(model, IMAGES, tmp_path)
    assert result.counts == {"pairs": 1, "clipped": 0, "shared": 0}
    r1, r2 = largest(POINTWISE["w1"], 0), largest(POINTWISE["w2"], 1)
    after = weights_of(result.model)
    np.testing.assert_allclose(largest(after["w1"], 0), np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(largest(after["w2"], 1), np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(after["b1"], POINTWISE["b1"] * np.sqrt(r2 / r1), rtol=1e-5)
    np.testing.assert_array_equal(after["b2"], POINTWISE["b2"])


def test_the_note_tells_how_much_nearer_the_channels_are(tmp_path: Path) -> None:
    model = images([FIRST, RELU, SECOND], POINTWISE)
    result = equalized(model, IMAGES, tmp_path)
    r1, r2 = largest(POINTWISE["w1"], 0), largest(POINTWISE["w2"], 1)
    mean = np.sqrt(r1 * r2)
    assert f"{r1.max() / r1.min():.3g} -> {mean.max() / mean.min():.3g} in 1 pairs" in result.note


def test_it_stops_where_nothing_changes(tmp_path: Path) -> None:
    model = images([FIRST, RELU, SECOND], POINTWISE)
    once = equalized(model, IMAGES, tmp_path, rounds=1)
    again = equalized(once.model, IMAGES, tmp_path)
    assert not again.changed
    assert again.model is once.model
    assert "equal already" in again.note


def test_more_rounds_bring_chains_nearer(tmp_path: Path) -> None:
    nodes = [FIRST, RELU, NODE("Conv", ["r", "w2"], ["s"]), NODE("Conv", ["s", "w3"], ["y"])]
    model = images(nodes, POINTWISE | {"w3": normal(CHANNELS, CHANNELS, 1, 1, seed=6) / UNEVEN[:, None, None]})
    gaps = []
    for rounds in (1, 3, 20):
        after = weights_of(equalized(model, IMAGES, tmp_path, rounds).model)
        gaps.append(np.abs(np.log(largest(after["w1"], 0) / largest(after["w2"], 1))).max())
    assert gaps[0] > gaps[1] >= gaps[2]
    assert gaps[2] < 0.01


def test_dead_channels_stay_as_they_are(tmp_path: Path) -> None:
    weights = {name: array.copy() for name, array in POINTWISE.items()}
    weights["w1"][0], weights["w2"][:, 1] = 0, 0
    after = weights_of(equalized(images([FIRST, RELU, SECOND], weights), IMAGES, tmp_path).model)
    assert all(np.isfinite(array).all() for array in after.values())
    np.testing.assert_array_equal(after["w2"][:, 0], weights["w2"][:, 0])
    np.testing.assert_array_equal(after["w1"][1], weights["w1"][1])


# What it is for


def separable(work: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a depthwise-separable net, and one that computes the same with badly scaled channels."""
    nodes = [
        NODE("Conv", ["x", "w1", "b1"], ["a"]),
        RELU,
        NODE("Conv", ["r", "w2", "b2"], ["c"], group=CHANNELS, pads=[1, 1, 1, 1]),
        NODE("Relu", ["c"], ["d"]),
        NODE("Conv", ["d", "w3"], ["e"]),
        NODE("Relu", ["e"], ["f"]),
        NODE("GlobalAveragePool", ["f"], ["p"]),
        NODE("Flatten", ["p"], ["g"]),
        NODE("Gemm", ["g", "w4"], ["y"], transB=1),
    ]
    weights = {
        "w1": normal(CHANNELS, CHANNELS, 1, 1, seed=1),
        "b1": normal(CHANNELS, seed=2),
        "w2": normal(CHANNELS, 1, 3, 3, seed=3),
        "b2": normal(CHANNELS, seed=4),
        "w3": normal(CHANNELS, CHANNELS, 1, 1, seed=5),
        "w4": normal(5, CHANNELS, seed=6),
    }
    bad = np.random.default_rng(0).permuted(np.geomspace(0.1, 10, CHANNELS)).astype(np.float32)
    by_output = bad[:, None, None, None]
    scaled = weights | {"w1": weights["w1"] * by_output, "b1": weights["b1"] * bad}
    scaled["w3"] = weights["w3"] * (by_output / bad[::-1][None, :, None, None])
    scaled["w2"] = weights["w2"] * (bad[::-1] / bad)[:, None, None, None]
    scaled["b2"] = weights["b2"] * bad[::-1]
    scaled["w4"] = weights["w4"] / bad
    good, poor = (images(nodes, made, y=["n", 5]) for made in (weights, scaled))
    require_equivalent(good, PassResult(poor, changed=True), "tolerance", [IMAGES], work)
    return good, poor


def int8_sqnr_db(model: onnx.ModelProto, reference: onnx.ModelProto, work: Path) -> float:
    result = Int8Static().run(model, context_of(work, [{"x": normal(64, CHANNELS, 6, 6, seed=8)}]))
    (expected,) = answers(reference, [IMAGES], work)[0].values()
    (seen,) = answers(result.model, [IMAGES], work, SessionOptions(config=result.options.config))[0].values()
    return 10 * np.log10(np.sum(expected**2) / np.sum((expected - seen) ** 2))


def test_int8_recovers_from_badly_scaled_channels(tmp_path: Path) -> None:
    good, poor = separable(tmp_path)
    result = equalized(poor, IMAGES, tmp_path)
    assert result.counts == {"pairs": 3, "clipped": 0, "shared": 0}
    before, after, ideal = (int8_sqnr_db(model, good, tmp_path) for model in (poor, result.model, good))
    assert before < 20
    assert after > before + 10
    assert after > ideal - 3


# Which layers are pairs

MATRICES = {
    "w1": normal(CHANNELS, CHANNELS, seed=3) * UNEVEN,
    "b1": UNEVEN,
    "w2": normal(CHANNELS, CHANNELS, seed=4),
}
LAST = NODE("MatMul", ["r", "w2"], ["y"])
CHAINS = {
    "matmul": [NODE("MatMul", ["x", "w1"], ["r"]), LAST],
    "matmul, bias, relu": [NODE("MatMul", ["x", "w1"], ["m"]), NODE("Add", ["b1", "m"], ["a"]), RELU, LAST],
    "matmul and one summand for all": [
        NODE("MatMul", ["x", "w1"], ["m"]),
        NODE("Add", ["m", "one"], ["a"]),
        RELU,
        LAST,
    ],
    "gemm": [NODE("Gemm", ["x", "w1", "b1"], ["a"]), NODE("LeakyRelu", ["a"], ["r"]), LAST],
    "transposed gemm": [
        NODE("Gemm", ["x", "w1T", "b1"], ["a"], transB=1),
        NODE("PRelu", ["a", "slope"], ["r"]),
        NODE("Gemm", ["r", "w2"], ["y"], transB=1),
    ],
    "relu written as clip": [
        NODE("MatMul", ["x", "w1"], ["a"]),
        NODE("Clip", ["a", "zero"], ["c"]),
        NODE("Clip", ["c", "zero", "endless"], ["r"]),
        LAST,
    ],
}
EXTRA = {
    "w1T": MATRICES["w1"].T.copy(),
    "slope": np.float32([0.1]),
    "one": np.float32(1),
    "zero": np.float32(0),
    "six": np.float32(6),
    "endless": np.float32(np.inf),
}


@pytest.mark.parametrize("name", CHAINS)
def test_matrices_are_pairs(tmp_path: Path, name: str) -> None:
    used = {tensor for node in CHAINS[name] for tensor in node.input}
    model = rows(CHAINS[name], {key: array for key, array in (MATRICES | EXTRA).items() if key in used})
    result = equalized(model, ROWS, tmp_path)
    assert result.counts["pairs"] == 1
    assert result.changed
    first, second = [node for node in result.model.graph.node if node.op_type in ("Gemm", "MatMul")]
    after = weights_of(result.model)
    r1 = largest(after[first.input[1]], int(first.input[1] != "w1T"))
    np.testing.assert_allclose(r1, largest(after["w2"], int(second.op_type == "Gemm")), rtol=1e-5)


def grouped(group: int, seed: int) -> np.ndarray:
    return normal(2 * CHANNELS, CHANNELS // group, 3, 3, seed=seed)


IMAGE_CHAINS = {
    "grouped": [FIRST, RELU, NODE("Conv", ["r", "w_2_groups"], ["y"], group=2)],
    "depthwise": [FIRST, RELU, NODE("Conv", ["r", "w_8_groups"], ["y"], group=CHANNELS)],
    "pooled": [
        FIRST,
        RELU,
        NODE("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        NODE("AveragePool", ["p"], ["q"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
        NODE("Conv", ["q", "w2"], ["y"]),
    ],
    "added bias": [
        NODE("Conv", ["x", "w1"], ["m"]),
        NODE("Add", ["m", "plane"], ["a"]),
        RELU,
        SECOND,
    ],
    "flattened": [FIRST, RELU, NODE("Flatten", ["r"], ["f"]), NODE("MatMul", ["f", "long"], ["y"])],
}


@pytest.mark.parametrize("name", IMAGE_CHAINS)
def test_convolutions_are_pairs(tmp_path: Path, name: str) -> None:
    more = {
        "w_2_groups": grouped(2, 6),
        "w_8_groups": grouped(8, 7),
        "plane": UNEVEN[:, None, None],
        "long": normal(CHANNELS * 36, 3, seed=8),
    }
    model = images(IMAGE_CHAINS[name], POINTWISE | more, **({"y": ["n", 3]} if name == "flattened" else {}))
    result = equalized(model, IMAGES, tmp_path)
    assert result.counts["pairs"] == 1
    assert result.changed
    after = largest(weights_of(result.model)["w1"], 0)
    before = largest(POINTWISE["w1"], 0)
    assert after.max() / after.min() < 0.2 * before.max() / before.min()
    assert not equalized(result.model, IMAGES, tmp_path).changed  # both ranges are equal: the two axes correspond


# What keeps layers apart

CLIPPED = [FIRST, NODE("Clip", ["a", "zero", "six"], ["r"]), SECOND]
THIN = NODE("Conv", ["x", "w1"], ["r"])
NARROW = {"w1": normal(6, CHANNELS, 1, 1, seed=3) * UNEVEN[:6, None, None, None]}
TAPPED = [FIRST, RELU, SECOND, NODE("Neg", ["r"], ["z"])]
OBSTACLES = {
    "clip": (images(CLIPPED, POINTWISE | EXTRA), {"clipped": 1}),
    "clip below another bound": (
        images([FIRST, NODE("Clip", ["a", "one"], ["r"]), SECOND], POINTWISE | EXTRA),
        {"clipped": 1},
    ),
    "two readers": (images(TAPPED, POINTWISE, z=["n", "c", "h", "w"]), {"shared": 1}),
    "residual": (images([FIRST, RELU, NODE("Conv", ["r", "w2"], ["s"]), NODE("Add", ["s", "r"], ["y"])], POINTWISE),
                 {"shared": 1}),
    "output between": (images([FIRST, RELU, SECOND], POINTWISE, r=["n", "c", "h", "w"]), {"shared": 1}),
    "tied weight": (images([FIRST, RELU, NODE("Conv", ["r", "w1"], ["y"])], POINTWISE), {"shared": 1}),
    "not homogeneous": (images([FIRST, NODE("Sigmoid", ["a"], ["r"]), SECOND], POINTWISE), {}),
    "two readers before the relu": (images([FIRST, RELU, SECOND, NODE("Neg", ["a"], ["z"])], POINTWISE,
                                           z=["n", "c", "h", "w"]), {"shared": 1}),
    "channels, then columns": (images([THIN, NODE("MatMul", ["r", "m"], ["y"])], NARROW | {"m": normal(6, 6)}), {}),
    "columns, then channels": (images([NODE("MatMul", ["x", "m"], ["r"]), SECOND],
                                      POINTWISE | {"m": normal(6, 8)}), {}),
    "channels as rows": (images([THIN, NODE("Flatten", ["r"], ["f"], axis=2), NODE("MatMul", ["f", "m"], ["y"])],
                                NARROW | {"m": normal(36, 3)}, y=["rows", 3]), {}),
    "pooled columns": (images([NODE("MatMul", ["x", "m"], ["a"]),
                               NODE("MaxPool", ["a"], ["r"], kernel_shape=[1, 3], pads=[0, 1, 0, 1]),
                               NODE("MatMul", ["r", "n"], ["y"])],
                              {"m": normal(6, 6), "n": normal(6, 6, seed=1)}), {}),
    "bias added to features": (images([THIN, NODE("Flatten", ["r"], ["f"]), NODE("Add", ["f", "b"], ["g"]),
                                       NODE("MatMul", ["g", "m"], ["y"])],
                                      NARROW | {"b": normal(216), "m": normal(216, 3)}, y=["n", 3]), {}),
    "one channel made eight": (images([NODE("Conv", ["x", "w0"], ["a"]), NODE("Add", ["a", "plane"], ["r"]),
                                       NODE("Conv", ["r", "w2"], ["y"], group=2)],
                                      {"w0": normal(1, CHANNELS, 1, 1), "plane": UNEVEN[:, None, None],
                                       "w2": normal(2, 4, 1, 1)}), {}),
    "a scale over the channels": (
        images([FIRST, NODE("Softmax", ["a"], ["r"], axis=1), SECOND], POINTWISE), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_layers_stay_apart(tmp_path: Path, name: str) -> None:
    model, counts = OBSTACLES[name]
    result = equalized(model, IMAGES, tmp_path)
    assert not result.changed
    assert result.model is model
    assert result.counts == {"pairs": 0, "clipped": 0, "shared": 0} | counts
    assert f"{counts.get('clipped', 0)} stopped by a Clip, {counts.get('shared', 0)} by another reader" in result.note


def test_bounds_that_are_attributes_are_read(tmp_path: Path) -> None:
    for bounds, counts in (
        ({"min": 0.0, "max": 6.0}, (0, 1)),
        ({"min": 0.0}, (1, 0)),
        ({"max": 6.0}, (0, 1)),
        ({"min": -1.0}, (0, 1)),
    ):
        nodes = [FIRST, NODE("Clip", ["a"], ["r"], **bounds), SECOND]
        shapes = {"x": ["n", CHANNELS, 6, 6]}, {"y": ["n", "c", "h", "w"]}
        result = equalized(model_of(nodes, *shapes, POINTWISE, opset=10, ir_version=5), IMAGES, tmp_path)
        assert (result.counts["pairs"], result.counts["clipped"]) == counts


def test_what_a_subgraph_reads_is_left_alone(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("t", FLOAT, None)
    then = helper.make_graph([NODE("Identity", ["r"], ["t"])], "then", [], [value])
    choice = NODE("If", ["yes"], ["z"], then_branch=then, else_branch=then)
    model = images([FIRST, RELU, SECOND, choice], POINTWISE | {"yes": np.array(True)}, z=["n", "c", "h", "w"])
    assert equalized(model, IMAGES, tmp_path).counts == {"pairs": 0, "clipped": 0, "shared": 1}


def test_a_model_without_layers_is_left_alone(tmp_path: Path) -> None:
    result = equalized(rows([NODE("Relu", ["x"], ["y"])], {}), ROWS, tmp_path)
    assert not result.changed
    assert "no two layers to equalize" in result.note


def test_transposed_activations_are_left_alone(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w1"], ["r"]), NODE("Gemm", ["r", "w2"], ["y"], transA=1)]
    model = model_of(nodes, {"x": [8, 8]}, {"y": [8, 8]}, {"w1": MATRICES["w1"], "w2": MATRICES["w2"]})
    assert equalized(model, {"x": normal(8, 8)}, tmp_path).counts["pairs"] == 0


def test_a_bias_that_is_no_constant_keeps_layers_apart(tmp_path: Path) -> None:
    nodes = [NODE("Tanh", ["x"], ["t"]), NODE("Gemm", ["x", "w1", "t"], ["r"]), LAST]
    model = rows(nodes, {"w1": MATRICES["w1"], "w2": MATRICES["w2"]})
    assert equalized(model, ROWS, tmp_path).counts["pairs"] == 0


def test_a_bias_that_others_read_is_copied(tmp_path: Path) -> None:
    nodes = [FIRST, RELU, NODE("Conv", ["r", "w2", "b1"], ["y"], name="second")]
    result = equalized(images(nodes, POINTWISE), IMAGES, tmp_path)
    weights = weights_of(result.model)
    np.testing.assert_array_equal(weights["b1"], POINTWISE["b1"])
    assert "b1_of_first" in weights


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Equalize(0)
