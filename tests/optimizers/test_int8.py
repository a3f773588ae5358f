from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

from optimizers.errors import PassFailed
from optimizers.graph import op_counts, opset_of, signature_of
from optimizers.passes import PassResult
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.fusion import Fuse
from optimizers.passes.int8 import prepared, reduced_range, untie_weights
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static, chained_nodes
from optimizers.passes.sanitize import Sanitize
from server.artifact import SessionOptions
from server.host import HostFacts, read_host
from server.providers import EXACT_PRODUCTS
from tests.models import save_cnn, save_mlp, save_two_inputs
from tests.optimizers.graphs import NODE, WITH_DOT, WITHOUT_DOT, context_of, model_of, normal, weights_of

STATIC, DYNAMIC = Int8Static(), Int8Dynamic()
METHODS = ("minmax", "percentile", "entropy", "mse")
BOTH = pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])


def tidy(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    for step in (Sanitize(), Fuse()):
        model = step.run(model, context_of(tmp_path)).model
    return model


@pytest.fixture
def mlp(tmp_path: Path) -> onnx.ModelProto:
    return tidy(onnx.load(save_mlp(tmp_path / "mlp.onnx")), tmp_path)


@pytest.fixture
def cnn(tmp_path: Path) -> onnx.ModelProto:
    return tidy(onnx.load(save_cnn(tmp_path / "cnn.onnx")), tmp_path)


def batches(name: str, *shape: int, sizes: tuple[int, ...] = (16, 16, 5)) -> list[dict[str, np.ndarray]]:
    return [{name: normal(size, *shape, seed=seed)} for seed, size in enumerate(sizes)]


def int8_weights(model: onnx.ModelProto) -> list[np.ndarray]:
    return [array for array in weights_of(model).values() if array.dtype == np.int8 and array.ndim > 1]


def sqnr_db(reference: np.ndarray, candidate: np.ndarray) -> float:
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - candidate) ** 2))


def fidelity(model: onnx.ModelProto, result: PassResult, batch: dict[str, np.ndarray], work: Path) -> float:
    """SQNR in dB of a result as it is served, with all of onnxruntime's optimizations."""
    require_equivalent(model, result, "lossy", [batch], work)
    served = SessionOptions(config=result.options.config)
    ((name, seen),) = answers(result.model, [batch], work, served)[0].items()
    return sqnr_db(answers(model, [batch], work)[0][name], seen)


# The rule


def test_weights_are_reduced_exactly_where_products_saturate() -> None:
    assert reduced_range(WITHOUT_DOT)
    assert reduced_range(HostFacts("server", ("avx2", "avx512f"), 2))
    assert not reduced_range(WITH_DOT)
    assert not reduced_range(HostFacts("laptop", ("avx2", "avx_vnni"), 2))
    assert not reduced_range(HostFacts("arm", (), 2, arch="aarch64"))


@pytest.mark.parametrize(("host", "bits"), [(WITH_DOT, 8), (WITHOUT_DOT, 7)])
@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_weights_have_the_range_of_the_host(
    tmp_path: Path, mlp: onnx.ModelProto, step: Int8Static | Int8Dynamic, host: HostFacts, bits: int
) -> None:
    result = step.run(mlp, context_of(tmp_path, batches("x", 64), host))
    largest = max(int(np.abs(w.astype(int)).max()) for w in int8_weights(result.model))
    assert largest == (127 if bits == 8 else 64)
    assert f"{bits}-bit weights" in result.note


# The trap: without an INT8 dot product, x86 adds two products of UINT8 and INT8 in 16 bits, saturating.


def adversarial() -> onnx.ModelProto:
    """One MatMul over 512 inputs, whose large weights meet large activations next to each other."""
    signs = np.where(np.random.default_rng(0).random((512, 32)) < 0.9, 1, -1)
    return model_of(
        [NODE("MatMul", ["x", "w"], ["y"], name="m")],
        {"x": ["b", 512]},
        {"y": ["b", 32]},
        {"w": signs.astype(np.float32)},
    )


def large_activations(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).uniform(0.9, 1, (16, 512)).astype(np.float32)}


def without_dot_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply UINT8 ``[n,k]`` by INT8 ``[k,m]`` as such a CPU does (the instruction ``vpmaddubsw``)."""
    products = x.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_emitted_weights_do_not_saturate_on_the_host_they_are_for(
    tmp_path: Path, step: Int8Static | Int8Dynamic
) -> None:
    errors = {}
    for host in (WITH_DOT, WITHOUT_DOT):
        result = step.run(adversarial(), context_of(tmp_path, [large_activations(0)], host))
        (weight,) = int8_weights(result.model)
        x = np.round(large_activations(1)["x"] * 255).astype(np.uint8)
        exact = x.astype(np.int64) @ weight.astype(np.int64)
        errors[host.has_int8_dot] = np.abs(without_dot_product(x, weight) - exact).max() / np.abs(exact).max()
    assert errors[True] > 0.3  # full-range weights are for CPUs with the dot product only: elsewhere this is the damage
    assert errors[False] == 0


@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_the_emitted_model_is_right_on_this_host(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    result = step.run(adversarial(), context_of(tmp_path, [large_activations(0)], read_host()))
    batch = large_activations(1)
    served = SessionOptions(config=result.options.config)
    seen = answers(result.model, [batch], tmp_path, served)[0]["y"]
    expected = answers(adversarial(), [batch], tmp_path)[0]["y"]
    assert np.abs(seen - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_only_seven_bit_weights_do_without_exact_products(
    tmp_path: Path, mlp: onnx.ModelProto, step: Int8Static | Int8Dynamic
) -> None:
    data = batches("x", 64)
    assert step.run(mlp, context_of(tmp_path, data, WITHOUT_DOT)).options.config == {EXACT_PRODUCTS: "0"}
    # Full-range weights leave the choice to the server, which knows the CPU that it runs on.
    assert step.run(mlp, context_of(tmp_path, data, WITH_DOT)).options.config == {}


# Dynamic


def test_dynamic_quantizes_every_matmul_with_a_weight(tmp_path: Path, mlp: onnx.ModelProto) -> None:
    result = DYNAMIC.run(mlp, context_of(tmp_path))
    assert op_counts(result.model)["MatMulInteger"] == 2 == result.counts["quantized"]
    assert "MatMul" not in op_counts(result.model)
    assert signature_of(result.model) == signature_of(mlp)
    assert fidelity(mlp, result, {"x": normal(32, 64, seed=9)}, tmp_path) > 30


def test_dynamic_leaves_convolutions_alone(tmp_path: Path, cnn: onnx.ModelProto) -> None:
    counts = op_counts(DYNAMIC.run(cnn, context_of(tmp_path)).model)
    assert counts["Conv"] == 1
    assert "ConvInteger" not in counts


def test_dynamic_is_refused_where_only_convolutions_have_weights(tmp_path: Path) -> None:
    weights = {"w": normal(4, 3, 3, 3)}
    model = model_of([NODE("Conv", ["x", "w"], ["y"])], {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 6, 6]}, weights)
    with pytest.raises(PassFailed, match="its 1 Conv would become ConvInteger, 4-6 times slower"):
        DYNAMIC.run(model, context_of(tmp_path))


def test_models_without_weights_are_refused(tmp_path: Path) -> None:
    model = onnx.load(save_two_inputs(tmp_path / "model.onnx"))
    data = [{"a": normal(4, 4), "b": normal(4, 4)}]
    with pytest.raises(PassFailed, match=r"no MatMul or Gemm has a constant weight$"):
        DYNAMIC.run(model, context_of(tmp_path))
    with pytest.raises(PassFailed, match="no Conv, MatMul or Gemm has a constant weight"):
        STATIC.run(model, context_of(tmp_path, data))


@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_an_opset_without_per_channel_scales_is_refused(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    model = model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": ["n", 4]}, {"y": ["n", 4]}, {"w": normal(4, 4)}, 12, 7)
    with pytest.raises(PassFailed, match="opset 12 has no per-channel scales"):
        step.run(model, context_of(tmp_path, [{"x": normal(4, 4)}]))


# Static


@pytest.mark.parametrize("method", METHODS)
def test_static_accepts_a_smaller_last_batch(tmp_path: Path, cnn: onnx.ModelProto, method: str) -> None:
    step = Int8Static(method=method)
    result = step.run(cnn, context_of(tmp_path, batches("image", 3, 16, 16)))
    assert result.counts["quantized"] == 2
    assert signature_of(result.model) == signature_of(cnn)
    assert opset_of(result.model) == opset_of(cnn)
    assert f"{method} ranges" in result.note
    assert fidelity(cnn, result, {"image": normal(32, 3, 16, 16, seed=9)}, tmp_path) > 25


def test_static_follows_the_calibration_data(tmp_path: Path, mlp: onnx.ModelProto) -> None:
    narrow, wide = (STATIC.run(mlp, context_of(tmp_path, [{"x": scale * normal(16, 64)}])).model for scale in (1, 100))
    scales = [next(float(w) for name, w in weights_of(m).items() if name == "x_scale") for m in (narrow, wide)]
    assert scales[1] == pytest.approx(100 * scales[0], rel=1e-3)


def test_static_without_data_is_refused(tmp_path: Path, mlp: onnx.ModelProto) -> None:
    with pytest.raises(PassFailed, match="no calibration data; give --calibration"):
        STATIC.run(mlp, context_of(tmp_path))


def test_only_what_follows_convolutions_alone_joins_their_chain() -> None:
    nodes = [
        NODE("Conv", ["x", "w"], ["c"], name="conv"),
        NODE("Clip", ["c", "low"], ["k"], name="clip"),
        NODE("Add", ["k", "c"], ["a"], name="residual"),
        NODE("GlobalAveragePool", ["a"], ["g"], name="pool"),
        NODE("Add", ["x", "a"], ["s"], name="with_the_input"),
        NODE("Relu", ["s"], ["r"], name="behind_it"),
        NODE("Tanh", ["a"], ["t"], name="tanh"),
        NODE("Relu", ["t"], ["u"], name="behind_tanh"),
    ]
    weights = {"w": normal(3, 3, 1, 1), "low": np.array(0, np.float32)}
    model = model_of(nodes, {"x": ["n", 3, 4, 4]}, {"r": ["n", 3, 4, 4]}, weights)
    assert chained_nodes(model) == ["clip", "residual", "pool"]


def test_activations_between_convolutions_are_quantized(tmp_path: Path, cnn: onnx.ModelProto) -> None:
    counts = op_counts(STATIC.run(cnn, context_of(tmp_path, batches("image", 3, 16, 16))).model)
    assert "Relu" not in counts  # it became the lower end of the range of UINT8
    assert counts["QuantizeLinear"] == 4  # the image, the convolution, the pooling, and the input of the dense layer


def test_activations_between_dense_layers_stay_float(tmp_path: Path, mlp: onnx.ModelProto) -> None:
    model = STATIC.run(mlp, context_of(tmp_path, batches("x", 64))).model
    assert op_counts(model)["QuantizeLinear"] == 2  # the input of each dense layer, no output
    assert chained_nodes(mlp) == []


def test_a_bias_that_is_broadcast_over_rows_is_quantized_like_any_other(tmp_path: Path) -> None:
    # scikit-learn's converter writes biases as [1, N].
    weights = {"w": normal(8, 6), "b": normal(1, 6), "v": normal(6, 5), "c": normal(1)}
    nodes = [NODE("Gemm", ["x", "w", "b"], ["h"]), NODE("Gemm", ["h", "v", "c"], ["y"])]
    model = model_of(nodes, {"x": ["n", 8]}, {"y": ["n", 5]}, weights)
    result = STATIC.run(model, context_of(tmp_path, [{"x": normal(32, 8)}]))
    assert fidelity(model, result, {"x": normal(32, 8, seed=1)}, tmp_path) > 25


@pytest.mark.parametrize("method", METHODS)
def test_a_target_of_tensorrt_is_symmetric_with_float_biases(tmp_path: Path, cnn: onnx.ModelProto, method: str) -> None:
    step = Int8Static(method, "tensorrt")
    result = step.run(cnn, context_of(tmp_path, batches("image", 3, 16, 16), WITHOUT_DOT))
    weights = weights_of(result.model)
    assert not any(array.dtype == np.int32 for array in weights.values())
    zero_points = [array for name, array in weights.items() if "zero_point" in name]
    assert zero_points
    assert all(array.dtype == np.int8 and not array.any() for array in zero_points)
    assert max(int(np.abs(w.astype(int)).max()) for w in int8_weights(result.model)) == 127  # GPUs do not saturate
    assert fidelity(cnn, result, {"image": normal(32, 3, 16, 16, seed=9)}, tmp_path) > 20


def test_ranges_for_tensorrt_are_chosen_for_half_of_the_levels(tmp_path: Path, mlp: onnx.ModelProto) -> None:
    data = [{"x": np.abs(normal(4000, 64))}]
    largest = {}
    for target, levels in (("cpu", 255), ("tensorrt", 127)):
        result = Int8Static("mse", target).run(mlp, context_of(tmp_path, data))
        largest[target] = levels * activation_scale(result.model)
    # Steps twice as wide pay for a narrower range, also where no value is negative.
    assert largest["tensorrt"] < 0.95 * largest["cpu"]


# The trap: onnxruntime's own entropy calibration has as many bins as levels, so that there is nothing to search.


class Reader(CalibrationDataReader):
    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.left = [batch]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def activation_scale(model: onnx.ModelProto) -> float:
    return next(float(array) for name, array in weights_of(model).items() if name == "x_scale")


def by_onnxruntime(model: onnx.ModelProto, batch: dict[str, np.ndarray], method: object, work: Path) -> onnx.ModelProto:
    options = {"calibrate_method": method, "activation_type": QuantType.QUInt8, "per_channel": True}
    quantize_static(prepared(model), work / "ort.onnx", Reader(batch), **options)
    return onnx.load(work / "ort.onnx")


def test_our_entropy_cuts_outliers_and_that_of_onnxruntime_is_minmax(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["y"], name="m")]
    model = model_of(nodes, {"x": ["n", 64]}, {"y": ["n", 64]}, {"w": normal(64, 64)})
    x = normal(512, 64)
    x[[3, 200, 400], [1, 20, 60]] = 90, -80, 85
    batch = {"x": x}
    theirs = {
        m: by_onnxruntime(model, batch, m, tmp_path) for m in (CalibrationMethod.MinMax, CalibrationMethod.Entropy)
    }
    trap, plain = (activation_scale(theirs[m]) for m in (CalibrationMethod.Entropy, CalibrationMethod.MinMax))
    assert trap == pytest.approx(plain, rel=0.01)

    entropy, minmax = (Int8Static(m).run(model, context_of(tmp_path, [batch])) for m in ("entropy", "minmax"))
    assert activation_scale(minmax.model) == pytest.approx(plain, rel=1e-5)
    assert activation_scale(entropy.model) < 0.3 * trap
    ordinary = {"x": normal(512, 64, seed=1)}
    gained = fidelity(model, entropy, ordinary, tmp_path) - fidelity(model, minmax, ordinary, tmp_path)
    assert gained > 6  # one bit; the reference of both is the float model, the trap is no better than minmax


# Nodes that stay in float


def three_layers() -> onnx.ModelProto:
    nodes = [
        NODE("Gemm", ["x", "u", "a"], ["f"], name="first", transB=1),
        NODE("Relu", ["f"], ["g"], name="relu"),
        NODE("Gemm", ["g", "v", "b"], ["h"], name="second", transB=1),
        NODE("MatMul", ["h", "w"], ["y"], name="third"),
    ]
    weights = {name: normal(8, 8, seed=seed, scale=0.4) for seed, name in enumerate("uvw")}
    weights |= {"a": normal(8), "b": normal(8, seed=1)}
    return model_of(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, weights)


def float_products(model: onnx.ModelProto) -> int:
    """Return how many MatMul and Gemm read a float weight."""
    floats = {name for name, array in weights_of(model).items() if array.dtype == np.float32 and array.ndim == 2}
    return sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in floats for node in model.graph.node)


@pytest.mark.parametrize("target", [Int8Static, Int8Dynamic])
def test_kept_nodes_compute_in_float(tmp_path: Path, target: type[Int8Static | Int8Dynamic]) -> None:
    model, data = three_layers(), [{"x": normal(64, 8)}]
    reached = {}
    for keep in ((), ("second",), ("first", "second")):
        result = target(keep=keep).run(model, context_of(tmp_path, data))
        assert float_products(result.model) == len(keep)
        assert result.counts["quantized"] == 3 - len(keep)
        assert ("kept" in result.note) == bool(keep)
        reached[len(keep)] = fidelity(model, result, {"x": normal(64, 8, seed=1)}, tmp_path)
    assert "2 of 3 nodes kept in float" in result.note
    assert 25 < reached[0] < reached[1] < reached[2]


@BOTH
def test_nodes_to_keep_that_do_not_exist_are_named(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    step = type(step)(keep=("second", "nowhere", "absent"))
    with pytest.raises(PassFailed, match=r"nodes to keep that the model does not have: absent, nowhere$"):
        step.run(three_layers(), context_of(tmp_path, [{"x": normal(4, 8)}]))


@BOTH
def test_keeping_every_node_is_a_refusal(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    step = type(step)(keep=("first", "second", "third"))
    with pytest.raises(PassFailed, match="all 3 nodes with weights are kept in float"):
        step.run(three_layers(), context_of(tmp_path, [{"x": normal(4, 8)}]))


def test_nothing_is_quantized_behind_a_kept_convolution(tmp_path: Path, cnn: onnx.ModelProto) -> None:
    (conv,) = (node.name for node in cnn.graph.node if node.op_type == "Conv")
    result = Int8Static(keep=(conv,)).run(cnn, context_of(tmp_path, batches("image", 3, 16, 16)))
    assert op_counts(result.model)["QuantizeLinear"] == 1  # the input of the dense layer
    assert op_counts(result.model)["Relu"] == 1
    assert chained_nodes(cnn) != chained_nodes(cnn, [conv]) == []


# Models as others made them


def test_a_product_of_two_activations_stays_float(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"], name="weighted"), NODE("MatMul", ["h", "z"], ["y"], name="attention")]
    model = model_of(nodes, {"x": ["n", 8], "z": [8, 8]}, {"y": ["n", 8]}, {"w": normal(8, 8)})
    data = [{"x": normal(64, 8), "z": normal(8, 8, seed=2)}]
    for step in (STATIC, DYNAMIC):
        result = step.run(model, context_of(tmp_path, data))
        assert result.counts["quantized"] == 1
        (left,) = (node for node in result.model.graph.node if node.name == "attention")
        assert list(left.input) == ["h", "z"]


@BOTH
def test_weights_in_constant_nodes_are_quantized(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    constant = NODE("Constant", [], ["w"], value=numpy_helper.from_array(normal(8, 8), "any"))
    model = model_of([constant, NODE("MatMul", ["x", "w"], ["y"])], {"x": ["n", 8]}, {"y": ["n", 8]})
    result = step.run(model, context_of(tmp_path, [{"x": normal(64, 8)}]))
    assert result.counts["quantized"] == 1
    assert fidelity(model, result, {"x": normal(64, 8, seed=1)}, tmp_path) > 30


@BOTH
@pytest.mark.parametrize("first", [STATIC, DYNAMIC], ids=["of static", "of dynamic"])
def test_what_is_quantized_already_is_refused(
    tmp_path: Path, mlp: onnx.ModelProto, step: Int8Static | Int8Dynamic, first: Int8Static | Int8Dynamic
) -> None:
    data = batches("x", 64)
    once = first.run(mlp, context_of(tmp_path, data)).model
    found = "2 DynamicQuantizeLinear, 2 MatMulInteger" if first is DYNAMIC else "DequantizeLinear, 2 QuantizeLinear"
    with pytest.raises(PassFailed, match=f"already quantized: the model has .*{found}; give the FP32 model"):
        step.run(once, context_of(tmp_path, data))


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_batch_is_calibrated_run_by_run(tmp_path: Path, method: str) -> None:
    nodes = [NODE("Conv", ["x", "w"], ["c"]), NODE("Relu", ["c"], ["y"])]
    model = model_of(nodes, {"x": [4, 3, 8, 8]}, {"y": [4, 5, 6, 6]}, {"w": normal(5, 3, 3, 3)})
    data = [{"x": normal(4, 3, 8, 8, seed=seed)} for seed in range(3)]
    result = Int8Static(method).run(model, context_of(tmp_path, data))
    assert fidelity(model, result, data[0], tmp_path) > 25


def branching() -> onnx.ModelProto:
    """Convolution, Relu, and an If whose branches read the convolution's result, the Relu's, and both weights."""

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    then = branch("p", NODE("Conv", ["r", "w"], ["k"]), NODE("Add", ["k", "c"], ["p"]))
    other = branch(
        "q", NODE("Gemm", ["flat", "v"], ["g"]), NODE("ReduceMax", ["g"], ["m"]), NODE("Add", ["r", "m"], ["q"])
    )
    nodes = [
        NODE("Conv", ["x", "w"], ["c"], name="conv", pads=[0, 0, 0, 0]),
        NODE("Relu", ["c"], ["r"], name="relu"),
        NODE("Reshape", ["r", "shape"], ["flat"], name="reshape"),
        NODE("Gemm", ["flat", "v"], ["d"], name="gemm"),
        NODE("ReduceSum", ["x"], ["s"], name="sum", keepdims=0),
        NODE("Greater", ["s", "nothing"], ["positive"], name="greater"),
        NODE("If", ["positive"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    weights = {"w": normal(3, 3, 1, 1), "v": normal(48, 3), "shape": np.int64([-1, 48]), "nothing": np.float32(0)}
    return model_of(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 3, 4, 4]}, weights)


@BOTH
def test_control_flow_survives_with_what_it_reads(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    model = branching()
    data = [{"x": normal(8, 3, 4, 4, seed=seed)} for seed in range(4)]
    taken = {bool(answers(with_output(model, "positive"), [b], tmp_path)[0]["positive"]) for b in data}
    assert taken == {True, False}
    result = step.run(model, context_of(tmp_path, data))
    assert result.counts["quantized"] == (2 if step is STATIC else 1)
    for batch in data:
        assert fidelity(model, result, batch, tmp_path) > 20


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    twin.graph.output.append(helper.make_tensor_value_info(name, TensorProto.BOOL, []))
    return twin


# Tied weights


def tied() -> onnx.ModelProto:
    nodes = [
        NODE("Gemm", ["x", "w"], ["h"], name="first", transB=1),
        NODE("Relu", ["h"], ["r"], name="relu"),
        NODE("Gemm", ["r", "w"], ["g"], name="second", transB=1),
        NODE("MatMul", ["g", "w"], ["y"], name="third"),
    ]
    return model_of(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": normal(8, 8, scale=0.5)})


def test_every_reader_gets_its_own_weight() -> None:
    model = tied()
    assert untie_weights(model) == 2
    names = [node.input[1] for node in model.graph.node if node.op_type != "Relu"]
    assert len(set(names)) == 3
    arrays = weights_of(model)
    assert all(np.array_equal(arrays[name], arrays["w"]) for name in names)
    onnx.checker.check_model(model)


def test_readers_in_subgraphs_count() -> None:
    model = branching()
    assert untie_weights(model) == 1  # the Gemm's; onnxruntime rewrites no weight of a Conv
    assert next(node for node in model.graph.node if node.name == "gemm").input[1] != "v"


def test_weights_with_one_reader_are_not_copied(mlp: onnx.ModelProto) -> None:
    assert untie_weights(prepared(mlp)) == 0


@pytest.mark.parametrize("step", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_tied_weights_survive_quantization(tmp_path: Path, step: Int8Static | Int8Dynamic) -> None:
    model = tied()
    before = model.SerializeToString()
    result = step.run(model, context_of(tmp_path, [{"x": normal(64, 8)}]))
    assert model.SerializeToString() == before
    assert fidelity(model, result, {"x": normal(64, 8, seed=1)}, tmp_path) > 25


def test_a_quantizer_that_fails_is_a_refusal(tmp_path: Path) -> None:
    bias = numpy_helper.from_array(normal(4, 6), "b")  # one element per row of a fixed batch: not a bias of channels
    model = model_of([NODE("Gemm", ["x", "w", "b"], ["y"])], {"x": [4, 8]}, {"y": [4, 6]}, {"w": normal(8, 6)})
    model.graph.initializer.append(bias)
    with pytest.raises(PassFailed, match="onnxruntime's quantizer fails"):
        STATIC.run(model, context_of(tmp_path, [{"x": normal(4, 8)}]))
