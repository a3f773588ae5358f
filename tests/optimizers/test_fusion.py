from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.graph import foreign_ops, op_counts, signature_of
from optimizers.passes import fusion
from optimizers.passes.check import require_equivalent
from optimizers.passes.fusion import Fuse, OrtBasic
from tests.models import save_cnn, save_mlp, save_two_inputs
from tests.optimizers.graphs import NODE, context_of, model_of, normal


def layer_norm(opset: int = 18) -> onnx.ModelProto:
    axes = {"axes": [-1]} if opset < 18 else {}
    last = [] if opset < 18 else ["last"]
    nodes = [
        NODE("ReduceMean", ["x", *last], ["mean"], keepdims=1, **axes),
        NODE("Sub", ["x", "mean"], ["d"]),
        NODE("Mul", ["d", "d"], ["dd"]),
        NODE("ReduceMean", ["dd", *last], ["var"], keepdims=1, **axes),
        NODE("Add", ["var", "eps"], ["ve"]),
        NODE("Sqrt", ["ve"], ["std"]),
        NODE("Div", ["d", "std"], ["n"]),
        NODE("Mul", ["n", "scale"], ["s"]),
        NODE("Add", ["s", "bias"], ["y"]),
    ]
    weights = {"eps": np.array(1e-5, np.float32), "scale": normal(8), "bias": normal(8, seed=1)}
    if last:
        weights["last"] = np.array([-1])
    return model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]}, weights, opset)


def gelu() -> onnx.ModelProto:
    nodes = [
        NODE("Div", ["x", "root2"], ["d"]),
        NODE("Erf", ["d"], ["e"]),
        NODE("Add", ["e", "one"], ["a"]),
        NODE("Mul", ["x", "a"], ["m"]),
        NODE("Mul", ["m", "half"], ["y"]),
    ]
    weights = {"root2": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
    arrays = {name: np.array(value) for name, value in weights.items()}
    return model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]}, arrays, opset=20, ir_version=9)


def test_batch_normalization_disappears_into_the_convolution(tmp_path: Path) -> None:
    model = onnx.load(save_cnn(tmp_path / "model.onnx"))
    result = Fuse().run(model, context_of(tmp_path))
    assert "BatchNormalization" not in op_counts(result.model)
    assert result.counts == {"Conv+BatchNormalization": 1}
    require_equivalent(model, result, Fuse().spec.effect, [{"image": normal(3, 3, 16, 16)}], tmp_path)


def test_layer_normalization_becomes_one_standard_operator(tmp_path: Path) -> None:
    model = layer_norm()
    result = Fuse().run(model, context_of(tmp_path))
    assert op_counts(result.model) == {"LayerNormalization": 1}
    assert foreign_ops(result.model) == []
    require_equivalent(model, result, Fuse().spec.effect, [{"x": normal(3, 8)}], tmp_path)


def test_layer_normalization_is_not_formed_before_it_exists(tmp_path: Path) -> None:
    result = Fuse().run(layer_norm(opset=16), context_of(tmp_path))
    assert not result.changed
    assert result.note == "no pattern found"


def test_gelu_becomes_one_standard_operator(tmp_path: Path) -> None:
    model = gelu()
    result = OrtBasic().run(model, context_of(tmp_path))
    assert op_counts(result.model) == {"Gelu": 1}
    assert [entry.domain for entry in result.model.opset_import] == [""]
    require_equivalent(model, result, OrtBasic().spec.effect, [{"x": normal(3, 8)}], tmp_path)


@pytest.mark.parametrize("step", [Fuse(), OrtBasic()])
@pytest.mark.parametrize("save", [save_mlp, save_cnn, save_two_inputs])
def test_signature_and_input_stay_as_they_are(tmp_path: Path, step: Fuse | OrtBasic, save: object) -> None:
    model = onnx.load(save(tmp_path / "model.onnx"))
    before = model.SerializeToString()
    result = step.run(model, context_of(tmp_path))
    assert signature_of(result.model) == signature_of(model)
    assert result.model.ir_version == model.ir_version
    assert model.SerializeToString() == before


def test_a_result_with_operators_of_one_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extended(source: Path, target: Path) -> None:
        made = onnx.load(source)
        made.graph.node[0].op_type, made.graph.node[0].domain = "FusedMatMul", "com.microsoft"
        made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        onnx.save(made, target)

    monkeypatch.setattr(fusion, "_optimize", extended)
    with pytest.raises(PassFailed, match=r"not portable: the result holds com\.microsoft:FusedMatMul"):
        OrtBasic().run(onnx.load(save_mlp(tmp_path / "model.onnx")), context_of(tmp_path))


def test_a_model_that_onnxruntime_cannot_open_is_a_refusal(tmp_path: Path) -> None:
    model = model_of([NODE("Relu", ["x"], ["y"], domain="unknown.domain")], {"x": [1]}, {"y": [1]})
    model.opset_import.append(onnx.helper.make_opsetid("unknown.domain", 1))
    with pytest.raises(PassFailed, match="onnxruntime cannot optimize"):
        OrtBasic().run(model, context_of(tmp_path))
