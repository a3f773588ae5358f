from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.graph import op_counts
from optimizers.passes import PassResult
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.smoothquant import SmoothQuant, channel_maxima, scales
from server.artifact import SessionOptions
from tests.optimizers.graphs import FLOAT, NODE, context_of, model_of, normal, weights_of

CHANNELS = 8
BATCHES = [{"x": normal(16, CHANNELS, seed=1)}, {"x": normal(5, CHANNELS, seed=2)}]
MANY = [{"x": normal(512, CHANNELS, seed=7)}]
HELD_OUT = {"x": normal(64, CHANNELS, seed=3)}

LAYER_NORM = NODE("LayerNormalization", ["x", "scale", "shift"], ["h"], name="norm")
MATMUL = NODE("MatMul", ["h", "w"], ["y"], name="matmul")
UNEVEN = np.geomspace(0.1, 100, CHANNELS).astype(np.float32)
SCALE = {"scale": UNEVEN, "shift": 0.1 * UNEVEN}
SQUARE = {"w": normal(CHANNELS, CHANNELS, seed=4)}


def flat(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    return model_of(nodes, {"x": ["b", CHANNELS]}, {name: ["b", CHANNELS] for name in outputs}, weights)


def smoothed(model: onnx.ModelProto, work: Path, insert: bool = False, alpha: float = 0.5) -> PassResult:
    """Run the pass, and require that the answers stay."""
    before = model.SerializeToString(deterministic=True)
    result = SmoothQuant(alpha, insert).run(model, context_of(work, BATCHES))
    assert model.SerializeToString(deterministic=True) == before
    require_equivalent(model, result, "tolerance", [HELD_OUT], work)
    return result


def int8_sqnr_db(model: onnx.ModelProto, reference: onnx.ModelProto, work: Path) -> float:
    result = Int8Static().run(model, context_of(work, MANY))
    (expected,) = answers(reference, [HELD_OUT], work)[0].values()
    (seen,) = answers(result.model, [HELD_OUT], work, SessionOptions(config=result.options.config))[0].values()
    return 10 * np.log10(np.sum(expected**2) / np.sum((expected - seen) ** 2))


# The formula


def test_alpha_shares_the_range_between_activation_and_weight(tmp_path: Path) -> None:
    model = flat([LAYER_NORM, MATMUL], SCALE | SQUARE)
    for alpha in (0.5, 0.8):
        result = smoothed(model, tmp_path, alpha=alpha)
        before = channel_maxima(model, ["h"], BATCHES, tmp_path)["h"]
        after = channel_maxima(result.model, ["h"], BATCHES, tmp_path)["h"]
        rows = np.abs(SQUARE["w"]).max(axis=1)
        np.testing.assert_allclose(before / after, before**alpha / rows ** (1 - alpha), rtol=1e-5)
        np.testing.assert_allclose(np.abs(weights_of(result.model)["w"]).max(axis=1), rows * before / after, rtol=1e-5)


def test_channels_without_a_scale_get_the_mean_of_the_others() -> None:
    made = scales(np.array([4.0, 0, 1, 16]), np.array([1.0, 1, 0, 1]), 0.5)
    assert made is not None
    np.testing.assert_allclose(made, [2, np.sqrt(8), np.sqrt(8), 4])
    assert scales(np.zeros(2), np.ones(2), 0.5) is None
    assert scales(np.array([1.0, 0]), np.array([0, 1.0]), 0.5) is None


def test_maxima_are_per_channel_over_all_batches(tmp_path: Path) -> None:
    model = model_of(
        [NODE("Relu", ["x"], ["h"]), NODE("MatMul", ["h", "w"], ["y"])],
        {"x": ["b", "t", 3]},
        {"y": ["b", "t", 3]},
        {"w": np.eye(3, dtype=np.float32)},
    )
    batches = [{"x": np.float32([[[1, -9, np.inf]]])}, {"x": np.float32([[[0, 2, 0]], [[5, 0, 3]]])}]
    seen = channel_maxima(model, ["x", "h", "y"], batches, tmp_path)
    np.testing.assert_array_equal(seen["x"], [5, 9, 3])
    np.testing.assert_array_equal(seen["h"], [5, 2, 3])


# What it is for


def test_int8_recovers_from_an_outlier_channel(tmp_path: Path) -> None:
    scale = np.ones(CHANNELS, np.float32)
    scale[3] = 100
    weight = normal(CHANNELS, CHANNELS, seed=4)
    weight[3] /= 100  # the outlier matters as much as the others: all are lost in its quantization step
    model = flat([LAYER_NORM, MATMUL], {"scale": scale, "shift": np.zeros_like(scale), "w": weight})
    result = SmoothQuant().run(model, context_of(tmp_path, MANY))
    plain, smooth = (int8_sqnr_db(made, model, tmp_path) for made in (model, result.model))
    assert plain < 10
    assert smooth > 35


# Where 1/s can be hidden


def gemm(name: str, first: str, *constants: str, transposed: int = 0) -> onnx.NodeProto:
    return NODE("Gemm", [first, *constants], [name], transB=transposed)


UP = {"up": normal(CHANNELS, CHANNELS, seed=5) * UNEVEN, "bias": UNEVEN}
HIDDEN = {
    "matmul": [NODE("MatMul", ["x", "up"], ["h"])],
    "matmul, bias, relu": [
        NODE("MatMul", ["x", "up"], ["a"]),
        NODE("Add", ["bias", "a"], ["c"]),
        NODE("Relu", ["c"], ["h"]),
    ],
    "gemm": [gemm("a", "x", "up", "bias"), NODE("LeakyRelu", ["a"], ["h"])],
    "gemm without bias": [gemm("h", "x", "up")],
    "transposed gemm": [gemm("h", "x", "upT", "bias", transposed=1)],
    "factor per channel": [NODE("Tanh", ["x"], ["a"]), NODE("Mul", ["a", "bias"], ["h"])],
    "divisor per channel": [NODE("Tanh", ["x"], ["a"]), NODE("Div", ["a", "bias"], ["h"])],
    "dividend per channel": [
        NODE("Sigmoid", ["x"], ["a"]),
        NODE("Div", ["bias", "a"], ["h"]),
    ],
    "one factor for all": [gemm("a", "x", "up", "bias"), NODE("Mul", ["half", "a"], ["h"])],
    "one divisor for all": [gemm("a", "x", "up", "bias"), NODE("Div", ["a", "half"], ["h"])],
    "one summand for all": [gemm("a", "x", "up"), NODE("Add", ["a", "half"], ["h"])],
    "difference": [gemm("a", "x", "up"), NODE("Sub", ["bias", "a"], ["h"])],
    "parametric relu": [gemm("a", "x", "up"), NODE("PRelu", ["a", "bias"], ["h"])],
    "gated": [
        gemm("a", "x", "up"),
        NODE("MatMul", ["x", "gate"], ["g"]),
        NODE("Sigmoid", ["g"], ["s"]),
        NODE("Mul", ["a", "s"], ["h"]),
    ],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_division_is_folded_into_what_makes_the_tensor(tmp_path: Path, name: str) -> None:
    extra = {"half": np.float32(0.5), "upT": UP["up"].T.copy(), "gate": normal(CHANNELS, CHANNELS, seed=6)}
    used = {tensor for node in HIDDEN[name] for tensor in node.input}
    weights = {key: value for key, value in (UP | extra).items() if key in used}
    nodes = [*HIDDEN[name], gemm("y", "h", "w", transposed=1)]
    result = smoothed(model := flat(nodes, weights | SQUARE), tmp_path)
    assert result.changed
    assert not result.counts["inserted"]
    assert op_counts(result.model) == op_counts(model)
    before, after = (channel_maxima(made, ["h"], BATCHES, tmp_path)["h"] for made in (model, result.model))
    rows = np.abs(SQUARE["w"]).max(axis=0)
    np.testing.assert_allclose(before / after, np.sqrt(before / rows), rtol=1e-4)


def test_chained_layers_balance_with_the_weights_that_they_end_up_with(tmp_path: Path) -> None:
    nodes = [
        LAYER_NORM,
        NODE("MatMul", ["h", "up"], ["a"]),
        NODE("Relu", ["a"], ["r"]),
        NODE("MatMul", ["r", "w"], ["y"]),
    ]
    result = smoothed(flat(nodes, SCALE | SQUARE | {"up": UP["up"]}), tmp_path)
    assert result.counts == {"folded": 2, "inserted": 0, "skipped": 0}
    weights = weights_of(result.model)
    seen = channel_maxima(result.model, ["h", "r"], BATCHES, tmp_path)
    np.testing.assert_allclose(seen["h"], np.abs(weights["up"]).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(seen["r"], np.abs(weights["w"]).max(axis=1), rtol=1e-5)


def test_nodes_that_read_the_same_tensor_share_one_division(tmp_path: Path) -> None:
    names = ("q", "k", "v")
    weights = {name: normal(CHANNELS, CHANNELS, seed=seed) for seed, name in enumerate(names)}
    nodes = [LAYER_NORM, *(NODE("MatMul", ["h", name], [f"{name}_out"]) for name in names)]
    model = flat(nodes, SCALE | weights, tuple(f"{name}_out" for name in names))
    result = smoothed(model, tmp_path)
    assert result.counts == {"folded": 1, "inserted": 0, "skipped": 0}
    largest = np.max([np.abs(weights_of(result.model)[name]).max(axis=1) for name in names], axis=0)
    np.testing.assert_allclose(channel_maxima(result.model, ["h"], BATCHES, tmp_path)["h"], largest, rtol=1e-5)


def test_parameters_that_several_normalizations_share_are_copied(tmp_path: Path) -> None:
    nodes = [
        LAYER_NORM,
        NODE("MatMul", ["h", "w"], ["a"]),
        NODE("LayerNormalization", ["a", "scale", "shift"], ["b"], name="norm2"),
        NODE("MatMul", ["b", "up"], ["y"]),
    ]
    result = smoothed(flat(nodes, SCALE | SQUARE | {"up": UP["up"]}), tmp_path)
    assert result.counts["folded"] == 2
    names = weights_of(result.model).keys()
    assert names == {"scale", "shift", "w", "up", "scale_of_norm2", "shift_of_norm2"}


# Where it cannot be hidden

OTHER_READER = [LAYER_NORM, MATMUL, NODE("Add", ["h", "y"], ["z"])]
GELU = [
    NODE("MatMul", ["x", "up"], ["a"]),
    NODE("Erf", ["a"], ["e"]),
    NODE("Add", ["e", "one"], ["e1"]),
    NODE("Mul", ["a", "e1"], ["m"]),
    NODE("Mul", ["m", "half"], ["h"]),
    MATMUL,
]
POSITIVE = [NODE("LayerNormalization", ["x", "ones", "tens"], ["p"])]
ONES = {"ones": np.ones(CHANNELS, np.float32), "tens": np.full(CHANNELS, 10, np.float32)}
NUMBERS = {"one": np.float32(1), "half": np.float32(0.5)}
OBSTACLES = {
    "residual": (flat(OTHER_READER, SCALE | SQUARE, ("z",)), "read elsewhere"),
    "output": (flat([LAYER_NORM, MATMUL], SCALE | SQUARE, ("y", "h")), "read elsewhere"),
    "input": (flat([NODE("MatMul", ["x", "w"], ["y"])], SQUARE), "an input"),
    "not homogeneous": (flat([NODE("Tanh", ["x"], ["h"]), MATMUL], SQUARE), "behind Tanh"),
    "clip": (flat([LAYER_NORM, NODE("Clip", ["h", "", "one"], ["c"]), NODE("MatMul", ["c", "w"], ["y"])],
                  SCALE | SQUARE | {"one": np.float32(1)}), "behind Clip"),
    "divisor": (flat([*POSITIVE, NODE("Div", ["x", "p"], ["h"]), MATMUL], SQUARE | ONES), "behind Div"),
    "one dividend for all": (flat([*POSITIVE, NODE("Div", ["half", "p"], ["h"]), MATMUL],
                                  SQUARE | ONES | {"half": np.float32(0.5)}), "behind Div"),
    "two tensors": (flat([NODE("Tanh", ["x"], ["a"]), NODE("Add", ["a", "x"], ["h"]), MATMUL], SQUARE), "behind Add"),
    "statistics per row": (flat([NODE("LayerNormalization", ["x", "w0"], ["a"]), NODE("Softmax", ["a"], ["h"]), MATMUL],
                                SQUARE | {"w0": UNEVEN}), "behind Softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_tensors_that_others_see_are_left_alone(tmp_path: Path, name: str) -> None:
    model, reason = OBSTACLES[name]
    result = smoothed(model, tmp_path)
    assert not result.changed
    assert result.model is model
    assert result.counts == {"folded": 0, "inserted": 0, "skipped": 1}
    assert f"left alone: {reason} (1)" in result.note


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_mul_is_inserted_only_on_request(tmp_path: Path, name: str) -> None:
    model, _ = OBSTACLES[name]
    result = smoothed(model, tmp_path, insert=True)
    assert result.counts == {"folded": 0, "inserted": 1, "skipped": 0}
    assert op_counts(result.model)["Mul"] == op_counts(model).get("Mul", 0) + 1
    (matmul,) = [node for node in result.model.graph.node if node.op_type == "MatMul"]
    seen = channel_maxima(result.model, [matmul.input[0]], BATCHES, tmp_path)[matmul.input[0]]
    np.testing.assert_allclose(seen, np.abs(weights_of(result.model)["w"]).max(axis=1), rtol=1e-5)


def test_one_mul_serves_all_readers_but_the_residual(tmp_path: Path) -> None:
    nodes = [*OTHER_READER, NODE("MatMul", ["h", "up"], ["y2"])]
    result = smoothed(flat(nodes, SCALE | SQUARE | {"up": UP["up"]}, ("z", "y2")), tmp_path, insert=True)
    assert result.counts["inserted"] == 1
    reads = {node.op_type + node.output[0]: node.input[0] for node in result.model.graph.node}
    assert reads["MatMuly"] == reads["MatMuly2"] != "h"
    assert reads["Addz"] == "h"


def test_the_factors_of_a_gelu_stay_single_numbers(tmp_path: Path) -> None:
    model = flat(GELU, UP | SQUARE | NUMBERS)
    assert smoothed(model, tmp_path).counts == {"folded": 0, "inserted": 0, "skipped": 2}
    assert weights_of(smoothed(model, tmp_path, insert=True).model)["half"].shape == ()


TIED = {
    "two tensors": [LAYER_NORM, NODE("MatMul", ["h", "w"], ["a"]), NODE("Tanh", ["a"], ["t"]),
                    NODE("MatMul", ["t", "w"], ["y"])],
    "its own maker": [NODE("MatMul", ["x", "w"], ["h"]), MATMUL],
    "another operator": [LAYER_NORM, NODE("MatMul", ["h", "w"], ["a"]), NODE("Add", ["a", "row"], ["y"]),
                         NODE("ReduceMax", ["w"], ["row"], axes=[0], keepdims=1)],
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_left_alone(tmp_path: Path, name: str) -> None:
    nodes = sorted(TIED[name], key=lambda node: node.op_type != "ReduceMax")
    result = smoothed(flat(nodes, SCALE | SQUARE), tmp_path, insert=True)
    assert not result.changed
    assert "weight read elsewhere" in result.note


def test_a_maker_with_a_tied_weight_is_not_divided(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "up"], ["h"]), MATMUL, NODE("MatMul", ["x", "up"], ["y2"])]
    result = smoothed(flat(nodes, {"up": UP["up"]} | SQUARE, ("y", "y2")), tmp_path)
    assert not result.changed
    assert result.counts["skipped"] == 2


def test_what_a_subgraph_reads_is_left_alone(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("t", FLOAT, ["b", CHANNELS])
    other = helper.make_tensor_value_info("e", FLOAT, ["b", CHANNELS])
    then = helper.make_graph([NODE("Identity", ["h"], ["t"])], "then", [], [value])
    otherwise = helper.make_graph([NODE("Neg", ["h"], ["e"])], "else", [], [other])
    choice = NODE("If", ["yes"], ["z"], then_branch=then, else_branch=otherwise)
    model = flat([LAYER_NORM, MATMUL, choice], SCALE | SQUARE | {"yes": np.array(True)}, ("y", "z"))
    result = smoothed(model, tmp_path)
    assert not result.changed
    assert smoothed(model, tmp_path, insert=True).changed


def test_a_bias_that_is_no_constant_stops_the_fold(tmp_path: Path) -> None:
    model = flat([NODE("Tanh", ["x"], ["t"]), gemm("h", "x", "up", "t"), MATMUL], {"up": UP["up"]} | SQUARE)
    assert "behind Gemm (1)" in smoothed(model, tmp_path).note


def test_transposed_activations_are_left_alone(tmp_path: Path) -> None:
    model = model_of([NODE("Gemm", ["x", "w"], ["y"], transA=1)], {"x": [4, 4]}, {"y": [4, 4]}, {"w": normal(4, 4)})
    result = SmoothQuant(insert=True).run(model, context_of(tmp_path, [{"x": normal(4, 4)}]))
    assert not result.changed
    assert result.note == "no MatMul or Gemm has a constant weight"


def test_another_output_of_the_maker_is_not_divided(tmp_path: Path) -> None:
    nodes = [NODE("LayerNormalization", ["x", "scale"], ["h", "mean"]), NODE("MatMul", ["mean", "w"], ["y"])]
    weights = {"scale": np.ones(1, np.float32), "w": normal(1, 3)}
    model = model_of(nodes, {"x": ["b", 1]}, {"y": ["b", 3], "h": ["b", 1]}, weights)
    result = SmoothQuant().run(model, context_of(tmp_path, [{"x": normal(4, 1)}]))
    assert not result.changed


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    model = flat([NODE("MatMul", ["x", "w"], ["x_smoothed"])], SQUARE, ("x_smoothed",))
    result = smoothed(model, tmp_path, insert=True)
    assert [node.output[0] for node in result.model.graph.node] == ["x_smoothed_2", "x_smoothed"]


def test_weights_that_callers_may_replace_are_no_constants(tmp_path: Path) -> None:
    model = flat([LAYER_NORM, MATMUL], SCALE | SQUARE)
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [CHANNELS, CHANNELS]))
    assert smoothed(model, tmp_path, insert=True).note == "no MatMul or Gemm has a constant weight"


# Degenerate data


def test_dead_channels_stay_finite(tmp_path: Path) -> None:
    scale, weight = UNEVEN.copy(), SQUARE["w"].copy()
    scale[0], weight[1] = 0, 0
    shift = np.zeros_like(scale)
    result = smoothed(flat([LAYER_NORM, MATMUL], {"scale": scale, "shift": shift, "w": weight}), tmp_path)
    assert result.counts["folded"] == 1
    assert all(np.isfinite(array).all() for array in weights_of(result.model).values())


def test_a_tensor_that_is_always_zero_is_left_alone(tmp_path: Path) -> None:
    zeros = {"scale": np.zeros_like(UNEVEN), "shift": np.zeros_like(UNEVEN)}
    result = smoothed(flat([LAYER_NORM, MATMUL], zeros | SQUARE), tmp_path)
    assert "always zero (1)" in result.note


# Bad input


def test_without_data_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no calibration data"):
        SmoothQuant().run(flat([LAYER_NORM, MATMUL], SCALE | SQUARE), context_of(tmp_path))


def test_data_that_does_not_fit_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        SmoothQuant().run(flat([LAYER_NORM, MATMUL], SCALE | SQUARE), context_of(tmp_path, [{"x": normal(2, 5)}]))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_must_be_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        SmoothQuant(alpha)
