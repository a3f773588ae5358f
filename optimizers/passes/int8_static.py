"""INT8 with activation scales from calibration data, written as QuantizeLinear and DequantizeLinear pairs."""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    TensorsData,
    quantize_static,
    save_tensors_data,
)

from optimizers.errors import PassFailed
from optimizers.graph import load_model
from optimizers.passes import Need, PassContext, PassResult, PassSpec
from optimizers.passes.activations import float_tensors, ranges
from optimizers.passes.int8 import (
    DEFAULT_TENSOR_TYPE,
    WEIGHTED_OPS,
    captured,
    chosen_nodes,
    int8_options,
    kept_note,
    prepared,
    reduced_range,
    sort_nodes,
    weighted_nodes,
)
from optimizers.passes.ranges import Method, Range
from optimizers.passes.settle import settle
from server.artifact import SessionOptions

# Operators that only move or clip values: behind a convolution, INT8 keeps the chain free of conversions.
_CHAINED_OPS = frozenset({"Add", "AveragePool", "Clip", "GlobalAveragePool", "MaxPool", "Relu"})
_FLOAT_OUTPUTS = "OpTypesToExcludeOutputQuantization"


class Int8Static(msgspec.Struct, frozen=True):
    """Quantize Conv, MatMul and Gemm with constant weights, per channel.

    Attributes:
        method: How ranges follow from the data, see ``ranges``.
        target: ``cpu``: UINT8 activations, INT8 weights. ``tensorrt``: both INT8 and symmetric, which is all it takes.
        keep: Names of nodes that stay in float.
    """

    method: Method = "minmax"
    target: Literal["cpu", "tensorrt"] = "cpu"
    keep: tuple[str, ...] = ()

    @property
    def spec(self) -> PassSpec:
        """Declare the pass; only the CPU's form depends on the host."""
        needs: frozenset[Need] = frozenset({"calibration", "host"} if self.target == "cpu" else {"calibration"})
        return PassSpec("int8-static", 2, "lossy", produces="int8", needs=needs, target=self.target)

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data, if no Conv, MatMul or Gemm has a constant weight, if none is
                left to quantize or a name to keep is unknown, if the opset is too old, if the model is quantized
                already, if it does not run on the data, or if the quantizer fails.
        """
        if not context.calibration:
            raise PassFailed("no calibration data; give --calibration DATA.npz")
        ready = prepared(model)
        weighted = chosen_nodes(ready, WEIGHTED_OPS, self.keep)
        if not weighted:
            raise PassFailed("no Conv, MatMul or Gemm has a constant weight")
        names = [node.name for node in weighted]
        if self.target == "cpu":
            names += chained_nodes(ready, self.keep)
        note = self._note(context) + kept_note(ready, WEIGHTED_OPS, self.keep)
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            quantized = self._quantize(ready, names, context, Path(folder))
        sort_nodes(quantized)
        quantized.ir_version = model.ir_version
        settle(quantized, model)
        count = sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
        if count == 0:
            raise PassFailed("onnxruntime's quantizer left every operator in FP32")
        counts = {"quantized": len(weighted), "+QuantizeLinear": count}
        options = int8_options(context.host) if self.target == "cpu" else SessionOptions()
        return PassResult(quantized, changed=True, counts=counts, note=note, options=options)

    def _quantize(
        self, model: onnx.ModelProto, names: list[str], context: PassContext, folder: Path
    ) -> onnx.ModelProto:
        cache, target = folder / "ranges.json", folder / "model.onnx"
        found = self._ranges(model, set(names), context)
        extremes = {name: (np.float32(low), np.float32(high)) for name, (low, high) in found.items()}
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, extremes), cache)
        activations = QuantType.QUInt8 if self.target == "cpu" else QuantType.QInt8
        try:
            quantize_static(
                model,
                target,
                None,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(WEIGHTED_OPS | _CHAINED_OPS),
                nodes_to_quantize=names,
                per_channel=True,
                reduce_range=self.target == "cpu" and reduced_range(context.host),
                activation_type=activations,
                weight_type=QuantType.QInt8,
                calibration_cache_path=cache,
                extra_options=self._extra_options(),
            )
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as exc:
            raise PassFailed(f"onnxruntime's quantizer fails: {exc}") from exc
        return load_model(target)

    def _ranges(self, model: onnx.ModelProto, names: set[str], context: PassContext) -> dict[str, Range]:
        """Observe what will be rounded to 8 bits, which is far less than all tensors."""
        nodes = [node for node in model.graph.node if node.name in names]
        stays_float = self._extra_options()[_FLOAT_OUTPUTS]
        touched = {name for node in nodes for name in node.input}
        touched |= {name for node in nodes if node.op_type not in stays_float for name in node.output}
        tensors = [name for name in float_tensors(model) if name in touched]
        symmetric = self.target == "tensorrt"
        return ranges(model, tensors, context.calibration, context.work, self.method, symmetric)

    def _extra_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"MatMulConstBOnly": True, **DEFAULT_TENSOR_TYPE}
        if self.target == "tensorrt":
            return options | tensorrt_int8_options()
        # A MatMul adds up to FP32 anyway; rounding that to 8 bits costs more fidelity than it saves time.
        return options | {_FLOAT_OUTPUTS: ["Gemm", "MatMul"]}

    def _note(self, context: PassContext) -> str:
        if self.target == "tensorrt":
            return f"symmetric INT8 for TensorRT, {self.method} ranges"
        bits = 7 if reduced_range(context.host) else 8
        return f"{bits}-bit weights, per channel, {self.method} ranges"


def chained_nodes(model: onnx.ModelProto, keep: Collection[str] = ()) -> list[str]:
    """Return the names of the nodes that pass on nothing but the results of quantized convolutions, in graph order.

    What a subgraph reads stays as it is, for the quantizer merges nodes of the chain and knows no other readers.

    Args:
        model: A prepared model.
        keep: Names of nodes that stay in float.
    """
    elsewhere = {name for node in model.graph.node for name in captured(node)}
    from_conv = {node.output[0] for node in weighted_nodes(model, frozenset({"Conv"})) if node.name not in set(keep)}
    weights = {tensor.name for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        activations = {name for name in node.input if name and name not in weights}
        if node.op_type not in _CHAINED_OPS or node.name in set(keep) or activations & elsewhere:
            continue
        if activations and activations <= from_conv:
            from_conv.add(node.output[0])
            names.append(node.name)
    return names


def tensorrt_int8_options() -> dict[str, Any]:
    """Return the quantizer's options for QDQ models that TensorRT reads.

    TensorRT takes zero points of 0 only, has no INT32 DequantizeLinear (so biases stay FP32), and fuses an operator
    with what follows it only when its output is not quantized on its own.
    """
    return {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "DedicatedQDQPair": True,
        _FLOAT_OUTPUTS: sorted(WEIGHTED_OPS),
    }
