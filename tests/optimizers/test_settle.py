import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from optimizers.graph import signature_of
from optimizers.passes import copy_of
from optimizers.passes import settle as module
from optimizers.passes.settle import settle
from tests.optimizers.graphs import NODE, model_of, normal


def of_one_runtime() -> onnx.ModelProto:
    """An operator that ONNX's own shape inference does not know, and more behind it."""
    nodes = [
        NODE("BiasGelu", ["x", "b"], ["g"], domain="com.microsoft"),
        NODE("MatMul", ["g", "w"], ["m"]),
        NODE("Relu", ["m"], ["y"]),
    ]
    model = model_of(nodes, {"x": ["batch", 8]}, {"y": ["batch", 6]}, {"b": normal(8), "w": normal(8, 6)})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def shapes(model: onnx.ModelProto) -> dict[str, list]:
    return {
        value.name: [d.dim_param or d.dim_value or None for d in value.type.tensor_type.shape.dim]
        for value in model.graph.value_info
    }


def test_shapes_behind_operators_that_onnx_does_not_know_are_found() -> None:
    model = of_one_runtime()
    settled = copy_of(model)
    settle(settled, model)
    assert shapes(settled) == {"g": [None, 8], "m": [None, 6]}
    assert signature_of(settled) == signature_of(model)
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in settled.graph.value_info)


def test_a_failure_of_symbolic_inference_leaves_shapes_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(SymbolicShapeInference, "_infer_impl", fails)
    model = of_one_runtime()
    settle(model, of_one_runtime())
    assert shapes(model) == {}


def test_no_shape_is_guessed_behind_an_axis_that_may_have_one_element() -> None:
    nodes = [NODE("Squeeze", ["x"], ["s"]), NODE("Relu", ["s"], ["r"]), NODE("Shape", ["r"], ["n"])]
    nodes += [NODE("Reshape", ["r", "n"], ["y"])]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]})
    settle(model, copy_of(model))
    assert "r" not in shapes(model) or shapes(model)["r"] == []


def test_weights_are_not_copied_for_shape_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    infer = onnx.shape_inference.infer_shapes

    def watched(model: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        seen.append(model.ByteSize())
        return infer(model, **options)

    monkeypatch.setattr(module.onnx.shape_inference, "infer_shapes", watched)
    nodes = [NODE("MatMul", ["x", "w"], ["m"]), NODE("Reshape", ["m", "two"], ["r"]), NODE("Relu", ["r"], ["y"])]
    weights = {"w": normal(64, 64), "two": normal(2).astype("int64") * 0 + [-1, 32]}
    model = model_of(nodes, {"x": [4, 64]}, {"y": [8, 32]}, weights)
    before = copy_of(model)
    settle(model, before)
    assert seen[0] < 1000
    assert shapes(model) == {"m": [4, 64], "r": [8, 32]}
    assert list(model.graph.initializer) == list(before.graph.initializer)
