from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import op_counts
from optimizers.passes.fuse_gemm import GEMM_RULES
from tests.optimizers.graphs import NODE, model_of, normal
from tests.optimizers.rewriting import fused, refusals

X = {"x": normal(5, 8, seed=9)}


def linear(bias: np.ndarray, axes: list | None = None, swapped: bool = False) -> onnx.ModelProto:
    nodes = [
        NODE("MatMul", ["x", "w"], ["m"], name="product"),
        NODE("Add", ["b", "m"] if swapped else ["m", "b"], ["y"]),
    ]
    shape = axes or ["batch", 8]
    return model_of(nodes, {"x": shape}, {"y": [None] * max(len(shape), bias.ndim)}, {"w": normal(8, 6), "b": bias})


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_a_product_and_its_bias_become_one_gemm(tmp_path: Path, shape: tuple, swapped: bool) -> None:
    model = linear(np.asarray(normal(*shape, seed=1), np.float32), swapped=swapped)
    result = fused(model, "gemm", [X], tmp_path)
    assert result.counts == {"MatMul+Add": 1}
    assert op_counts(result.model) == {"Gemm": 1}
    assert result.model.graph.node[0].name == "product"


def test_products_of_more_axes_are_refused(tmp_path: Path) -> None:
    model = linear(normal(6), ["batch", 3, 8])
    assert not fused(model, "gemm", [], tmp_path).changed
    assert "the factors have 3 and 2 axes" in refusals(model, GEMM_RULES["MatMul+Add"])


@pytest.mark.parametrize("shape", [(5, 1), (5, 6), (2, 1, 6)])
def test_a_bias_of_wrong_shape_is_refused(tmp_path: Path, shape: tuple) -> None:
    model = linear(normal(*shape))
    assert not fused(model, "gemm", [], tmp_path).changed
    assert f"the bias has shape {list(shape)}, the product has 6 columns" in refusals(model, GEMM_RULES["MatMul+Add"])


def test_a_product_with_two_readers_is_left_alone(tmp_path: Path) -> None:
    model = linear(normal(6))
    model.graph.node.append(NODE("Relu", ["m"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [None, 6]))
    assert not fused(model, "gemm", [], tmp_path).changed


def test_a_product_of_two_inputs_is_refused(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "v"], ["m"]), NODE("Add", ["m", "b"], ["y"])]
    model = model_of(nodes, {"x": ["batch", 8], "v": [8, 6]}, {"y": [None, 6]}, {"b": normal(6)})
    assert not fused(model, "gemm", [], tmp_path).changed
    assert "'v' is not a constant weight" in refusals(model, GEMM_RULES["MatMul+Add"])


def normalized(bias_shape: tuple = (6,), **attributes: object) -> onnx.ModelProto:
    nodes = [
        NODE("Gemm", ["x", "w", "c"], ["g"], **attributes),
        NODE("BatchNormalization", ["g", "gamma", "beta", "mean", "var"], ["y"]),
    ]
    weights = {
        "w": normal(*((6, 8) if attributes.get("transB") else (8, 6))),
        "c": normal(*bias_shape, seed=1),
        "gamma": normal(6, seed=2),
        "beta": normal(6, seed=3),
        "mean": normal(6, seed=4),
        "var": np.abs(normal(6, seed=5)) + np.float32(0.5),
    }
    return model_of(nodes, {"x": ["batch", 8]}, {"y": [None, 6]}, weights)


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 2.0, "beta": 0.5}])
def test_batch_normalization_scales_the_columns(tmp_path: Path, attributes: dict) -> None:
    result = fused(normalized(**attributes), "gemm", [X], tmp_path)
    assert result.counts == {"Gemm+BatchNormalization": 1}
    assert op_counts(result.model) == {"Gemm": 1}


def test_a_bias_for_each_row_stays_before_the_normalization(tmp_path: Path) -> None:
    model = normalized((5, 1))
    assert not fused(model, "gemm", [], tmp_path).changed
    assert "which is not one element per column" in refusals(model, GEMM_RULES["Gemm+BatchNormalization"])
