from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.graph import check, op_counts, signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.weight_only import WeightOnly, quantize_blocks
from server.tensors import Array
from tests.models import save_cnn, save_two_inputs
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of


def tidy(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    return Sanitize().run(model, context_of(tmp_path)).model


def decode(codes: Array, scales: Array, depth: int, bits: int) -> Array:
    """Read codes by the text of the operator's documentation, one element at a time."""
    columns = codes.shape[0]
    weight = np.zeros((depth, columns), np.float32)
    block_size = codes.shape[2] * 8 // bits
    for k in range(depth):
        block, place = divmod(k, block_size)
        byte = codes[:, block, place * bits // 8].astype(np.int32)
        code = byte if bits == 8 else (byte >> 4 if place % 2 else byte & 15)
        weight[k] = (code - (1 << (bits - 1))) * scales[:, block]
    return weight


def decibels(reference: Array, seen: Array) -> float:
    return float(10 * np.log10((reference**2).sum() / ((reference - seen) ** 2).sum()))


def dense(bias: bool = True, **attributes: object) -> onnx.ModelProto:
    """x [batch, 72] -> Gemm 40 -> Relu -> MatMul 10; neither 72 nor 40 is a multiple of 32."""
    transposed = attributes.get("transB")
    first = normal(40, 72, seed=1) if transposed else normal(72, 40, seed=1)
    nodes = [
        NODE("Gemm", ["x", "w1", *(["b1"] if bias else [])], ["h"], name="first", **attributes),
        NODE("Relu", ["h"], ["r"]),
        NODE("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    weights = {"w1": first / 8, "w2": normal(40, 10, seed=2) / 6} | ({"b1": normal(40, seed=3)} if bias else {})
    return model_of(nodes, {"x": ["batch", 72]}, {"y": ["batch", 10]}, weights)


@pytest.mark.parametrize(("bits", "least"), [(8, 42.0), (4, 17.0)])
@pytest.mark.parametrize("depth", [64, 75])
def test_codes_decode_to_the_weights(bits: int, least: float, depth: int) -> None:
    weight = normal(depth, 12)
    codes, scales = quantize_blocks(weight, bits, 32)
    assert codes.shape == (12, -(-depth // 32), 32 * bits // 8)
    assert (codes.dtype, scales.dtype) == (np.uint8, np.float32)
    seen = decode(codes, scales, depth, bits)
    assert decibels(weight, seen) > least
    # Half a step everywhere, but one whole step opposite to the largest element, where the codes end.
    steps = np.repeat(np.abs(scales.T), 32, axis=0)[:depth]
    assert (np.abs(seen - weight) <= steps * 1.001).all()
    largest = np.abs(weight[:32]).argmax(axis=0)
    np.testing.assert_allclose(seen[largest, np.arange(12)], weight[largest, np.arange(12)], rtol=1e-6)


def test_blocks_of_zeros_stay_zero() -> None:
    weight = np.zeros((64, 2), np.float32)
    weight[32:] = 1.0
    codes, scales = quantize_blocks(weight, 8, 32)
    np.testing.assert_array_equal(decode(codes, scales, 64, 8), weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}], ids=str)
def test_the_runtime_multiplies_by_what_the_codes_say(tmp_path: Path, bits: int, attributes: dict) -> None:
    model = tidy(dense(**attributes), tmp_path)
    result = WeightOnly(bits=bits, accuracy_level=1).run(model, context_of(tmp_path))
    assert result.counts == {"quantized": 2, "left_in_float": 0}
    assert op_counts(result.model) == {"com.microsoft:MatMulNBits": 2, "Add": 1, "Relu": 1}
    batch = {"x": normal(5, 72)}
    require_equivalent(model, result, "lossy", [batch], tmp_path)
    weights = weights_of(result.model)
    w1, w2 = (
        decode(weights[f"{name}_q{bits}"], weights[f"{name}_scales"], depth, bits)
        for name, depth in [("w1", 72), ("w2", 40)]
    )
    bias = weights_of(model)["b1"] * attributes.get("beta", 1.0)
    expected = np.maximum(batch["x"] @ w1 + bias, 0) @ w2
    seen = answers(result.model, [batch], tmp_path)[0]["y"]
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-4)
    assert decibels(answers(model, [batch], tmp_path)[0]["y"], seen) > (35 if bits == 8 else 12)


@pytest.mark.parametrize(("bits", "least"), [(8, 35.0), (4, 12.0)])
@pytest.mark.parametrize("rows", [1, 8])
def test_int8_arithmetic_is_near_to_float(tmp_path: Path, bits: int, least: float, rows: int) -> None:
    model = tidy(dense(), tmp_path)
    result = WeightOnly(bits=bits, block_size=16).run(model, context_of(tmp_path))
    batch = {"x": normal(rows, 72)}
    expected, seen = (answers(m, [batch], tmp_path)[0]["y"] for m in (model, result.model))
    assert decibels(expected, seen) > least
    assert (expected != seen).any()


def test_sums_of_large_codes_do_not_saturate(tmp_path: Path) -> None:
    """A CPU without an INT8 dot product adds pairs of products in 16 bits for MatMulInteger."""
    weights = {"w": np.linspace(1.0, 1.2, 512 * 16, dtype=np.float32).reshape(512, 16)}
    model = tidy(model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": ["n", 512]}, {"y": ["n", 16]}, weights), tmp_path)
    result = WeightOnly().run(model, context_of(tmp_path))
    batch = {"x": np.linspace(1.0, 1.2, 4 * 512, dtype=np.float32).reshape(4, 512)}
    expected, seen = (answers(m, [batch], tmp_path)[0]["y"] for m in (model, result.model))
    np.testing.assert_allclose(seen, expected, rtol=2e-3)


def test_names_signature_and_size(tmp_path: Path) -> None:
    model = tidy(
        model_of(
            [NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": ["n", 256]}, {"y": ["n", 256]}, {"w": normal(256, 256)}
        ),
        tmp_path,
    )
    for bits, share in ((8, 0.29), (4, 0.17)):  # 8 or 4 bits, and a scale of 32 bits per 32 weights
        result = WeightOnly(bits=bits).run(model, context_of(tmp_path))
        assert result.model.ByteSize() < share * model.ByteSize()
        assert signature_of(result.model) == signature_of(model)
        assert [(node.name, list(node.output)) for node in result.model.graph.node] == [("m", ["y"])]
        assert list(weights_of(result.model)) == [f"w_q{bits}", "w_scales"]
        check(result.model)
        assert f"{bits}-bit weights in blocks of 32: 0.26 ->" in result.note


def test_kept_nodes_stay_in_float(tmp_path: Path) -> None:
    model = tidy(dense(), tmp_path)
    result = WeightOnly(keep=("second",)).run(model, context_of(tmp_path))
    assert result.counts == {"quantized": 1, "left_in_float": 1}
    assert op_counts(result.model)["MatMul"] == 1
    np.testing.assert_array_equal(weights_of(result.model)["w2"], weights_of(model)["w2"])


def test_a_weight_that_others_read_stays_beside_its_codes(tmp_path: Path) -> None:
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"], name="a"),
        NODE("MatMul", ["h", "w"], ["z"], name="b"),
        NODE("Gemm", ["z", "w"], ["t"], name="c", transB=1),
        NODE("Add", ["t", "w"], ["y"]),
    ]
    model = tidy(model_of(nodes, {"x": [64, 64]}, {"y": [64, 64]}, {"w": normal(64, 64) / 8}), tmp_path)
    result = WeightOnly().run(model, context_of(tmp_path))
    assert sorted(weights_of(result.model)) == ["w", "w_q8", "w_q8_2", "w_scales", "w_scales_2"]
    require_equivalent(model, result, "lossy", [{"x": normal(64, 64)}], tmp_path)
    expected, seen = (answers(m, [{"x": normal(64, 64)}], tmp_path)[0]["y"] for m in (model, result.model))
    assert decibels(expected, seen) > 30


def test_a_subgraph_that_reads_the_weight_still_finds_it(tmp_path: Path) -> None:
    shape = helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, ["n", 64])
    branch = helper.make_graph([NODE("MatMul", ["h", "w"], ["branch"])], "inner", [], [shape])
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    weights = {"w": normal(64, 64) / 8, "flag": np.array(True)}
    model = model_of(nodes, {"x": ["n", 64]}, {"y": ["n", 64]}, weights)
    result = WeightOnly().run(model, context_of(tmp_path))
    assert result.counts == {"quantized": 1, "left_in_float": 0}
    require_equivalent(model, result, "lossy", [{"x": normal(3, 64)}], tmp_path)


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        (NODE("Gemm", ["x", "w"], ["y"], transA=1), {"w": normal(64, 64)}),
        (NODE("MatMul", ["x", "w"], ["y"]), {"w": normal(1, 64, 64)}),
        (NODE("MatMul", ["x", "w"], ["y"]), {"w": np.full((64, 64), np.inf, np.float32)}),
    ],
    ids=["transposed input", "stack of matrices", "infinite"],
)
def test_what_the_operator_cannot_express_is_refused(tmp_path: Path, node: onnx.NodeProto, weights: dict) -> None:
    model = model_of([node], {"x": [64, 64]}, {"y": ["a", "b"] if weights["w"].ndim == 2 else [1, 64, 64]}, weights)
    with pytest.raises(PassFailed, match="none of 1 MatMul and Gemm with constant weights can have 8-bit blocks"):
        WeightOnly().run(model, context_of(tmp_path))


def test_a_matrix_that_would_grow_is_left(tmp_path: Path) -> None:
    model = model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": ["n", 4]}, {"y": ["n", 8]}, {"w": normal(4, 8)})
    with pytest.raises(PassFailed, match="none of 1"):
        WeightOnly().run(model, context_of(tmp_path))


def test_a_model_without_matrices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="none of 0"):
        WeightOnly().run(onnx.load(save_two_inputs(tmp_path / "model.onnx")), context_of(tmp_path))


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    model = tidy(dense(), tmp_path)
    with pytest.raises(PassFailed, match="blocks of 24 weights are not supported"):
        WeightOnly(block_size=24).run(model, context_of(tmp_path))
    with pytest.raises(PassFailed, match="does not have: third"):
        WeightOnly(keep=("first", "third")).run(model, context_of(tmp_path))


def test_the_input_model_stays_as_it_is(tmp_path: Path) -> None:
    model = tidy(onnx.load(save_cnn(tmp_path / "model.onnx")), tmp_path)
    before = model.SerializeToString()
    with pytest.raises(PassFailed):
        WeightOnly().run(model, context_of(tmp_path))
    assert model.SerializeToString() == before
    model = tidy(dense(), tmp_path)
    before = model.SerializeToString()
    WeightOnly().run(model, context_of(tmp_path))
    assert model.SerializeToString() == before
