from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from optimizers.errors import PassFailed
from optimizers.graph import op_counts, signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.fp16 import Fp16
from optimizers.passes.sanitize import Sanitize
from tests.models import save_cnn, save_mlp, save_two_inputs
from tests.optimizers.graphs import NODE, context_of, model_of, normal


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
    require_equivalent(model, result, "lossy", [batch], tmp_path)
    seen, expected = (next(iter(answers(m, [batch], tmp_path)[0].values())) for m in (result.model, model))
    # 11 bits of mantissa give 5e-4 per operation; few operations follow each other here.
    assert np.abs(seen - expected).max() < 0.01 * np.abs(expected).max()


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
    assert result.counts["nodes_in_fp32"] == 3
    assert "3 nodes stay FP32" in result.note
    seen, expected = (answers(m, [batch], tmp_path)[0]["y"] for m in (result.model, model))
    np.testing.assert_allclose(seen, expected, rtol=5e-3)


def test_small_values_need_no_exception(tmp_path: Path) -> None:
    result = Fp16().run(tidy(square(1.0), tmp_path), context_of(tmp_path, [{"x": normal(8, 8)}]))
    assert result.counts["nodes_in_fp32"] == 0
    assert op_counts(result.model)["Cast"] == 2


def test_a_weight_beyond_fp16_keeps_its_node_in_fp32_without_any_data(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["x", "large"], ["h"]), NODE("MatMul", ["h", "w"], ["y"])]
    weights = {"large": np.array([1e6], np.float32), "w": normal(4, 4, scale=1e-6)}
    model = tidy(model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights), tmp_path)
    result = Fp16().run(model, context_of(tmp_path))
    assert result.counts == {"weights": 1, "nodes_in_fp32": 1}


def test_a_model_whose_every_weight_must_stay_is_refused(tmp_path: Path) -> None:
    weights = {"w": normal(4, 4, scale=1e6)}
    model = model_of([NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights)
    with pytest.raises(PassFailed, match="no weight would be FP16"):
        Fp16().run(model, context_of(tmp_path))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_two_inputs(tmp_path / "model.onnx"))
    with pytest.raises(PassFailed, match="no FP32 weights"):
        Fp16().run(model, context_of(tmp_path))


def test_the_input_model_stays_as_it_is(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    before = model.SerializeToString()
    Fp16().run(model, context_of(tmp_path, [{"x": normal(4, 64)}]))
    assert model.SerializeToString() == before
