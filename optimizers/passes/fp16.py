"""FP16: weights and arithmetic in half precision, for GPUs; inputs and outputs stay FP32."""

from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16

from optimizers.errors import PassFailed
from optimizers.graph import weight_bytes
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.activations import float_tensors, largest_magnitudes
from optimizers.passes.settle import settle

LARGEST_FP16 = 65504.0
LARGEST_OBSERVED = LARGEST_FP16 / 4
"""Observed values beyond this stay FP32: inputs that were not observed may go further."""

_LARGEST_PROTO_BYTES = 2_000_000_000


class Fp16:
    """Convert to FP16, and keep the nodes in FP32 whose weights or observed values do not fit into it."""

    spec: ClassVar[PassSpec] = PassSpec("fp16", 1, "lossy", produces="fp16", target="cuda")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If the model holds no FP32 weights, if every weight would stay FP32, if the model is larger than
                2 GB, or if the conversion fails.
        """
        before = _fp32_weights(model)
        if not before:
            raise PassFailed("the model holds no FP32 weights")
        if weight_bytes(model) >= _LARGEST_PROTO_BYTES:
            raise PassFailed("the model is larger than 2 GB, which the converter does not handle")
        kept = _unfit_nodes(model, context)
        try:
            half = convert_float_to_float16(copy_of(model), keep_io_types=True, node_block_list=sorted(kept))
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as exc:
            raise PassFailed(f"onnxruntime's FP16 converter fails: {exc}") from exc
        bridge_casts(half)
        half = ir.to_proto(TopologicalSortPass()(ir.from_proto(half)).model)  # casts of inputs stand last
        settle(half, model)
        converted = before - _fp32_weights(half)
        if converted <= 0:
            raise PassFailed(
                f"{len(kept)} nodes hold values near {LARGEST_FP16:.0f} or beyond; no weight would be FP16"
            )
        note = f"{len(kept)} nodes stay FP32, their values come near {LARGEST_FP16:.0f} or exceed it" if kept else ""
        return PassResult(half, changed=True, counts={"weights": converted, "nodes_in_fp32": len(kept)}, note=note)


def bridge_casts(model: onnx.ModelProto) -> int:
    """Let FP32 nodes hand their values to each other directly; edits in place.

    The converter casts each output of a node that stays FP32 to FP16, and back for the next such node; a value beyond
    FP16 would become infinite on the way.

    Returns:
        How many round trips were taken out.
    """
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    narrow = {name: node.input[0] for name, node in casts.items() if _cast_to(node) == onnx.TensorProto.FLOAT16}
    direct = {
        name: narrow[node.input[0]]
        for name, node in casts.items()
        if _cast_to(node) == onnx.TensorProto.FLOAT and node.input[0] in narrow
    }
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in direct:
                node.input[index] = direct[name]
    outputs = {value.name for value in model.graph.output}
    read = {name for node in model.graph.node for name in node.input} | outputs
    unused = [n for n in casts.values() if n.output[0] not in read]
    for node in unused:
        model.graph.node.remove(node)
    return len(direct)


def _cast_to(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)


def _fp32_weights(model: onnx.ModelProto) -> int:
    return sum(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer)


def _unfit_nodes(model: onnx.ModelProto, context: PassContext) -> set[str]:
    """Return the nodes that read or write a value that FP16 cannot hold, or not with room to spare."""
    unfit = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and _too_large(t)}
    if context.calibration:
        seen = largest_magnitudes(model, float_tensors(model), context.calibration, context.work)
        unfit |= {name for name, largest in seen.items() if largest > LARGEST_OBSERVED}
    return {node.name for node in model.graph.node if unfit & {*node.input, *node.output}}


def _too_large(tensor: onnx.TensorProto) -> bool:
    values = numpy_helper.to_array(tensor)
    finite = values[np.isfinite(values)]
    return bool(finite.size) and float(np.abs(finite).max()) > LARGEST_FP16
