"""Reduced precision: which nodes must stay in FP32 when the others compute in a 16-bit float format.

A node stays, with a reason, when

- **type**: its operator, as ONNX defines it for the model's opset, or onnxruntime's own converter takes no such floats;
- **range**: one of its weights, or a value that it was seen to read or write, is too large for the format, or so small
  that the format keeps few or none of its bits (an epsilon of 1e-12 becomes 0 in FP16, and a division by it NaN);
- **depth**: it adds up so many terms that a running sum in the format leaves its range, or no longer changes.

Source: ModelOpt AutoCast has such rules as InitializerRangeRule, IORangeRule and DepthOfReductionRule, the last one
with a fixed limit on the depth. Here the limit follows from the observed magnitudes, or from the bits of the format.
"""

from collections import Counter
from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import nodes_of, opset_of, weight_bytes
from optimizers.passes import PassContext, PassResult, copy_of
from optimizers.passes.activations import float_tensors, largest_magnitudes
from optimizers.passes.casting import Precision, convert, element_types, takes
from optimizers.passes.depth import Observed, Shape, reduction_of
from optimizers.passes.settle import settle
from server.tensors import Tensors

Reason = Literal["type", "range", "depth"]
"""Why a node stays in FP32."""

HEADROOM = 4.0
"""Observed values must stay this factor below the largest of the format: inputs that were not observed may go further.
The same margin covers the partial sums of few products."""

FEW_PRODUCTS = 256
"""Sums of at most so many products are judged by their observed result alone."""

_LARGEST_PROTO_BYTES = 2_000_000_000
# ONNX computes the mean of the squares in FP32 (``stash_type``); runtimes that do not, such as TensorRT, overflow.
_SUMS_IN_FP32 = frozenset({"LayerNormalization"})


def reduce_precision(model: onnx.ModelProto, context: PassContext, precision: Precision) -> PassResult:
    """Convert a model to a 16-bit format where it can be; inputs and outputs stay FP32.

    Args:
        model: An FP32 model; left unchanged.
        context: Ranges are observed on ``calibration``; without it only weights and known shapes are judged.
        precision: The format.

    Raises:
        PassFailed: If the model holds control flow or no FP32 weights, if it is larger than 2 GB, if every weight
            would stay FP32, or if it does not run on the calibration data.
    """
    _require_convertible(model)
    known = copy_of(model)
    settle(known, model)
    kept = kept_nodes(known, context, precision)
    result = convert(known, kept, element_types(known), precision)
    converted = sum(tensor.data_type == precision.element for tensor in result.graph.initializer)
    reasons = {f"kept_by_{reason}": count for reason, count in sorted(Counter(kept.values()).items())}
    stay = f"{len(kept)} nodes stay FP32 ({', '.join(f'{count} {reason}' for reason, count in reasons.items())})"
    if not converted:
        raise PassFailed(f"no weight would be {precision.name}: {stay}")
    counts = {"weights": converted, "nodes_in_fp32": len(kept)} | reasons
    return PassResult(result, changed=True, counts=counts, note=stay if kept else "")


def kept_nodes(model: onnx.ModelProto, context: PassContext, precision: Precision) -> dict[int, Reason]:
    """Return which nodes of the main graph must stay in FP32: index -> the first reason that holds.

    Args:
        model: With inferred shapes; only nodes that touch FP32 tensors, or tensors of unknown type, are judged.
        context: See ``reduce_precision``.
        precision: The format.

    Raises:
        PassFailed: If the model does not run on the calibration data.
    """
    types, opset, observed = element_types(model), opset_of(model), observe(model, context)
    unfit = {name for name, largest in observed.magnitudes.items() if _unfit(largest, name, observed, precision)}
    unfit |= _guarded(model, unfit & observed.weights.keys(), observed, precision)
    kept: dict[int, Reason] = {}
    for index, node in enumerate(model.graph.node):
        touched = {*node.input, *node.output} - {""}
        if not {types.get(name, TensorProto.UNDEFINED) for name in touched} & {
            TensorProto.FLOAT,
            TensorProto.UNDEFINED,
        }:
            continue
        if not takes(node, types, opset, precision):
            kept[index] = "type"
        elif unfit & touched:
            kept[index] = "range"
        elif _too_deep(node, observed, precision):
            kept[index] = "depth"
    return kept


def observe(model: onnx.ModelProto, context: PassContext) -> Observed:
    """Find out shapes and largest magnitudes of a model's tensors, on the calibration data where there is any.

    Raises:
        PassFailed: If the model does not run on the calibration data.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    magnitudes = {name: _largest(t) for name, t in weights.items() if t.data_type == TensorProto.FLOAT}
    if context.calibration:
        magnitudes |= largest_magnitudes(model, float_tensors(model), context.calibration, context.work)
    return Observed(_shapes(model, context.calibration[0] if context.calibration else {}), magnitudes, weights)


def _require_convertible(model: onnx.ModelProto) -> None:
    if weight_bytes(model) >= _LARGEST_PROTO_BYTES:
        raise PassFailed("the model is larger than 2 GB; its shapes cannot be inferred in memory")
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in model.graph.initializer):
        raise PassFailed("the model holds no FP32 weights")
    subgraphs = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
    nested = sorted({node.op_type for node in nodes_of(model) for a in node.attribute if a.type in subgraphs})
    if nested:
        raise PassFailed(f"the model holds control flow ({', '.join(nested)}), whose subgraphs are not converted")


def _unfit(largest: float, name: str, observed: Observed, precision: Precision) -> bool:
    """Whether a format cannot hold a tensor; a bias that rounds to zero is harmless, an epsilon or a matrix is not."""
    weight = observed.weights.get(name)
    too_small = 0 < largest < precision.smallest
    if weight is None:
        return too_small or largest > precision.largest / HEADROOM
    is_bias = len(weight.dims) == 1 and weight.dims[0] > 1
    return largest > precision.largest or (too_small and not is_bias)


def _guarded(
    model: onnx.ModelProto, unfit_weights: Collection[str], observed: Observed, precision: Precision
) -> set[str]:
    """Return what nodes make with a tiny weight: an epsilon protects the division that reads the sum, not the sum."""
    tiny = {name for name in unfit_weights if observed.magnitude(name) < precision.smallest}
    return {name for node in model.graph.node if tiny & {*node.input} for name in node.output}


def _too_deep(node: onnx.NodeProto, observed: Observed, precision: Precision) -> bool:
    reduction = reduction_of(node, observed)
    if reduction is None:
        return False
    overflows = reduction.largest_sum > precision.largest
    if reduction.of_products:
        return overflows and reduction.depth > FEW_PRODUCTS
    return overflows or (reduction.depth > precision.exact_terms and node.op_type not in _SUMS_IN_FP32)


def _largest(tensor: onnx.TensorProto) -> float:
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _shapes(model: onnx.ModelProto, batch: Tensors) -> dict[str, Shape]:
    """Return name -> shape as for one batch; what cannot be inferred is left out."""
    twin = copy_of(model)
    del twin.graph.value_info[:]
    for value in (*twin.graph.input, *twin.graph.output):
        value.type.tensor_type.ClearField("shape")
    for value in twin.graph.input:
        if value.name in batch:
            value.type.tensor_type.shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=size) for size in batch[value.name].shape
            )
    try:
        twin = onnx.shape_inference.infer_shapes(twin if batch else model, data_prop=True)
    except (ValueError, onnx.shape_inference.InferenceError):
        twin = model  # the batch contradicts what the model declares: what is known already has to do
    values = (*twin.graph.input, *twin.graph.value_info, *twin.graph.output)
    inferred: dict[str, Shape] = {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
        )
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
    return inferred | {tensor.name: tuple(tensor.dims) for tensor in twin.graph.initializer}
