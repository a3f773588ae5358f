"""Moments of the inputs of weighted nodes, against what onnxruntime itself makes of them."""

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.passes.moments import input_moments, rows_of
from tests.optimizers.graphs import NODE, model_of, normal


def _conv_model(shape, weight, **settings):
    node = NODE("Conv", ["x", "w"], ["y"], name="conv", **settings)
    out = ["n", weight.shape[0], *[None] * (len(shape) - 2)]
    return model_of([node], {"x": [None, *shape[1:]]}, {"y": out}, {"w": weight})


def _run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((2, 3, 9), (4, 3, 3), {"pads": [2, 1], "strides": [2]}),
        ((2, 3, 9), (4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2]}),
        ((2, 3, 7, 8), (5, 3, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
        ((1, 2, 6, 7), (4, 2, 2, 4), {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
        ((1, 2, 6, 7), (4, 2, 3, 3), {"auto_pad": "VALID"}),
        ((2, 4, 6, 6), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((2, 4, 6, 6), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        ((2, 3, 5, 5), (4, 3, 1, 1), {}),
    ],
)
def test_moments_of_patches_predict_the_outputs_of_a_convolution(tmp_path, shape, kernel, settings):
    weight, x = normal(*kernel, seed=1), normal(*shape, seed=2) + 1
    model = _conv_model(shape, weight, **settings)
    found = input_moments(model, ["conv"], [{"x": x}], tmp_path)["conv"]
    y = np.moveaxis(_run(model, x), 1, 0).reshape(weight.shape[0], -1).astype(np.float64)
    groups = settings.get("group", 1)
    flat = weight.reshape(groups, weight.shape[0] // groups, -1).astype(np.float64)
    mean, gram = found.mean.reshape(groups, -1), found.gram.reshape(groups, flat.shape[-1], -1)
    assert found.rows == y.shape[1]
    np.testing.assert_allclose(np.einsum("gok,gk->go", flat, mean).ravel(), y.mean(axis=1), rtol=1e-4, atol=1e-5)
    power = np.einsum("gok,gkl,gol->go", flat, gram, flat).ravel()
    np.testing.assert_allclose(power, (y**2).mean(axis=1), rtol=1e-4)


def test_rows_of_matrix_products_are_their_last_axis_and_batches_may_differ_in_size(tmp_path):
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"], name="first"),
        NODE("Relu", ["h"], ["r"]),
        NODE("MatMul", ["r", "v"], ["y"], name="second"),
        NODE("MatMul", ["x", "u"], ["z"], name="twin"),
    ]
    weights = {"w": normal(5, 7), "v": normal(7, 2, seed=1), "u": normal(5, 2, seed=2)}
    model = model_of(nodes, {"x": [None, 3, 5]}, {"y": [None, 3, 2], "z": [None, 3, 2]}, weights)
    batches = [{"x": normal(4, 3, 5, seed=3)}, {"x": normal(1, 3, 5, seed=4)}]
    found = input_moments(model, ["first", "second", "twin"], batches, tmp_path)
    x = np.concatenate([batch["x"].reshape(-1, 5) for batch in batches])
    hidden = np.maximum(x @ weights["w"], 0)
    for name, rows in (("first", x), ("second", hidden)):
        assert found[name].rows == 15
        assert found[name].gram.dtype == np.float64
        np.testing.assert_allclose(found[name].mean, rows.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].gram, rows.T @ rows / 15, rtol=1e-5, atol=1e-6)
    assert found["twin"].gram is found["first"].gram


def test_transposed_input_of_gemm_has_its_rows_along_the_second_axis(tmp_path):
    node = NODE("Gemm", ["x", "w"], ["y"], name="gemm", transA=1, transB=1)
    model = model_of([node], {"x": [5, None]}, {"y": [None, 2]}, {"w": normal(2, 5)})
    x = normal(5, 9)
    found = input_moments(model, ["gemm"], [{"x": x}], tmp_path)["gemm"]
    assert found.rows == 9
    np.testing.assert_allclose(found.gram, x @ x.T / 9, rtol=1e-5, atol=1e-6)


def test_large_batches_count_with_4096_patches_that_are_the_same_in_every_run(tmp_path):
    model, x = _conv_model((1, 1, 70, 70), normal(1, 1, 1, 1)), normal(2, 1, 70, 70)
    first, second = (input_moments(model, ["conv"], [{"x": x}, {"x": x}], tmp_path)["conv"] for _ in range(2))
    assert first.rows == 2 * 4096
    assert np.array_equal(first.gram, second.gram)
    np.testing.assert_allclose(first.gram[0, 0], np.mean(x**2), rtol=0.05)
    window_of_one = input_moments(model, ["conv"], [{"x": x}], tmp_path)["conv"]
    assert not np.array_equal(first.gram, window_of_one.gram), "every batch must draw other patches"


def test_rows_with_infinities_do_not_count(tmp_path):
    model = model_of(
        [NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": [None, 2]}, {"y": [None, 1]}, {"w": normal(2, 1)}
    )
    x = np.float32([[1, 2], [np.inf, 3], [np.nan, 0]])
    found = input_moments(model, ["m"], [{"x": x}], tmp_path)["m"]
    assert found.rows == 1
    assert found.mean.tolist() == [1, 2]
    assert input_moments(model, ["m"], [{"x": x[1:]}], tmp_path) == {}


def test_nodes_without_constant_weight_are_refused_by_name(tmp_path):
    model = model_of([NODE("MatMul", ["x", "x"], ["y"], name="m")], {"x": [2, 2]}, {"y": [2, 2]})
    with pytest.raises(PassFailed, match="no MatMul, Gemm or Conv with a constant weight is called 'm'"):
        input_moments(model, ["m"], [{"x": normal(2, 2)}], tmp_path)


def test_data_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    nodes = [NODE("Relu", ["x"], ["r"]), NODE("MatMul", ["r", "w"], ["y"], name="m")]
    model = model_of(nodes, {"x": [None, 2]}, {"y": [None, 1]}, {"w": normal(2, 1)})
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        input_moments(model, ["m"], [{"x": normal(2, 3)}], tmp_path)


def test_subgraphs_do_not_matter_and_the_model_stays_as_it_was(tmp_path):
    branch = helper.make_graph([NODE("Neg", ["h"], ["b"])], "branch", [], [helper.make_tensor_value_info("b", 1, None)])
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"], name="m"),
        NODE("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = model_of(nodes, {"x": [None, 2]}, {"y": [None, 2]}, {"w": normal(2, 2)})
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    before = model.SerializeToString(deterministic=True)
    assert input_moments(model, ["m"], [{"x": normal(3, 2)}], tmp_path)["m"].rows == 3
    assert model.SerializeToString(deterministic=True) == before
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_vector_are_one_row():
    assert rows_of(normal(6), "rows").shape == (1, 6)
