from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.passes.check import answers
from optimizers.passes.refit import (
    Unsuited,
    Weights,
    editable,
    linear_layers,
    observed_moments,
    read_layer,
    refit_kept,
    relative_output_error,
    require_calibration,
    ridge,
    ridge_strength,
    stored,
    write_layer,
)
from tests.optimizers.graphs import NODE, context_of, model_of, normal


def correlated(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Rows of ReLU features that share a few causes."""
    mixing = np.random.default_rng(1).standard_normal((inputs // 4, inputs))
    return np.maximum(np.random.default_rng(seed).standard_normal((rows, inputs // 4)) @ mixing, 0)


def gram_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


# Closed forms


def test_ridge_finds_the_weights_that_made_the_outputs() -> None:
    x, true = np.random.default_rng(0).standard_normal((200, 12)), normal(12, 5).astype(np.float64)
    found = ridge(gram_of(x), x.T @ (x @ true) / 200, np.zeros((12, 5)), 0)
    np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-4)


def test_ridge_minimizes_the_error_plus_the_distance_to_the_old_weights() -> None:
    x, y, old = correlated(100, 16), np.random.default_rng(2).standard_normal((100, 3)), np.ones((16, 3))
    gram, strength = gram_of(x), 0.1
    pull = strength * np.trace(gram) / 16

    def loss(w: np.ndarray) -> float:
        return float(np.sum((x @ w - y) ** 2) / 100 + pull * np.sum((w - old) ** 2))

    best = ridge(gram, x.T @ y / 100, old, strength)
    nudges = (1e-3 * np.random.default_rng(seed).standard_normal((16, 3)) for seed in range(20))
    assert all(loss(best) < loss(best + nudge) for nudge in nudges)


@pytest.mark.parametrize("gram", [np.zeros((6, 6)), np.ones((6, 6)), np.diag([1e-30, 0, 0, 1e30, 1, 1])])
def test_a_singular_gram_matrix_gives_finite_weights(gram: np.ndarray) -> None:
    old = np.ones((6, 2))
    assert np.isfinite(ridge(gram, gram @ old, old, 0)).all()
    np.testing.assert_allclose(ridge(gram, gram @ old, old, 0), old)  # they already give these outputs


def test_a_refit_recovers_most_of_what_dropping_inputs_loses_on_other_rows() -> None:
    x, held_out, weight = correlated(2000, 64), correlated(2000, 64, seed=5), normal(64, 16).astype(np.float64)
    kept = np.arange(0, 64)[np.arange(64) % 4 != 0]
    gram, dropped, fitted = gram_of(x), np.zeros_like(weight), np.zeros_like(weight)
    dropped[kept] = weight[kept]
    fitted[kept] = refit_kept(gram, weight, kept, ridge_strength(gram, 2000))
    without, with_refit = (relative_output_error(weight, w, gram_of(held_out)) for w in (dropped, fitted))
    assert 10 * np.log10(without / with_refit) > 5


def test_a_strong_ridge_is_dropping() -> None:
    x, weight, kept = correlated(50, 16), normal(16, 4).astype(np.float64), np.array([0, 3, 7])
    np.testing.assert_allclose(refit_kept(gram_of(x), weight, kept, 1e9), weight[kept], atol=1e-6)


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, weight = correlated(40, 16), normal(16, 4).astype(np.float64)
    candidate = weight + 0.1 * normal(16, 4, seed=1)
    expected = np.sum((x @ (candidate - weight)) ** 2) / np.sum((x @ weight) ** 2)
    assert relative_output_error(weight, candidate, gram_of(x)) == pytest.approx(expected)
    assert relative_output_error(weight, weight, gram_of(x)) == 0
    assert relative_output_error(np.zeros((16, 4)), candidate, gram_of(x)) == float("inf")


def test_the_fewer_rows_the_stronger_the_ridge() -> None:
    few, some, many = (ridge_strength(gram_of(correlated(n, 64)), n) for n in (8, 100, 5000))
    assert few > 4 * some > 16 * many
    assert ridge_strength(np.eye(4), 10) == 1e3  # nothing is correlated: there is nothing to refit by
    assert ridge_strength(np.zeros((4, 4)), 10) == 1e3


def test_with_few_rows_the_ridge_beats_plain_least_squares_on_other_rows() -> None:
    x, held_out = correlated(24, 64), gram_of(correlated(2000, 64, seed=5))
    weight, kept, gram = normal(64, 16).astype(np.float64), np.arange(16, 64), gram_of(x)
    errors = []
    for strength in (1e-6, ridge_strength(gram, 24)):
        fitted = np.zeros_like(weight)
        fitted[kept] = refit_kept(gram, weight, kept, strength)
        errors.append(relative_output_error(weight, fitted, held_out))
    assert errors[1] < 0.8 * errors[0]


# Layers


LAYERS = {
    "matmul": ([NODE("MatMul", ["x", "w"], ["y"], name="n")], (6, 4), ["b", 6], ["b", 4]),
    "matmul-add": (
        [NODE("MatMul", ["x", "w"], ["h"], name="n"), NODE("Add", ["c", "h"], ["y"], name="a")],
        (6, 4),
        ["b", 6],
        ["b", 4],
    ),
    "gemm": ([NODE("Gemm", ["x", "w"], ["y"], name="n")], (6, 4), ["b", 6], ["b", 4]),
    "gemm-trans": ([NODE("Gemm", ["x", "w", "c"], ["y"], name="n", transB=1)], (4, 6), ["b", 6], ["b", 4]),
    "conv": ([NODE("Conv", ["x", "w", "c"], ["y"], name="n")], (4, 2, 3, 1), ["b", 2, 3, 1], ["b", 4, 1, 1]),
}


@pytest.fixture(params=LAYERS)
def one(request: pytest.FixtureRequest) -> onnx.ModelProto:
    nodes, shape, given, made = LAYERS[request.param]
    weights = {"w": normal(*shape)}
    if any("c" in node.input for node in nodes):
        weights["c"] = normal(4, seed=3)
    return model_of(nodes, {"x": given}, {"y": made}, weights)


def test_layers_are_matrices(one: onnx.ModelProto, tmp_path: Path) -> None:
    model = editable(one)
    (layer,), skipped = linear_layers(Weights(model))
    assert not skipped
    assert layer.matrix.shape == (6, 4) == (layer.inputs, layer.outputs)
    x = normal(5, *[dim.dim_value for dim in one.graph.input[0].type.tensor_type.shape.dim][1:])
    expected = x.reshape(5, 6) @ layer.matrix + (0 if layer.bias is None else layer.bias)
    np.testing.assert_allclose(answers(one, [{"x": x}], tmp_path)[0]["y"].reshape(5, 4), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stored(layer, layer.matrix), numpy_helper.to_array(layer.tensor))


def test_layers_are_written_as_they_are_read(one: onnx.ModelProto) -> None:
    model = editable(one)
    weights = Weights(model)
    ((layer,), _), matrix = linear_layers(weights), normal(6, 4, seed=9).astype(np.float64)
    bias = None if layer.bias is None else normal(4, seed=8).astype(np.float64)
    write_layer(weights, layer, matrix, bias)
    onnx.checker.check_model(model)
    again = read_layer(Weights(model), layer.node)
    np.testing.assert_array_equal(again.matrix, matrix)
    assert (bias is None and again.bias is None) or np.array_equal(again.bias, bias)


def test_the_mean_and_the_covariance_come_from_the_data(one: onnx.ModelProto, tmp_path: Path) -> None:
    shape = [dim.dim_value for dim in one.graph.input[0].type.tensor_type.shape.dim][1:]
    data = [{"x": 3 + normal(7, *shape)}, {"x": 3 + normal(2, *shape, seed=1)}]
    model = editable(one)
    layers, _ = linear_layers(Weights(model))
    ((layer, moments),) = observed_moments(model, layers, context_of(tmp_path, data))
    rows = np.concatenate([batch["x"].reshape(-1, 6) for batch in data]).astype(np.float64)
    expected = rows.T @ rows / 9 if layer.bias is None else np.cov(rows.T, bias=True)
    np.testing.assert_allclose(layer.gram(moments), expected, atol=1e-5)


def gemm(weight: np.ndarray | None = None, **settings: float) -> onnx.ModelProto:
    weights = {"w": normal(4, 4) if weight is None else weight}
    return model_of([NODE("Gemm", ["x", "w"], ["y"], **settings)], {"x": [4, 4]}, {"y": [4, 4]}, weights)


def shared() -> onnx.ModelProto:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("MatMul", ["h", "w"], ["y"])]
    return model_of(nodes, {"x": [4, 4]}, {"y": [4, 4]}, {"w": normal(4, 4)})


def in_subgraph() -> onnx.ModelProto:
    inner = helper.make_graph(
        [NODE("Identity", ["w"], ["z"])], "inner", [], [helper.make_tensor_value_info("z", 1, [4, 4])]
    )
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("If", ["c"], ["i"], then_branch=inner, else_branch=inner),
        NODE("Add", ["h", "i"], ["y"]),
    ]
    return model_of(nodes, {"x": [4, 4]}, {"y": [4, 4]}, {"w": normal(4, 4), "c": np.array(True)})


def declared() -> onnx.ModelProto:
    nodes = [NODE("MatMul", ["x", "w"], ["y"])]
    return model_of(nodes, {"x": [4, 4]}, {"y": [4, 4], "w": [4, 4]}, {"w": normal(4, 4)})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (gemm(transA=1), "with a transposed or scaled input"),
        (gemm(alpha=0.5), "with a transposed or scaled input"),
        (gemm(normal(4, 4).astype(np.float16)), "without a constant FP32 matrix"),
        (declared(), "with a weight that is shared or an output"),
        (in_subgraph(), "with a weight that is shared or an output"),
    ],
    ids=["transA", "alpha", "fp16", "output", "subgraph"],
)
def test_layers_that_cannot_be_taken_are_counted(model: onnx.ModelProto, reason: str) -> None:
    layers, skipped = linear_layers(Weights(editable(model)))
    assert not layers
    assert skipped == {reason: 1}


def test_a_subgraph_that_returns_a_weight_reads_it() -> None:
    model = in_subgraph()
    for attribute in model.graph.node[1].attribute:
        del attribute.g.node[:]
        attribute.g.output[0].name = "w"
    assert linear_layers(Weights(model))[1] == {"with a weight that is shared or an output": 1}


def test_tied_weights_grouped_and_huge_layers_are_counted() -> None:
    assert linear_layers(Weights(shared()))[1] == {"with a weight that is shared or an output": 2}
    grouped = model_of(
        [NODE("Conv", ["x", "w"], ["y"], group=2)], {"x": [1, 4, 3]}, {"y": [1, 4, 3]}, {"w": normal(4, 2, 1)}
    )
    assert linear_layers(Weights(grouped))[1] == {"with several groups": 1}
    huge = model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": [1, 4100]}, {"y": [1, 2]}, {"w": normal(4100, 2)})
    assert linear_layers(Weights(huge))[1] == {"with more than 4096 inputs": 1}


def test_weights_that_callers_may_override_are_not_constant() -> None:
    model = gemm()
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 4]))
    assert linear_layers(Weights(model)) == ([], {})


@pytest.mark.parametrize("shape", [(4, 1), (4, 4)])
def test_a_bias_per_row_cannot_be_changed(shape: tuple[int, int]) -> None:
    model = gemm()
    model.graph.node[0].input.append("c")
    model.graph.initializer.append(numpy_helper.from_array(normal(*shape), "c"))
    layer = read_layer(Weights(model), model.graph.node[0])
    assert layer.bias is None
    with pytest.raises(ValueError, match="can have no bias"):
        write_layer(Weights(model), layer, layer.matrix, np.zeros(4))


def test_a_shared_bias_is_replaced_for_its_layer_only() -> None:
    nodes = [NODE("Gemm", ["x", "w", "c"], ["h"], name="n"), NODE("Add", ["h", "c"], ["y"])]
    model = model_of(nodes, {"x": [4, 4]}, {"y": [4, 4]}, {"w": normal(4, 4), "c": normal(4)})
    weights = Weights(model)
    layer = read_layer(weights, model.graph.node[0])
    write_layer(weights, layer, layer.matrix, np.full(4, 7.0))
    assert model.graph.node[1].input[1] == "c"
    np.testing.assert_array_equal(weights.constant("c"), normal(4))
    np.testing.assert_array_equal(weights.constant(model.graph.node[0].input[2]), np.full(4, 7, np.float32))


def test_every_node_gets_a_name_in_the_copy_only() -> None:
    model = shared()
    names = [node.name for node in editable(model).graph.node]
    assert len(set(names)) == 2
    assert all(names)
    assert not any(node.name for node in model.graph.node)


def test_a_layer_without_a_constant_weight_is_unsuited() -> None:
    model = model_of([NODE("MatMul", ["x", "x"], ["y"])], {"x": [4, 4]}, {"y": [4, 4]})
    with pytest.raises(Unsuited, match="without a constant FP32 matrix"):
        read_layer(Weights(model), model.graph.node[0])


def test_calibration_data_is_required(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no calibration data; give --calibration"):
        require_calibration(context_of(tmp_path))
