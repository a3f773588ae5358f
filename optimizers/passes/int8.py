"""What both INT8 passes share: the choice of the weight range and of the nodes, and the preparation of the model."""

import math
from collections import Counter
from collections.abc import Collection
from graphlib import TopologicalSorter

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from optimizers.errors import PassFailed
from optimizers.graph import free_name, nodes_of, opset_of
from optimizers.passes import copy_of
from optimizers.passes.opset import OLDEST_OPSET
from optimizers.passes.settle import settle
from server.artifact import SessionOptions
from server.host import HostFacts
from server.providers import EXACT_PRODUCTS

WEIGHTED_OPS = frozenset({"MatMul", "Gemm", "Conv"})
DEFAULT_TENSOR_TYPE = {"DefaultTensorType": onnx.TensorProto.FLOAT}
"""What onnxruntime's quantizer assumes where shape inference found no type, e.g. behind an operator of its own."""

_QUANTIZED_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_QUANTIZED_OPS |= {"MatMulInteger", "ConvInteger", "MatMulNBits"}


def reduced_range(host: HostFacts) -> bool:
    """Whether weights must have 7 bits on this CPU.

    x86 without an INT8 dot product multiplies UINT8 by INT8 and adds two neighbours in 16 bits, which saturates:
    2 x 255 x 127 exceeds 32767. onnxruntime's quantizer keeps reduced weights within 64, and 2 x 255 x 64 = 32640 fits.

    Weights made on a CPU with the dot product have 8 bits. When such a model is opened on one without, the server asks
    for exact products (``server.cores.saturates_int8``), which is right, but slower.
    """
    return host.arch in ("x86_64", "AMD64") and not host.has_int8_dot


def int8_options(host: HostFacts) -> SessionOptions:
    """Return how to open an INT8 model made on this CPU: 7-bit weights do not need the slower exact products."""
    return SessionOptions(config={EXACT_PRODUCTS: "0"}) if reduced_range(host) else SessionOptions()


def weighted_nodes(model: onnx.ModelProto, op_types: frozenset[str]) -> list[onnx.NodeProto]:
    """Return the nodes of these operators in the main graph whose second input is a FLOAT weight."""
    weights = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    nodes = [node for node in model.graph.node if node.op_type in op_types and node.domain in ("", "ai.onnx")]
    return [node for node in nodes if len(node.input) > 1 and node.input[1] in weights]


def require_float(model: onnx.ModelProto) -> None:
    """Require an opset with per-channel scales, and a model that nothing has quantized.

    Raises:
        PassFailed: If the opset is too old, or if an operator, in a subgraph or not, computes with quantized values.
    """
    if opset_of(model) < OLDEST_OPSET:
        raise PassFailed(f"opset {opset_of(model)} has no per-channel scales; opset {OLDEST_OPSET} or newer is needed")
    quantized = Counter(node.op_type for node in nodes_of(model) if _is_quantized(node))
    if quantized:
        found = ", ".join(f"{count} {op_type}" for op_type, count in sorted(quantized.items()))
        raise PassFailed(f"already quantized: the model has {found}; give the FP32 model")


def chosen_nodes(model: onnx.ModelProto, op_types: frozenset[str], keep: Collection[str]) -> list[onnx.NodeProto]:
    """Return the weighted nodes to quantize: all of these operators but those to keep.

    Args:
        model: A prepared model.
        op_types: Operators that the pass quantizes.
        keep: Names of nodes that stay in float.

    Raises:
        PassFailed: If a name is unknown, or if every weighted node is to be kept.
    """
    unknown = sorted(set(keep) - {node.name for node in model.graph.node})
    if unknown:
        raise PassFailed(f"nodes to keep that the model does not have: {', '.join(unknown)}")
    weighted = weighted_nodes(model, op_types)
    chosen = [node for node in weighted if node.name not in set(keep)]
    if weighted and not chosen:
        raise PassFailed(f"all {len(weighted)} nodes with weights are kept in float; nothing is left to quantize")
    return chosen


def kept_note(model: onnx.ModelProto, op_types: frozenset[str], keep: Collection[str]) -> str:
    """Return how many of the weighted nodes stay in float, as the end of a note; nothing where none does."""
    weighted = weighted_nodes(model, op_types)
    kept = sum(node.name in set(keep) for node in weighted)
    return f", {kept} of {len(weighted)} nodes kept in float" if kept else ""


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that onnxruntime's quantizer handles rightly.

    Nodes have names, weights are initializers with one reader, biases of Gemm have one axis.

    Raises:
        PassFailed: If the opset cannot express per-channel scales, or if the model is quantized already.
    """
    require_float(model)
    twin = copy_of(model)
    settle(twin, model)  # ranges and types are found by the shapes that are known
    _name_nodes(twin)
    _lift_constants(twin)
    untie_weights(twin)
    flatten_biases(twin)
    add_pre_process_metadata(twin)  # the passes before this one did what the quantizer would warn about
    return twin


def captured(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node's subgraphs read, from the graph around them or their own."""
    names = set()
    for attribute in node.attribute:
        for graph in (*attribute.graphs, attribute.g):
            for inner in graph.node:
                names |= set(inner.input) | captured(inner)
    return names


def sort_nodes(model: onnx.ModelProto) -> None:
    """Put the nodes of the main graph into an order in which they can run; edits in place.

    onnxruntime's quantizer sorts them without regard for what subgraphs read.
    """
    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    needs = {
        index: {makers[name] for name in (*node.input, *sorted(captured(node))) if name in makers}
        for index, node in enumerate(nodes)
    }
    ordered = [nodes[index] for index in TopologicalSorter(needs).static_order()]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def untie_weights(model: onnx.ModelProto) -> int:
    """Give every Gemm and MatMul its own copy of a weight that other nodes read too; edits in place.

    onnxruntime before 1.32 transposes the weight of a Gemm in place, and whoever shares it then reads garbage.

    Returns:
        How many copies were made.
    """
    readers = Counter(name for node in nodes_of(model) for name in node.input)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    copies = 0
    for node in weighted_nodes(model, frozenset({"MatMul", "Gemm"})):
        shared = node.input[1]
        if readers[shared] == 1 and shared not in outputs:
            continue
        copies += 1
        own = model.graph.initializer.add()
        own.CopyFrom(weights[shared])
        own.name = free_name(f"{shared}_of_{node.name or node.output[0]}", weights)
        weights[own.name] = own
        readers[shared] -= 1
        node.input[1] = own.name
    return copies


def flatten_biases(model: onnx.ModelProto) -> int:
    """Give every Gemm whose bias is broadcast from ``[1, N]`` or one element a bias ``[N]``; edits in place.

    onnxruntime's quantizer reads one element per output channel and fails on the other shapes.

    Returns:
        How many biases were rewritten.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    rewritten = 0
    for node in weighted_nodes(model, frozenset({"Gemm"})):
        bias = weights.get(node.input[2]) if len(node.input) > 2 else None
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        channels = weights[node.input[1]].dims[0 if transposed else 1]
        if bias is None or list(bias.dims) == [channels] or math.prod(bias.dims) not in (1, channels):
            continue
        if math.prod(bias.dims) == channels and bias.dims[-1] != channels:
            continue  # one element per row of a fixed batch
        rewritten += 1
        flat = np.broadcast_to(numpy_helper.to_array(bias).reshape(-1), (channels,))
        own = numpy_helper.from_array(flat.copy(), free_name(f"{bias.name}_of_{node.name or node.output[0]}", weights))
        model.graph.initializer.append(own)
        weights[own.name] = own
        node.input[2] = own.name
    return rewritten


def _is_quantized(node: onnx.NodeProto) -> bool:
    return node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear")


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give nodes without a name one; the quantizer tells nodes apart by name."""
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = free_name(f"{node.op_type}_{index}", taken)
            taken.add(node.name)


def _lift_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes of the main graph that hold a tensor into initializers."""
    outputs = {value.name for value in model.graph.output}
    for node in [n for n in model.graph.node if n.op_type == "Constant" and n.output[0] not in outputs]:
        tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if tensors:
            weight = model.graph.initializer.add()
            weight.CopyFrom(tensors[0])
            weight.name = node.output[0]
            model.graph.node.remove(node)
