import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import foreign_ops, op_counts
from optimizers.passes.fuse_activation import GELU_RULES, HARDSWISH_RULES
from tests.optimizers.graphs import NODE, model_of, normal
from tests.optimizers.rewriting import fused, refusals

X = {"x": normal(3, 8, seed=9, scale=2)}
CONSTANTS = {
    "root2": math.sqrt(2),
    "inverse_root2": math.sqrt(0.5),
    "one": 1,
    "half": 0.5,
    "two": 2,
    "three": 3,
    "slope": math.sqrt(2 / math.pi),
    "cube": 0.044715,
    "six": 6,
    "zero": 0,
    "sixth": 1 / 6,
}

ERF = {
    "divided": [("Div", "x", "root2", "d"), ("Erf", "d", "f")],
    "multiplied": [("Mul", "inverse_root2", "x", "d"), ("Erf", "d", "f")],
}
TANH = {
    "power": [
        ("Pow", "x", "three", "p"),
        ("Mul", "cube", "p", "q"),
        ("Add", "x", "q", "s"),
        ("Mul", "slope", "s", "d"),
        ("Tanh", "d", "f"),
    ],
    "products": [
        ("Mul", "x", "x", "p"),
        ("Mul", "p", "cube", "q"),
        ("Add", "q", "one", "s"),
        ("Mul", "x", "s", "t"),
        ("Mul", "t", "slope", "d"),
        ("Tanh", "d", "f"),
    ],
}
AROUND = {
    "x(1+f), then half": [("Add", "f", "one", "a"), ("Mul", "x", "a", "m"), ("Mul", "m", "half", "y")],
    "half x, then (1+f)": [("Add", "one", "f", "a"), ("Mul", "half", "x", "m"), ("Mul", "m", "a", "y")],
    "x times half (1+f)": [("Add", "f", "one", "a"), ("Mul", "a", "half", "m"), ("Mul", "x", "m", "y")],
}
ONLY_ERF = {
    "sum of products": [
        ("Mul", "x", "half", "m"),
        ("Mul", "x", "half", "n"),
        ("Mul", "n", "f", "o"),
        ("Add", "m", "o", "y"),
    ],
    "divided by two": [("Add", "f", "one", "a"), ("Mul", "x", "a", "m"), ("Div", "m", "two", "y")],
}


def build(steps: list[tuple], opset: int = 20, outputs: tuple[str, ...] = ("y",), **changed: float) -> onnx.ModelProto:
    nodes = [NODE(op_type, names[:-1], [names[-1]], name=f"make_{names[-1]}") for op_type, *names in steps]
    weights = {name: np.array(value, np.float32) for name, value in (CONSTANTS | changed).items()}
    return model_of(nodes, {"x": ["batch", 8]}, {name: ["batch", 8] for name in outputs}, weights, opset, 9)


@pytest.mark.parametrize("inner", ERF)
@pytest.mark.parametrize("outer", AROUND | ONLY_ERF)
def test_every_order_of_gelu_becomes_one_operator(tmp_path: Path, inner: str, outer: str) -> None:
    result = fused(build(ERF[inner] + (AROUND | ONLY_ERF)[outer]), "activation", [X], tmp_path)
    assert result.counts == {"Gelu": 1}
    assert op_counts(result.model) == {"Gelu": 1}
    assert foreign_ops(result.model) == []
    assert result.model.graph.node[0].name == "make_y"


@pytest.mark.parametrize("inner", TANH)
@pytest.mark.parametrize("outer", AROUND)
def test_every_order_of_the_tanh_form_becomes_one_operator(tmp_path: Path, inner: str, outer: str) -> None:
    result = fused(build(TANH[inner] + AROUND[outer]), "activation", [X], tmp_path)
    assert result.counts == {"Gelu(tanh)": 1}
    assert result.model.graph.node[0].attribute[0].s == b"tanh"


def test_gelu_is_not_formed_before_it_exists(tmp_path: Path) -> None:
    model = build(ERF["divided"] + AROUND["x(1+f), then half"], opset=19)
    assert not fused(model, "activation", [], tmp_path).changed


@pytest.mark.parametrize("changed", [{"half": 0.51}, {"one": 1.01}, {"root2": 1.0}])
def test_other_constants_are_refused(tmp_path: Path, changed: dict) -> None:
    model = build(ERF["divided"] + AROUND["x(1+f), then half"], **changed)
    assert not fused(model, "activation", [], tmp_path).changed
    reason = "argument" if "root2" in changed else "constants around the nonlinear part"
    assert reason in refusals(model, GELU_RULES["Gelu"])


def test_another_cubic_is_refused(tmp_path: Path) -> None:
    model = build(TANH["power"] + AROUND["x(1+f), then half"], cube=0.05)
    assert not fused(model, "activation", [], tmp_path).changed
    assert "argument of the nonlinear part" in refusals(model, GELU_RULES["Gelu(tanh)"])


@pytest.mark.parametrize("value", ["d", "f", "a", "m"])
def test_a_value_in_between_that_is_an_output_is_refused(tmp_path: Path, value: str) -> None:
    model = build(ERF["divided"] + AROUND["x(1+f), then half"], outputs=("y", value))
    assert not fused(model, "activation", [], tmp_path).changed


def test_a_constant_of_more_axes_is_refused(tmp_path: Path) -> None:
    model = build(ERF["divided"] + AROUND["x(1+f), then half"])
    half = next(tensor for tensor in model.graph.initializer if tensor.name == "half")
    half.dims.extend([1, 1, 1])
    shape = model.graph.output[0].type.tensor_type.shape
    shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_value=1))
    assert not fused(model, "activation", [], tmp_path).changed


HARD = {
    "divided": [
        ("Add", "x", "three", "a"),
        ("Clip", "a", "zero", "six", "f"),
        ("Mul", "x", "f", "m"),
        ("Div", "m", "six", "y"),
    ],
    "first divided": [
        ("Add", "three", "x", "a"),
        ("Clip", "a", "zero", "six", "f"),
        ("Div", "f", "six", "m"),
        ("Mul", "x", "m", "y"),
    ],
    "multiplied": [
        ("Add", "x", "three", "a"),
        ("Clip", "a", "zero", "six", "f"),
        ("Mul", "f", "sixth", "m"),
        ("Mul", "m", "x", "y"),
    ],
}


@pytest.mark.parametrize("form", HARD)
def test_every_order_of_hard_swish_becomes_one_operator(tmp_path: Path, form: str) -> None:
    result = fused(build(HARD[form], opset=14), "activation", [X], tmp_path)
    assert result.counts == {"HardSwish": 1}
    assert op_counts(result.model) == {"HardSwish": 1}


def test_hard_swish_is_formed_from_hard_sigmoid(tmp_path: Path) -> None:
    nodes = [NODE("HardSigmoid", ["x"], ["f"], alpha=1 / 6, beta=0.5), NODE("Mul", ["f", "x"], ["y"])]
    result = fused(model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]}), "activation", [X], tmp_path)
    assert result.counts == {"HardSwish": 1}
    nodes[0].attribute[0].f = 0.2
    other = model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]})
    assert not fused(other, "activation", [], tmp_path).changed


def test_another_upper_bound_of_hard_swish_is_refused(tmp_path: Path) -> None:
    model = build([(*step[:-2], "three", "f") if step[0] == "Clip" else step for step in HARD["divided"]])
    assert not fused(model, "activation", [], tmp_path).changed
    assert "argument of the nonlinear part" in refusals(model, HARDSWISH_RULES["HardSwish"])
