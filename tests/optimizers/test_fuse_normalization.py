from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import foreign_ops, op_counts
from optimizers.passes.fuse_normalization import NORMALIZATION_RULES
from tests.optimizers.graphs import NODE, model_of, normal
from tests.optimizers.rewriting import fused, refusals

X = {"x": normal(3, 5, 8, seed=9)}
RULES = NORMALIZATION_RULES["LayerNormalization"]


def means(opset: int, axis: int, source: str, result: str) -> onnx.NodeProto:
    if opset < 18:
        return NODE("ReduceMean", [source], [result], keepdims=1, axes=[axis])
    return NODE("ReduceMean", [source, "axis"], [result], keepdims=1)


def layer_norm(
    opset: int = 18,
    axis: int = -1,
    square: str = "Pow",
    divide: str = "Div",
    twice: bool = False,
    scale: tuple = (8,),
    bias: tuple | None = (8,),
    extra: tuple[onnx.NodeProto, ...] = (),
) -> onnx.ModelProto:
    other = "d2" if twice else "d"
    nodes = [means(opset, axis, "x", "mean"), NODE("Sub", ["x", "mean"], ["d"], name="centre")]
    nodes += [NODE("Sub", ["x", "mean"], ["d2"])] if twice else []
    nodes += [NODE("Pow", [other, "two"], ["dd"]) if square == "Pow" else NODE("Mul", [other, other], ["dd"])]
    nodes += [means(opset, axis, "dd", "var"), NODE("Add", ["eps", "var"], ["ve"]), NODE("Sqrt", ["ve"], ["std"])]
    nodes += (
        [NODE("Div", ["d", "std"], ["n"])]
        if divide == "Div"
        else [NODE("Reciprocal", ["std"], ["r"]), NODE("Mul", ["r", "d"], ["n"])]
    )
    nodes += [NODE("Mul", ["scale", "n"], ["s" if bias else "y"], name="scaled")]
    nodes += [NODE("Add", ["bias", "s"], ["y"])] if bias else []
    weights = {"eps": np.array(1e-5, np.float32), "two": np.array(2, np.float32), "axis": np.array([axis])}
    weights |= {"scale": normal(*scale), "bias": normal(*(bias or (1,)), seed=1)}
    inputs, outputs = {"x": ["batch", 5, 8]}, {"y": ["batch", 5, 8], **{node.output[0]: None for node in extra}}
    return model_of([*nodes, *extra], inputs, outputs, weights, opset)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("divide", ["Div", "Reciprocal"])
@pytest.mark.parametrize("twice", [False, True])
def test_every_spelling_becomes_one_operator(
    tmp_path: Path, opset: int, axis: int, square: str, divide: str, twice: bool
) -> None:
    result = fused(layer_norm(opset, axis, square, divide, twice), "normalization", [X], tmp_path)
    assert result.counts == {"LayerNormalization": 1, "LayerNormalization+Add": 1}
    assert op_counts(result.model) == {"LayerNormalization": 1}
    assert foreign_ops(result.model) == []
    assert result.model.graph.node[0].name == "scaled"


def test_a_normalization_without_bias_is_formed_too(tmp_path: Path) -> None:
    result = fused(layer_norm(bias=None), "normalization", [X], tmp_path)
    assert result.counts == {"LayerNormalization": 1}


def test_a_bias_that_does_not_fit_the_last_axis_stays_outside(tmp_path: Path) -> None:
    result = fused(layer_norm(bias=(5, 1)), "normalization", [X], tmp_path)
    assert op_counts(result.model) == {"Add": 1, "LayerNormalization": 1}
    refused = refusals(result.model, NORMALIZATION_RULES["LayerNormalization+Add"])
    assert "the bias has shape [5, 1], the last axis of 'x' has size 8" in refused


def test_it_is_not_formed_before_it_exists(tmp_path: Path) -> None:
    assert not fused(layer_norm(opset=16), "normalization", [], tmp_path).changed


def test_means_over_another_axis_are_refused(tmp_path: Path) -> None:
    model = layer_norm(axis=1, scale=(5, 1), bias=None)
    assert not fused(model, "normalization", [], tmp_path).changed
    assert "the variance is not the mean of squares over the last axis" in refusals(model, RULES)


def test_a_scale_of_wrong_shape_is_refused(tmp_path: Path) -> None:
    model = layer_norm(scale=(1,), bias=None)
    assert not fused(model, "normalization", [], tmp_path).changed
    assert "the scale has shape [1], the last axis of 'x' has size 8" in refusals(model, RULES)


def test_an_epsilon_that_is_an_input_is_refused(tmp_path: Path) -> None:
    model = layer_norm(bias=None)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "eps"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(onnx.helper.make_tensor_value_info("eps", onnx.TensorProto.FLOAT, []))
    assert not fused(model, "normalization", [], tmp_path).changed
    assert "epsilon is not constant" in refusals(model, RULES)


@pytest.mark.parametrize("value", ["d", "dd", "var", "ve", "std", "n"])
def test_a_value_in_between_with_two_readers_is_refused(tmp_path: Path, value: str) -> None:
    model = layer_norm(bias=None)
    model.graph.node.append(NODE("Relu", [value], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    assert not fused(model, "normalization", [], tmp_path).changed


def test_a_deviation_from_something_else_than_the_mean_is_refused(tmp_path: Path) -> None:
    model = layer_norm(bias=None)
    model.graph.node[1].input[1] = "eps"
    assert not fused(model, "normalization", [], tmp_path).changed
    assert "not x minus its mean" in refusals(model, RULES)
