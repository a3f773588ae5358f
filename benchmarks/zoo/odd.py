"""Small models that are built in unusual ways, with random weights and data: an optimizer must finish on them too."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from server.tensors import Array

SAMPLES = 640
FIXED_ROWS = 4
_FEATURES, _HIDDEN, _CLASSES = 64, 256, 10


class OddModel(msgspec.Struct, frozen=True):
    """One of them.

    Attributes:
        name: Its name.
        about: What is unusual about it.
        make: Returns the model and the samples of its input ``x``, axis 0 = samples.
    """

    name: str
    about: str
    make: Callable[[int], tuple[onnx.ModelProto, Array]]


def save(odd: OddModel, folder: Path, samples: int = SAMPLES) -> Path:
    """Write ``model.onnx`` and ``data.npz`` into a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, array = odd.make(samples)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "data.npz", x=array)
    return folder


def _fixed_batch(samples: int) -> tuple[onnx.ModelProto, Array]:
    return _dense(FIXED_ROWS), _draw(samples, FIXED_ROWS, _FEATURES)


def _quantized(samples: int) -> tuple[onnx.ModelProto, Array]:
    array = _draw(samples, _FEATURES)
    return _quantized_of(_dense("N"), array[:32]), array


def _constants(samples: int) -> tuple[onnx.ModelProto, Array]:
    model = _dense("N")
    nodes = [
        helper.make_node("Constant", [], [tensor.name], name=f"{tensor.name}_node", value=tensor)
        for tensor in model.graph.initializer
    ]
    model.graph.ClearField("initializer")
    nodes += list(model.graph.node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model, _draw(samples, _FEATURES)


def _batch_last(samples: int) -> tuple[onnx.ModelProto, Array]:
    return _dense("N", turned=True), _draw(samples, _FEATURES)


ODD = {
    odd.name: odd
    for odd in (
        OddModel("odd-fixed-batch", f"a dense classifier of {FIXED_ROWS} rows at a time", _fixed_batch),
        OddModel("odd-quantized", "a dense classifier that is quantized already (QDQ)", _quantized),
        OddModel("odd-constants", "a dense classifier with its weights in Constant nodes", _constants),
        OddModel("odd-batch-last", "a dense classifier whose output has the batch on its last axis", _batch_last),
    )
}


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, array: Array) -> None:
        self._left = iter(array)

    def get_next(self) -> dict[str, Array] | None:
        row = next(self._left, None)
        return None if row is None else {"x": row[None]}


def _quantized_of(model: onnx.ModelProto, rows: Array) -> onnx.ModelProto:
    """Quantize as a user would have done it before: QDQ, UINT8 activations, INT8 weights of 7 bits."""
    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            model,
            made := Path(folder, "quantized.onnx"),
            _Rows(rows),
            quant_format=QuantFormat.QDQ,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(made)


def _dense(rows: int | str, *, turned: bool = False) -> onnx.ModelProto:
    """Make x FP32 [rows,64] -> y FP32 [rows,10], or [10,rows] when it is turned."""
    rng = np.random.default_rng(0)
    sizes = [(_FEATURES, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _CLASSES)]
    weights, nodes, last = [], [], "x"
    for index, (inner, outer) in enumerate(sizes):
        matrix = rng.standard_normal((inner, outer)).astype(np.float32) * np.float32((2 / inner) ** 0.5)
        weights += [
            numpy_helper.from_array(matrix, f"w{index}"),
            numpy_helper.from_array(rng.standard_normal(outer).astype(np.float32) / 10, f"b{index}"),
        ]
        nodes.append(helper.make_node("Gemm", [last, f"w{index}", f"b{index}"], [f"h{index}"], name=f"dense{index}"))
        last = f"h{index}"
        if index < len(sizes) - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{index}"], name=f"relu{index}"))
            last = f"r{index}"
    nodes.append(helper.make_node("Transpose" if turned else "Identity", [last], ["y"], name="out"))
    shape = [_CLASSES, rows] if turned else [rows, _CLASSES]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, _FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _draw(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
