from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optimizers.errors import PassFailed
from optimizers.graph import op_counts, signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.fp16 import Fp16
from optimizers.passes.sanitize import Sanitize
from tests.models import save_cnn, save_mlp, save_two_inputs
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of


def tidy(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    return Sanitize().run(model, context_of(tmp_path)).model


def half_weights(model: onnx.ModelProto) -> int:
    return sum(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


@pytest.mark.parametrize(("save", "name", "shape"), [(save_mlp, "x", (64,)), (save_cnn, "image", (3, 16, 16))])
def test_weights_become_half_and_inputs_and_outputs_stay(tmp_path: Path, save: object, name: str, shape: tuple) -> None:
    model = tidy(onnx.load(save(tmp_path / "model.onnx")), tmp_path)
    batch = {name: normal(8, *shape)}
    result = Fp16().run(model, context_of(tmp_path, [batch]))
    assert result.counts == {"weights": half_weights(result.model), "nodes_in_fp32": 0}
    assert half_weights(result.model) == len(model.graph.initializer)
    assert signature_of(result.model) == signature_of(model)
    assert op_counts(result.model) == op_counts(model) | {"Cast": 2}
    require_equivalent(model, result, "lossy", [batch], tmp_path)
    seen, expected = (next(iter(answers(m, [batch], tmp_path)[0].values())) for m in (result.model, model))
    # 11 bits of mantissa give 5e-4 per operation; few operations follow each other here.
    assert np.abs(seen - expected).max() < 0.01 * np.abs(expected).max()


def test_surviving_tensors_and_nodes_keep_their_names(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    half = Fp16().run(model, context_of(tmp_path)).model
    assert weights_of(half).keys() == weights_of(model).keys()
    assert {node.name for node in model.graph.node} <= {node.name for node in half.graph.node}
    hidden = {name for node in model.graph.node for name in node.output} - {"y"}
    assert hidden <= {name for node in half.graph.node for name in node.output}


def square(scale: float) -> onnx.ModelProto:
    """x -> x w -> squared -> mean -> root -> times 1: a norm, whose squares leave FP16 when x is large."""
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("Mul", ["h", "h"], ["hh"]),
        NODE("ReduceMean", ["hh"], ["m"], axes=[-1], keepdims=1),
        NODE("Sqrt", ["m"], ["root"]),
        NODE("MatMul", ["root", "one"], ["y"]),
    ]
    weights = {"w": np.eye(8, dtype=np.float32) * np.float32(scale), "one": np.ones((1, 4), np.float32)}
    return model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 4]}, weights)


def test_values_beyond_fp16_pass_from_node_to_node_in_fp32(tmp_path: Path) -> None:
    model = tidy(square(1000.0), tmp_path)
    batch = {"x": normal(8, 8)}
    result = Fp16().run(model, context_of(tmp_path, [batch]))
    assert result.counts == {"weights": 2, "nodes_in_fp32": 3, "kept_by_range": 3}
    assert result.note == "3 nodes stay FP32 (3 kept_by_range)"
    assert op_counts(result.model)["Cast"] == 4
    seen, expected = (answers(m, [batch], tmp_path)[0]["y"] for m in (result.model, model))
    np.testing.assert_allclose(seen, expected, rtol=5e-3)


def test_small_values_need_no_exception(tmp_path: Path) -> None:
    result = Fp16().run(tidy(square(1.0), tmp_path), context_of(tmp_path, [{"x": normal(8, 8)}]))
    assert result.counts["nodes_in_fp32"] == 0
    assert op_counts(result.model)["Cast"] == 2


def test_a_weight_beyond_fp16_keeps_its_node_in_fp32_without_any_data(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["x", "large"], ["h"]), NODE("MatMul", ["h", "w"], ["y"])]
    weights = {"large": np.array([1e6], np.float32), "w": normal(4, 4)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert result.counts == {"weights": 1, "nodes_in_fp32": 1, "kept_by_range": 1}


def test_an_epsilon_that_fp16_rounds_to_zero_reaches_the_division_that_it_protects(tmp_path: Path) -> None:
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("Abs", ["h"], ["a"]),
        NODE("Add", ["a", "epsilon"], ["positive"]),
        NODE("Div", ["h", "positive"], ["y"]),
    ]
    weights = {"w": normal(4, 4), "epsilon": np.array(1e-12, np.float32)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert result.counts == {"weights": 1, "nodes_in_fp32": 2, "kept_by_range": 2}  # the sum, and the division by it
    assert weights_of(result.model)["epsilon"] == np.float32(1e-12)
    zeros = {"x": np.zeros((2, 4), np.float32)}  # 0 / epsilon; a sum that went through FP16 would make it 0 / 0
    assert not answers(result.model, [zeros], tmp_path)[0]["y"].any()


def test_a_bias_that_rounds_to_zero_is_no_reason_to_stay(tmp_path: Path) -> None:
    nodes = [NODE("Gemm", ["x", "w", "bias"], ["y"])]
    weights = {"w": normal(4, 4), "bias": np.full(4, 1e-9, np.float32)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    assert Fp16().run(model, context_of(tmp_path)).counts == {"weights": 2, "nodes_in_fp32": 0}


def dense(depth: int, scale: float) -> onnx.ModelProto:
    """x [batch, depth] -> y [batch, 4], then once more; the products of the first layer cancel to small sums."""
    signs = np.where(np.arange(depth) % 2, -1.0, 1.0).astype(np.float32)
    weights = {"w": np.repeat(signs[:, None] * scale, 4, axis=1).astype(np.float32), "v": normal(4, 4)}
    nodes = [NODE("MatMul", ["x", "w"], ["h"], name="deep"), NODE("MatMul", ["h", "v"], ["y"])]
    return model_of(nodes, {"x": ["batch", depth]}, {"y": ["batch", 4]}, weights)


@pytest.mark.parametrize(
    ("depth", "scale", "kept"),
    [(512, 200.0, 1), (512, 100.0, 0), (128, 1000.0, 0)],
    ids=["512 x 200 = 102400", "512 x 100 fits", "too shallow to matter"],
)
def test_partial_sums_beyond_fp16_keep_a_deep_product_although_its_result_fits(
    tmp_path: Path, depth: int, scale: float, kept: int
) -> None:
    model = tidy(dense(depth, scale), tmp_path)
    result = Fp16().run(model, context_of(tmp_path, [{"x": np.ones((2, depth), np.float32)}]))
    assert result.counts.get("kept_by_depth", 0) == kept
    assert result.counts["nodes_in_fp32"] == kept


def reduced(op: str, length: int, **attributes: object) -> onnx.ModelProto:
    """x [batch, n] -> x w -> one reduction over n of unknown size -> y."""
    nodes = [NODE("Mul", ["x", "w"], ["h"]), NODE(op, ["h"], ["y"], **attributes)]
    shape = ["batch", "n"] if op == "Softmax" else ["batch", 1]
    return model_of(nodes, {"x": ["batch", "n"]}, {"y": shape}, {"w": np.array([0.5], np.float32)})


@pytest.mark.parametrize("op", ["ReduceMean", "Softmax"])
@pytest.mark.parametrize(("length", "kept"), [(2048, 0), (2049, 1)])
def test_a_running_sum_of_more_than_2048_terms_stays_in_fp32(tmp_path: Path, op: str, length: int, kept: int) -> None:
    model = tidy(reduced(op, length, **({"axis": -1} if op == "Softmax" else {"axes": [-1]})), tmp_path)
    result = Fp16().run(model, context_of(tmp_path, [{"x": normal(2, length)}]))
    assert result.counts.get("kept_by_depth", 0) == kept


def test_depth_of_an_axis_without_a_size_comes_from_the_data_only(tmp_path: Path) -> None:
    model = tidy(reduced("ReduceMean", 4096, axes=[-1]), tmp_path)
    assert "kept_by_depth" not in Fp16().run(model, context_of(tmp_path)).counts


def test_squares_inside_a_norm_may_overflow_in_a_shallow_layer(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["x", "w"], ["h"]), NODE("LayerNormalization", ["h", "scale", "shift"], ["y"], axis=-1)]
    weights = {"w": np.ones(1, np.float32), "scale": np.ones(16, np.float32), "shift": np.zeros(16, np.float32)}
    model = tidy(model_of(nodes, {"x": ["batch", 16]}, {"y": ["batch", 16]}, weights), tmp_path)
    for largest, kept in ((60.0, 0), (70.0, 1)):  # 16 x 70 x 70 is beyond 65504
        batch = {"x": np.linspace(-largest, largest, 32, dtype=np.float32).reshape(2, 16)}
        result = Fp16().run(model, context_of(tmp_path, [batch]))
        assert result.counts.get("kept_by_depth", 0) == kept


def test_an_operator_without_fp16_stays_and_is_counted(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("CumSum", ["h", "axis"], ["c"]), NODE("MatMul", ["c", "w"], ["y"])]
    weights = {"w": normal(4, 4), "axis": np.array(1, np.int64)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert result.counts == {"weights": 1, "nodes_in_fp32": 1, "kept_by_type": 1}
    require_equivalent(model, result, "lossy", [{"x": normal(3, 4)}], tmp_path)


def test_a_weight_that_an_fp32_node_reads_too_is_there_in_both_formats(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("CumSum", ["w", "axis"], ["c"]), NODE("MatMul", ["h", "c"], ["y"])]
    weights = {"w": normal(4, 4), "axis": np.array(1, np.int64)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    made = weights_of(result.model)
    np.testing.assert_array_equal(made["w"], weights["w"])
    np.testing.assert_array_equal(made["w_fp16"], weights["w"].astype(np.float16))
    assert op_counts(result.model)["Cast"] == 3  # input, output, and the sum
    require_equivalent(model, result, "lossy", [{"x": normal(3, 4)}], tmp_path)


def test_an_output_that_other_nodes_read_too_and_a_weight_that_is_one_stay_fp32(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Relu", ["h"], ["y"]), NODE("Identity", ["w"], ["copy"])]
    shapes = {"h": ["batch", 4], "y": ["batch", 4], "copy": [4, 4]}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, shapes, {"w": normal(4, 4)}), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert signature_of(result.model) == signature_of(model)
    batch = {"x": normal(3, 4)}
    require_equivalent(model, result, "lossy", [batch], tmp_path)
    seen, expected = (answers(m, [batch], tmp_path)[0] for m in (result.model, model))
    for name in shapes:
        np.testing.assert_allclose(seen[name], expected[name], atol=5e-3)


def test_scales_of_resize_stay_fp32(tmp_path: Path) -> None:
    nodes = [NODE("Conv", ["x", "w"], ["h"]), NODE("Resize", ["h", "", "scales"], ["y"], mode="nearest")]
    weights = {"w": normal(2, 3, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    model = tidy(model_of(nodes, {"x": ["batch", 3, 4, 4]}, {"y": ["batch", 2, 8, 8]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert weights_of(result.model)["scales"].dtype == np.float32
    assert result.counts == {"weights": 1, "nodes_in_fp32": 0}
    require_equivalent(model, result, "lossy", [{"x": normal(1, 3, 4, 4)}], tmp_path)


def test_a_model_whose_every_weight_must_stay_is_refused(tmp_path: Path) -> None:
    weights = {"w": normal(4, 4, scale=1e6)}
    model = model_of([NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights)
    with pytest.raises(PassFailed, match=r"no weight would be FP16: 1 nodes stay FP32 \(1 kept_by_range\)"):
        Fp16().run(model, context_of(tmp_path))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_two_inputs(tmp_path / "model.onnx"))
    with pytest.raises(PassFailed, match="no FP32 weights"):
        Fp16().run(model, context_of(tmp_path))


def test_control_flow_is_refused_by_name(tmp_path: Path) -> None:
    branch = helper.make_graph([NODE("Relu", ["h"], ["r"])], "branch", [], [helper.make_empty_tensor_value_info("r")])
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("If", ["flag"], ["y"], then_branch=branch, else_branch=branch),
    ]
    weights = {"w": normal(4, 4), "flag": np.array(True)}
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights)
    with pytest.raises(PassFailed, match=r"control flow \(If\)"):
        Fp16().run(model, context_of(tmp_path))


def test_calibration_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        Fp16().run(model, context_of(tmp_path, [{"x": normal(4, 63)}]))


def test_the_input_model_stays_as_it_is(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    before = model.SerializeToString()
    Fp16().run(model, context_of(tmp_path, [{"x": normal(4, 64)}]))
    assert model.SerializeToString() == before
