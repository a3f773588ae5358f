"""One model whose layers switch between FP32 and simulated INT8 from run to run, so that no subset needs a build.

Every switched layer reads its weight from an input of the session, which a view feeds with the original or with its
rounded twin; its activations pass through an ``If`` that rounds them, or not. What is rounded where follows the rules
of onnxruntime's quantizer, since a real model of the same layers must answer alike:

* dynamic: each quantized MatMul or Gemm rounds its own input, with a scale from the whole batch.
* static: a *tensor* is rounded for all of its readers as soon as one quantized layer reads it, so the residual around a
  layer is rounded too; convolutions round their output, together with the chain of operators that follows them.

Products are added in FP32 from rounded values, which differs from INT8 sums by rounding of FP32 alone. Two things are
left out: biases, which INT8 keeps with 32 bits, and saturation, which 7-bit weights or exact products exclude.

Memory: the weights twice, FP32 and rounded, outside of the session, which holds none of them. Time: that of FP32 and of
one or two passes over each rounded activation; weights are not packed ahead, so that batches pay more than singles.
"""

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp

from optimizers.errors import PassFailed
from optimizers.graph import nodes_of, save_model
from optimizers.passes.int8 import prepared, weighted_nodes
from optimizers.passes.int8_static import chained_nodes
from optimizers.passes.ranges import Range
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import CPU
from server.session import Session
from server.tensors import Array, Tensors

_POOLS = frozenset({"AveragePool", "MaxPool"})
_PLAIN = SessionOptions(graph_level="basic")
_MOST_NAMED = 5


class Scheme(msgspec.Struct, frozen=True):
    """How the layers are quantized.

    Attributes:
        kind: ``dynamic`` as ``Int8Dynamic`` does it, ``static`` as ``Int8Static`` does it for the CPU.
        op_types: Operators to switch: of MatMul and Gemm, and for ``static`` also Conv.
        bits: Of the weights, 7 or 8; ``int8.reduced_range`` tells which the host needs.
        ranges: For ``static``: tensor -> lowest and highest value; of all ``rounded_tensors`` at least.
    """

    kind: Literal["dynamic", "static"]
    op_types: frozenset[str]
    bits: Literal[7, 8]
    ranges: Mapping[str, Range] = {}


class Layer(msgspec.Struct, frozen=True):
    """One layer that can be switched.

    Attributes:
        node: Name of the node, as ``int8.prepared`` leaves it.
        op_type: Its operator.
        macs: Multiply-accumulates for one sample.
    """

    node: str
    op_type: str
    macs: int


class View:
    """The model with a fixed set of layers in INT8; what ``evidence`` calls a runner.

    Runs of several views of one switchboard may overlap, in several threads.
    """

    def __init__(self, session: Session, outputs: tuple[str, ...], switches: Tensors) -> None:
        self._session, self._outputs, self._switches = session, outputs, switches

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Run one request.

        Args:
            inputs: Name -> array, as the model takes it.

        Returns:
            The outputs of the model, by name, in its order.

        Raises:
            InferenceFailed: If onnxruntime refuses the inputs, or if the switchboard is closed.
        """
        return self._session.run({**inputs, **self._switches}, self._outputs)


class Switchboard:
    """A session of the model in which every weighted layer can be switched to simulated INT8, see the module.

    Args:
        model: An FP32 model, weights inside; left unchanged.
        scheme: How the layers are quantized.
        work: An existing folder for a temporary file.
        sample: One single, as one request would carry it; multiply-accumulates are counted on it.
        options: How to open the session. Levels above ``basic`` save little: fused operators read constant weights.

    Raises:
        PassFailed: If no such operator has a constant weight, if a range is missing, if the opset is too old, or if the
            model does not run on the sample.
    """

    layers: tuple[Layer, ...]

    def __init__(
        self, model: onnx.ModelProto, scheme: Scheme, work: Path, sample: Tensors, options: SessionOptions = _PLAIN
    ) -> None:
        plan = _Plan(prepared(model), scheme)
        self._plan = plan
        self._outputs = tuple(value.name for value in model.graph.output)
        try:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                path = Path(folder) / "switchboard.onnx"
                save_model(_wired(plan), path)
                self._session = Session(path, CPU, options)
            shapes = tuple(plan.name("shape", layer) for layer in plan.nodes)
            seen = self._session.run({**sample, **plan.switches(())}, shapes)
        except SlipstreamError as exc:
            raise PassFailed(f"the model does not run with switched layers: {exc}") from exc
        self.layers = tuple(
            Layer(name, node.op_type, _macs(node, plan.weights[name][0].shape, seen[plan.name("shape", name)]))
            for name, node in plan.nodes.items()
        )

    def view(self, quantized: Collection[str]) -> View:
        """Return the model with these layers in INT8 and all others in FP32.

        Args:
            quantized: Names of nodes, out of ``layers``.

        Raises:
            PassFailed: If a name is none of ``layers``.
        """
        unknown = sorted(set(quantized) - set(self._plan.nodes))
        if unknown:
            known = [*list(self._plan.nodes)[:_MOST_NAMED], *(["..."] if len(self._plan.nodes) > _MOST_NAMED else [])]
            raise PassFailed(f"no layer is named {', '.join(map(repr, unknown))}; the layers are {', '.join(known)}")
        return View(self._session, self._outputs, self._plan.switches(quantized))

    def close(self) -> None:
        """Release the session once the runs in progress have ended; later runs of all views fail."""
        self._session.close()


def rounded_tensors(model: onnx.ModelProto, op_types: frozenset[str]) -> tuple[str, ...]:
    """Return the activations that static quantization rounds when every layer is quantized, in graph order.

    Args:
        model: An FP32 model, weights inside, settled as ``int8.prepared`` leaves it.
        op_types: As in ``Scheme``.
    """
    return tuple(_rounded(model, {node.name for node in _switched_nodes(model, op_types)}))


def rounded_weight(weight: Array, axis: int, bits: Literal[7, 8]) -> Array:
    """Round a weight to symmetric INT8 per channel and back, as onnxruntime's quantizer does.

    ``scale = max|w| / q``, ``w' = scale * round(w / scale)``, with q = 127, or 64 for 7 bits.

    Args:
        weight: FP32.
        axis: Of the channels; a weight without this axis gets one scale.
        bits: 7 or 8.

    Returns:
        FP32, of the same shape.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True, initial=0).astype(np.float64)
    scale = largest / (127 if bits == 8 else 64)
    tiny = scale < np.finfo(np.float32).tiny
    divisor = np.where(tiny, 1, scale).astype(np.float32)
    codes = np.clip(np.round(weight / divisor), -128, 127)
    return np.asarray(codes * divisor, np.float32)


class _Plan:
    """Which weights and activations are switched, in a model that is edited by ``_wired``."""

    def __init__(self, model: onnx.ModelProto, scheme: Scheme) -> None:
        self.model, self.scheme = model, scheme
        op_types = scheme.op_types - {"Conv"} if scheme.kind == "dynamic" else scheme.op_types
        nodes = [node for node in _switched_nodes(model, op_types) if scheme.kind == "static" or _is_product(node)]
        if not nodes:
            raise PassFailed(f"no {', '.join(sorted(op_types)) or 'operator'} has a constant weight to switch")
        self.nodes = {node.name: node for node in nodes}
        arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        self.weights: dict[str, tuple[Array, Array]] = {}
        for node in nodes:
            weight = numpy_helper.to_array(arrays[node.input[1]])
            rounded = rounded_weight(weight, _channel_axis(node, weight.ndim, scheme.kind), scheme.bits)
            self.weights[node.name] = (weight, rounded)
        # Dynamic quantization rounds what one node reads, static quantization what all readers of a tensor read.
        self.sites = tuple(self.nodes if scheme.kind == "dynamic" else _rounded(model, set(self.nodes)))
        self._steps = {} if scheme.kind == "dynamic" else {site: _step(site, scheme.ranges) for site in self.sites}
        self._rules = onnx.ModelProto()  # the graph as it was, for the rules of subsets; without the weights
        self._rules.graph.node.extend(model.graph.node)
        self._rules.graph.output.extend(model.graph.output)
        self._rules.graph.initializer.extend(
            TensorProto(name=tensor.name, data_type=tensor.data_type) for tensor in model.graph.initializer
        )
        self._prefix = _free_prefix(model)

    def name(self, part: str, of: str = "") -> str:
        """Return the name of a tensor that the model itself does not use."""
        return f"{self._prefix}{part}:{of}"

    def switches(self, quantized: Collection[str]) -> dict[str, Array]:
        """Return the additional inputs of a run that quantizes these layers."""
        chosen = set(quantized)
        feeds = {self.name("weight", layer): pair[layer in chosen] for layer, pair in self.weights.items()}
        if self.scheme.kind == "dynamic":
            return {**feeds, self.name("flags"): np.array([site in chosen for site in self.sites], np.bool_)}
        range_of = _rounded(self._rules, chosen)
        steps = [self._steps[range_of.get(site, site)] for site in self.sites]
        return {
            **feeds,
            self.name("flags"): np.array([site in range_of for site in self.sites], np.bool_),
            self.name("scales"): np.array([scale for scale, _ in steps], np.float32),
            self.name("zeros"): np.array([zero for _, zero in steps], np.uint8),
        }


def _switched_nodes(model: onnx.ModelProto, op_types: frozenset[str]) -> list[onnx.NodeProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in weighted_nodes(model, op_types) if node.input[0] not in constants]


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _is_product(node: onnx.NodeProto) -> bool:
    """Whether dynamic quantization takes a node: of Gemm it takes what it can rewrite to MatMul and Add."""
    return (_attribute(node, "alpha", 1), _attribute(node, "beta", 1), _attribute(node, "transA", 0)) == (1, 1, 0)


def _channel_axis(node: onnx.NodeProto, rank: int, kind: str) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return rank - 1 if kind == "dynamic" else 1  # static quantization takes axis 1 also of stacked matrices


def _rounded(model: onnx.ModelProto, quantized: set[str]) -> dict[str, str]:
    """Return which tensors static quantization of these layers rounds, each with the tensor whose range it takes."""
    convolutions = {node.name for node in weighted_nodes(model, frozenset({"Conv"}))}
    chained = set(chained_nodes(model, convolutions - quantized))
    weights = {tensor.name for tensor in model.graph.initializer}
    readers = Counter(name for node in nodes_of(model) for name in node.input)
    readers.update(value.name for value in model.graph.output)
    range_of: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in quantized | chained:
            continue
        source, target = node.input[0], node.output[0]
        if node.name in quantized:
            range_of.setdefault(source, source)
            if node.op_type == "Conv":
                range_of[target] = target
        else:
            if node.op_type in ("Clip", "Relu") and readers[source] == 1:
                range_of.pop(source, None)  # the range of its output clips as well as the operator does
            elif node.op_type in ("Add", "GlobalAveragePool"):
                for name in set(node.input) - weights:
                    range_of.setdefault(name, name)
            # A pool keeps the scale of its input.
            range_of[target] = range_of.get(source, target) if node.op_type in _POOLS else target
    return range_of


def _wired(plan: _Plan) -> onnx.ModelProto:
    """Give the model its switches: weights and flags become inputs, activations pass through ``If``."""
    graph = plan.model.graph
    _wire_weights(plan)
    vectors = [("flags", "flag", TensorProto.BOOL)]
    if plan.scheme.kind == "static":
        vectors += [("scales", "scale", TensorProto.FLOAT), ("zeros", "zero", TensorProto.UINT8)]
    ordered = [_split(plan, *vector) for vector in vectors]
    ordered += _wire_inputs(plan) if plan.scheme.kind == "dynamic" else _wire_tensors(plan)
    for name, node in plan.nodes.items():
        shape = plan.name("shape", name)
        ordered.append(helper.make_node("Shape", [node.output[0]], [shape]))
        graph.output.append(helper.make_tensor_value_info(shape, TensorProto.INT64, [None]))
    graph.ClearField("node")
    graph.node.extend(ordered)
    del graph.value_info[:]  # names moved; the session infers on its own
    return plan.model


def _split(plan: _Plan, vector: str, part: str, element: int) -> onnx.NodeProto:
    """Add an input with one element for each switch, and return the node that takes it apart."""
    graph, sites = plan.model.graph, plan.sites
    graph.input.append(helper.make_tensor_value_info(plan.name(vector), element, [len(sites)]))
    ones = numpy_helper.from_array(np.ones(len(sites), np.int64), plan.name("ones", vector))
    graph.initializer.append(ones)
    return helper.make_node("Split", [plan.name(vector), ones.name], [plan.name(part, site) for site in sites], axis=0)


def _wire_weights(plan: _Plan) -> None:
    graph = plan.model.graph
    for name, node in plan.nodes.items():
        node.input[1] = plan.name("weight", name)
        weight = plan.weights[name][0]
        graph.input.append(helper.make_tensor_value_info(node.input[1], TensorProto.FLOAT, weight.shape))
    used = {name for node in nodes_of(plan.model) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _wire_inputs(plan: _Plan) -> list[onnx.NodeProto]:
    """Let each switched node read its input through its own switch."""
    ordered: list[onnx.NodeProto] = []
    for node in plan.model.graph.node:
        if node.name in plan.nodes:
            source = node.input[0]
            node.input[0] = plan.name("activation", node.name)
            ordered.append(_switch(plan, node.name, source, node.input[0]))
        ordered.append(node)
    return ordered


def _wire_tensors(plan: _Plan) -> list[onnx.NodeProto]:
    """Let all readers of each rounded tensor read it through its switch."""
    inputs = {value.name for value in plan.model.graph.input}
    given = [site for site in plan.sites if site in inputs]  # keep their names, unlike what nodes write
    ordered = [_switch(plan, site, site, plan.name("activation", site)) for site in given]
    rounded = set(plan.sites) - inputs
    for node in plan.model.graph.node:
        for index, name in enumerate(node.input):
            if name in given:
                node.input[index] = plan.name("activation", name)
        ordered.append(node)
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = plan.name("activation", name)
                ordered.append(_switch(plan, name, node.output[index], name))
    return ordered


def _switch(plan: _Plan, site: str, source: str, target: str) -> onnx.NodeProto:
    """Return ``target = If(flag, rounded source, source)``."""
    codes, scale, zero, value, same = (plan.name(part, site) for part in ("codes", "scale", "zero", "value", "same"))
    if plan.scheme.kind == "dynamic":
        rounding = helper.make_node("DynamicQuantizeLinear", [source], [codes, scale, zero])
    else:
        rounding = helper.make_node("QuantizeLinear", [source, scale, zero], [codes])
    back = helper.make_node("DequantizeLinear", [codes, scale, zero], [value])
    branches = {
        "then_branch": _branch([rounding, back]),
        "else_branch": _branch([helper.make_node("Identity", [source], [same])]),
    }
    return helper.make_node("If", [plan.name("flag", site)], [target], name=plan.name("switch", site), **branches)


def _branch(nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "branch", [], [result])


def _step(tensor: str, ranges: Mapping[str, Range]) -> tuple[float, int]:
    """Return scale and zero point of UINT8, computed by onnxruntime's quantizer itself."""
    if tensor not in ranges:
        raise PassFailed(f"no range of tensor '{tensor}' is given, which static quantization rounds")
    low, high = (np.float32(end) for end in ranges[tensor])
    zero, scale = compute_scale_zp(low, high, np.array(0, np.uint8), np.array(255, np.uint8))
    return float(scale), int(zero)


def _macs(node: onnx.NodeProto, weight: tuple[int, ...], output: Array) -> int:
    per_element = int(np.prod(weight[1:])) if node.op_type == "Conv" else _inner(node, weight)
    return int(np.prod(output)) * per_element


def _inner(node: onnx.NodeProto, weight: tuple[int, ...]) -> int:
    if node.op_type == "Gemm" and _attribute(node, "transB", 0):
        return weight[1]
    return weight[-2] if len(weight) > 1 else weight[0]


def _free_prefix(model: onnx.ModelProto) -> str:
    names = {name for node in nodes_of(model) for name in (*node.input, *node.output)}
    prefix = "switchboard:"
    while any(name.startswith(prefix) for name in names):
        prefix = f"_{prefix}"
    return prefix
