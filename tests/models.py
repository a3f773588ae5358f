"""Small real ONNX models, built in memory, that cover the cases a server meets."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def _save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def save_mlp(path: Path, seed: int = 0, hidden: int = 64) -> Path:
    """x FP32 [batch,64] -> y FP32 [batch,10]; two dense layers."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": (rng.standard_normal((64, hidden)) / 8).astype(np.float32),
        "b1": rng.standard_normal(hidden).astype(np.float32),
        "w2": (rng.standard_normal((hidden, 10)) / np.sqrt(hidden)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"]),
        helper.make_node("Add", ["h1", "b1"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["h3"]),
        helper.make_node("MatMul", ["h3", "w2"], ["y"]),
    ]
    return _save(path, nodes, [("x", FLOAT, ["batch", 64])], [("y", FLOAT, ["batch", 10])], weights)


def save_cnn(path: Path, seed: int = 0) -> Path:
    """image FP32 [batch,3,16,16] -> logits FP32 [batch,10]; Conv, BatchNormalization, Relu, pooling, Gemm."""
    rng = np.random.default_rng(seed)
    weights = {
        "conv": (rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "shift": rng.standard_normal(8).astype(np.float32),
        "mean": rng.standard_normal(8).astype(np.float32),
        "var": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "fc": (rng.standard_normal((10, 8)) / 3).astype(np.float32),
        "fc_bias": rng.standard_normal(10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "fc", "fc_bias"], ["logits"], transB=1),
    ]
    inputs = [("image", FLOAT, ["batch", 3, 16, 16])]
    return _save(path, nodes, inputs, [("logits", FLOAT, ["batch", 10])], weights)


def save_two_inputs(path: Path) -> Path:
    """a, b FP32 [batch,4] -> sum, diff FP32 [batch,4]."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["diff"])]
    specs = {name: (name, FLOAT, ["batch", 4]) for name in ("a", "b", "sum", "diff")}
    return _save(path, nodes, [specs["a"], specs["b"]], [specs["sum"], specs["diff"]], {})


def save_strings(path: Path) -> Path:
    """text BYTES [batch] -> same BYTES [batch]."""
    nodes = [helper.make_node("Identity", ["text"], ["same"])]
    return _save(path, nodes, [("text", STRING, ["batch"])], [("same", STRING, ["batch"])], {})


def save_batch_on_axis_1(path: Path) -> Path:
    """x FP32 [batch,4] -> state FP32 [2,batch,4]: an output that carries the batch on another axis."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
        helper.make_node("Concat", ["u", "u"], ["state"], axis=0),
    ]
    weights = {"axes": np.array([0], np.int64)}
    return _save(path, nodes, [("x", FLOAT, ["batch", 4])], [("state", FLOAT, [2, "batch", 4])], weights)


def save_sequence(path: Path, seed: int = 0) -> Path:
    """ids, mask INT64 [batch,sequence] -> vector FP32 [batch,8]: masked mean of embeddings."""
    rng = np.random.default_rng(seed)
    weights = {
        "table": rng.standard_normal((100, 8)).astype(np.float32),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("Unsqueeze", ["m", "axis2"], ["m3"]),
        helper.make_node("Mul", ["e", "m3"], ["em"]),
        helper.make_node("ReduceSum", ["em", "axis1"], ["s"], keepdims=0),
        helper.make_node("ReduceSum", ["m3", "axis1"], ["n"], keepdims=0),
        helper.make_node("Div", ["s", "n"], ["vector"]),
    ]
    inputs = [(name, INT64, ["batch", "sequence"]) for name in ("ids", "mask")]
    return _save(path, nodes, inputs, [("vector", FLOAT, ["batch", 8])], weights)


def save_batch_mixing(path: Path) -> Path:
    """x FP32 [batch,4] -> y = x - mean over the batch: rows influence each other, so it must never be batched."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    return _save(path, nodes, [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 4])], {})


def save_nonzero(path: Path) -> Path:
    """x FP32 [length] -> places INT64 [1,found]; the values decide the size of the output."""
    nodes = [helper.make_node("NonZero", ["x"], ["places"])]
    return _save(path, nodes, [("x", FLOAT, ["length"])], [("places", INT64, [1, "found"])], {})


def save_double(path: Path) -> Path:
    """x, y FP64 [1]."""
    specs = [(name, TensorProto.DOUBLE, [1]) for name in ("x", "y")]
    return _save(path, [helper.make_node("Neg", ["x"], ["y"])], specs[:1], specs[1:], {})
