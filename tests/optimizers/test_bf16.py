from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from optimizers.errors import PassFailed
from optimizers.graph import check, op_counts, signature_of
from optimizers.passes import PassContext
from optimizers.passes.bf16 import CPU_KERNELS, Bf16
from optimizers.passes.check import answers
from optimizers.passes.sanitize import Sanitize
from server.errors import SlipstreamError
from tests.models import save_cnn, save_mlp
from tests.optimizers.graphs import NODE, WITH_DOT, context_of, model_of, normal, weights_of

WITH_GPU = msgspec.structs.replace(WITH_DOT, gpus=("a GPU",))


def on_gpu_host(tmp_path: Path, *batches: dict) -> PassContext:
    return context_of(tmp_path, batches, host=WITH_GPU)


def tidy(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    return Sanitize().run(model, context_of(tmp_path)).model


def test_weights_are_rounded_to_nearest_and_inputs_and_outputs_stay(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    result = Bf16().run(model, on_gpu_host(tmp_path, {"x": normal(8, 64)}))
    assert result.counts == {"weights": 3, "nodes_in_fp32": 0}
    assert signature_of(result.model) == signature_of(model)
    check(result.model)
    before = weights_of(model)
    for tensor in result.model.graph.initializer:
        assert tensor.data_type == TensorProto.BFLOAT16
        exact, rounded = before[tensor.name], numpy_helper.to_array(tensor)
        bits = exact.view(np.uint32).astype(np.uint64)  # to nearest, ties to even, on the bits themselves
        expected = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        np.testing.assert_array_equal(rounded.view(np.uint16), expected.astype(np.uint16))


def test_the_answers_are_those_of_8_bits_of_mantissa(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    result = Bf16().run(model, on_gpu_host(tmp_path))
    x = normal(16, 64)
    # onnxruntime's CPU provider cannot run it; ONNX's reference implementation can.
    (seen,), (expected,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (result.model, model))
    assert seen.dtype == np.float32
    error = np.abs(seen - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 2e-2  # 2^-9 per operation, and not FP32 under another name


def test_without_a_gpu_it_is_refused_and_says_which_kernels_are_missing(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_mlp(tmp_path / "model.onnx")), tmp_path)
    with pytest.raises(PassFailed, match="no BF16 kernels on the CPU for Add, MatMul, Relu, and this host has no GPU"):
        Bf16().run(model, context_of(tmp_path))


def test_what_the_cpu_runs_in_bf16_needs_no_gpu(tmp_path: Path) -> None:
    nodes = [NODE("Gather", ["table", "x"], ["rows"]), NODE("LayerNormalization", ["rows", "scale"], ["y"])]
    weights = {"table": normal(10, 16), "scale": np.ones(16, np.float32)}
    model = model_of(nodes, {"x": ["batch"]}, {"y": ["batch", 16]}, weights)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model = tidy(model, tmp_path)
    batch = {"x": np.array([1, 5, 9])}
    result = Bf16().run(model, context_of(tmp_path, [batch]))
    assert result.counts == {"weights": 2, "nodes_in_fp32": 0}
    seen, expected = (answers(m, [batch], tmp_path)[0]["y"] for m in (result.model, model))
    np.testing.assert_allclose(seen, expected, atol=0.03)
    assert (seen != expected).any()


@pytest.mark.parametrize("op", ["MatMul", "Add", "Relu"])
def test_the_cpu_still_lacks_these_kernels(tmp_path: Path, op: str) -> None:
    """When this fails, onnxruntime has learnt it: extend ``CPU_KERNELS``."""
    assert op not in CPU_KERNELS
    second = [] if op == "Relu" else ["wide"]
    nodes = [
        NODE("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        NODE(op, ["narrow", *second], ["h"]),
        NODE("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"x": [4, 4]}, {"y": [4, 4]})
    if second:
        weight = numpy_helper.from_array(np.ones((4, 4), ml_dtypes.bfloat16), "wide")
        model.graph.initializer.append(weight)
    with pytest.raises(SlipstreamError, match="Could not find an implementation"):
        answers(model, [{"x": normal(4, 4)}], tmp_path)


def test_a_mask_of_the_lowest_fp32_value_stays_finite(tmp_path: Path) -> None:
    lowest = np.finfo(np.float32).min  # BF16 rounds it to minus infinity
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Mul", ["h", "mask"], ["m"]), NODE("MatMul", ["h", "w"], ["y"])]
    weights = {"w": normal(4, 4), "mask": np.array([lowest], np.float32)}
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4], "m": ["batch", 4]}, weights)
    result = Bf16().run(tidy(model, tmp_path), on_gpu_host(tmp_path))
    assert result.counts == {"weights": 1, "nodes_in_fp32": 1, "kept_by_range": 1}


@pytest.mark.parametrize(("length", "kept"), [(256, 0), (257, 1)])
def test_a_running_sum_of_more_than_256_terms_stays_in_fp32(tmp_path: Path, length: int, kept: int) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("ReduceMean", ["h"], ["y"], axes=[-1], keepdims=1)]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 1]}, {"w": normal(4, length)})
    result = Bf16().run(tidy(model, tmp_path), on_gpu_host(tmp_path))
    assert result.counts.get("kept_by_depth", 0) == kept


def test_deep_products_are_converted(tmp_path: Path) -> None:
    model = model_of(
        [NODE("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 4096]}, {"y": ["batch", 2]}, {"w": normal(4096, 2)}
    )
    result = Bf16().run(tidy(model, tmp_path), on_gpu_host(tmp_path, {"x": normal(2, 4096, scale=1e4)}))
    assert result.counts["nodes_in_fp32"] == 0


def test_convolutions_take_bf16_from_opset_22_on(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_cnn(tmp_path / "model.onnx")), tmp_path)
    old = Bf16().run(model, on_gpu_host(tmp_path))
    assert old.counts["kept_by_type"] == 2  # Conv and GlobalAveragePool
    assert "BatchNormalization" in op_counts(old.model)
    newer = onnx.version_converter.convert_version(model, 22)
    assert Bf16().run(tidy(newer, tmp_path), on_gpu_host(tmp_path)).counts == {"weights": 7, "nodes_in_fp32": 0}
