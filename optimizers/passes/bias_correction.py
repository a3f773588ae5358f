"""Bias correction: give the layers of an INT8 model the mean output that they had before."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import ClassVar

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import load_model, nodes_of, opset_of
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.int8 import WEIGHTED_OPS, weighted_nodes
from optimizers.passes.observing import observed
from server.tensors import Array

_AXES_AS_INPUT_OPSET = 18
_INT32 = np.iinfo(np.int32)


class _Layer(msgspec.Struct, frozen=True):
    """Where the mean of a layer is seen, and what moves it.

    Attributes:
        tensor: Its output in the reference.
        twin: Its output in the INT8 model, which can have the name of a removed Relu behind it.
        rank: Of the output of a convolution, channels on axis 1; 0 means that the channels are the last axis.
        bias: The initializer of the INT8 model to edit.
        step: What one unit of the stored bias adds to the output: FP32, a number or one per channel.
        channels: How many there are.
    """

    tensor: str
    twin: str
    rank: int
    bias: str
    step: Array
    channels: int


class BiasCorrection(msgspec.Struct, frozen=True):
    """Add to the bias of every Conv, Gemm, and MatMul with Add the mean error of its output, per channel.

    A correction changes what later layers see, and correcting all layers at once counts an error once per layer that
    inherits it. Layers are therefore corrected level by level, a level being the layers with the same number of layers
    before them, and the model is observed anew in between. Deep models skip levels at even distances: the next
    corrected level takes over what the skipped ones left. If the outputs do not come nearer to those of the reference
    on the calibration data, the model stays as it is.

    Static and dynamic INT8 models are taken alike, as tensors or nodes keep their names. Layers without a bias are
    left alone.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
    section 4.2, with observed means.

    Attributes:
        levels: How many levels are corrected, at most; each costs one run of the model up to that level.
    """

    spec: ClassVar[PassSpec] = PassSpec(
        "bias-correction",
        1,
        "lossy",
        consumes="int8",
        produces="int8",
        needs=frozenset({"calibration", "reference"}),
    )

    levels: int = 12

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data or no reference, if no layer has a bias of its own under the
                name that it has in the reference, or if a model does not run on the data.
        """
        if not context.calibration:
            raise PassFailed("no calibration data; give --calibration DATA.npz")
        if context.reference is None:
            raise PassFailed("no unquantized model to compare with")
        reference = load_model(context.reference)
        outputs = list(_outputs_of(reference))
        layers = list(_layers(model, outputs))
        if not layers:
            raise PassFailed(f"none of {len(outputs)} layers has a bias of its own that the reference has too")
        targets = _means(reference, {layer.tensor: layer for layer in layers}, context)
        twin = model
        for level in _spread(_by_level(model, layers), self.levels):
            seen = _means(twin, {layer.twin: layer for layer in level}, context)
            shifts = {layer.bias: targets[layer.tensor] - seen[layer.twin] for layer in level}
            twin = _corrected(twin, level, shifts)
        before, after = (_output_error(reference, each, context) for each in (model, twin))
        if not after < before:
            note = f"corrected biases bring the outputs no nearer: error {after:.3g} of the power, was {before:.3g}"
            return PassResult(model, changed=False, note=note)
        corrected = _count_of_differences(model, twin)
        counts = {"corrected": corrected, "skipped": len(outputs) - corrected}
        gain = 10 * np.log10(before / max(after, 1e-30))
        note = f"error of the outputs fell by {gain:.1f} dB on the calibration data"
        return PassResult(twin, changed=True, counts={k: v for k, v in counts.items() if v}, note=note)


def _count_of_differences(model: onnx.ModelProto, twin: onnx.ModelProto) -> int:
    pairs = zip(model.graph.initializer, twin.graph.initializer, strict=True)
    return sum(before != after for before, after in pairs)


def _means(model: onnx.ModelProto, layers: Mapping[str, _Layer], context: PassContext) -> dict[str, Array]:
    """Return the mean of these tensors per channel, float64, by the name of the tensor."""
    watched = _trimmed(_with_means(model, layers), [_mean_name(tensor) for tensor in layers])
    weights = {tensor.name for tensor in model.graph.initializer}
    first_input = next(value.name for value in model.graph.input if value.name not in weights)
    names = [*(_mean_name(tensor) for tensor in layers), first_input]
    totals: dict[str, Array] = {}
    rows = 0
    for values in observed(watched, names, context.calibration, context.work):
        size = (values[first_input].shape or (1,))[0]
        rows += size
        for tensor in layers:
            part = values[_mean_name(tensor)].astype(np.float64) * size
            totals[tensor] = totals[tensor] + part if tensor in totals else part
    return {tensor: total / rows for tensor, total in totals.items()}


def _output_error(reference: onnx.ModelProto, model: onnx.ModelProto, context: PassContext) -> float:
    """Return the squared error of the FP32 outputs over their power, the mean over the outputs; 0 without any."""
    outputs = [v.name for v in reference.graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    errors, powers = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    pair = (observed(each, outputs, context.calibration, context.work) for each in (reference, model))
    for expected, seen in zip(*pair, strict=True):
        for name in outputs:
            if expected[name].shape != seen[name].shape:
                continue  # how many results there are can depend on their values
            finite = np.isfinite(expected[name]) & np.isfinite(seen[name])
            wide = expected[name][finite].astype(np.float64)
            errors[name] += float(np.sum((wide - seen[name][finite]) ** 2))
            powers[name] += float(np.sum(wide**2))
    return float(np.mean([errors[name] / power for name, power in powers.items() if power > 0] or [0.0]))


def _by_level(model: onnx.ModelProto, layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Group layers by the number of layers before them, fewest first."""
    starts = {layer.twin: layer for layer in layers}
    producers = {name: node for node in model.graph.node for name in node.output}
    before = {name: {read for read in _read_by(node) if read in producers} for name, node in producers.items()}
    depth: dict[str, int] = {}
    levels: dict[int, list[_Layer]] = {}
    for name in TopologicalSorter(before).static_order():
        depth[name] = max((depth[read] + (read in starts) for read in before[name]), default=0)
        if name in starts:
            levels.setdefault(depth[name], []).append(starts[name])
    return [levels[key] for key in sorted(levels)]


def _spread(levels: Sequence[list[_Layer]], most: int) -> list[list[_Layer]]:
    """Return at most so many levels, at even distances, the last one always among them."""
    count = min(most, len(levels))
    return [levels[len(levels) * number // count - 1] for number in range(1, count + 1)]


def _outputs_of(reference: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int, int]]:
    """Yield what computes the output of each layer, with the rank of that (0 for channels last) and its channels."""
    weights = {tensor.name: tensor for tensor in reference.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in reference.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in weighted_nodes(reference, WEIGHTED_OPS):
        shape = weights[node.input[1]].dims
        if node.op_type == "Conv":
            yield node, len(shape), shape[0]
            continue
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        after = readers.get(node.output[0], [])
        added = len(after) == 1 and after[0].op_type == "Add" and node.op_type == "MatMul"
        yield after[0] if added else node, 0, shape[-2] if transposed else shape[-1]


def _layers(model: onnx.ModelProto, outputs: Sequence[tuple[onnx.NodeProto, int, int]]) -> Iterator[_Layer]:
    named = {node.name: node for node in model.graph.node if node.name}
    producers = {name: node for node in model.graph.node for name in node.output}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in nodes_of(model) for name in node.input)
    readers.update(value.name for value in model.graph.output)
    for original, rank, channels in outputs:
        node = _behind_quantization(original.output[0], producers) or named.get(original.name)
        bias, factor = _bias_of(node, initializers) if node is not None else ("", 0.0)
        step: Array = np.array([factor], np.float32)
        source = producers.get(bias)
        if source is not None and source.op_type == "DequantizeLinear" and readers[bias] == 1:
            bias, scale = source.input[0], initializers.get(source.input[1])
            step = step * (numpy_helper.to_array(scale) if scale is not None else 0)
        stored = initializers.get(bias)
        if node is None or stored is None or readers[bias] != 1 or not np.all(step):
            continue
        if stored.data_type not in (TensorProto.FLOAT, TensorProto.INT32):
            continue
        if list(stored.dims)[-1:] == [channels] and int(np.prod(stored.dims)) == channels:
            yield _Layer(original.output[0], node.output[0], rank, bias, step, channels)


def _behind_quantization(tensor: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return what computes a tensor; an output of the model may have been quantized on the way."""
    node = producers.get(tensor)
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        if node is not None and node.op_type == op_type:
            node = producers.get(node.input[0])
    return node


def _bias_of(node: onnx.NodeProto, initializers: Mapping[str, TensorProto]) -> tuple[str, float]:
    """Return the name of a node's bias and what it is multiplied with; an empty name where there is none."""
    if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
        return node.input[2], next((a.f for a in node.attribute if a.name == "beta"), 1.0)
    if node.op_type == "Add":
        return next((name for name in node.input if name in initializers), ""), 1.0
    return "", 0.0


def _mean_name(tensor: str) -> str:
    return f"{tensor}/channel_means"


def _with_means(model: onnx.ModelProto, layers: Mapping[str, _Layer]) -> onnx.ModelProto:
    """Return a copy that also computes the mean of each tensor per channel, so that only means leave it."""
    twin = copy_of(model)
    for tensor, layer in layers.items():
        name, source, axes = _mean_name(tensor), tensor, [0, *range(2, layer.rank)]
        if layer.rank == 0:
            source, axes = f"{name}/rows", [0]
            shape = numpy_helper.from_array(np.array([-1, layer.channels], np.int64), f"{name}/shape")
            twin.graph.initializer.append(shape)
            twin.graph.node.append(helper.make_node("Reshape", [tensor, shape.name], [source]))
        if opset_of(model) < _AXES_AS_INPUT_OPSET:
            node = helper.make_node("ReduceMean", [source], [name], axes=axes, keepdims=0)
        else:
            twin.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes"))
            node = helper.make_node("ReduceMean", [source, f"{name}/axes"], [name], keepdims=0)
        twin.graph.node.append(node)
    return twin


def _trimmed(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Drop, in place, the outputs and what only they need; onnxruntime would compute it although nobody asks."""
    producers = {name: node for node in model.graph.node for name in node.output}
    needed: set[str] = set()
    pending = list(tensors)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending.extend(_read_by(producers[name]) if name in producers else ())
    kept = [node for node in model.graph.node if needed.intersection(node.output)]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    for field, values in ((model.graph.node, kept), (model.graph.initializer, weights), (model.graph.output, [])):
        copies = list(values)
        del field[:]
        field.extend(copies)
    return model


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, those that its subgraphs read included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(name for inner in graph.node for name in _read_by(inner))
            names.update(value.name for value in graph.output)
    return names - {""}


def _corrected(model: onnx.ModelProto, layers: Sequence[_Layer], shifts: Mapping[str, Array]) -> onnx.ModelProto:
    """Return a copy with these shifts, by the name of the bias, added to the biases; those with NaN are left out."""
    twin = copy_of(model)
    initializers = {tensor.name: tensor for tensor in twin.graph.initializer}
    for layer in layers:
        shift = shifts[layer.bias] / layer.step
        if not np.isfinite(shift).all():
            continue
        stored = numpy_helper.to_array(initializers[layer.bias])
        moved = stored + shift.reshape(stored.shape)
        if stored.dtype == np.int32:
            moved = np.clip(np.rint(moved), _INT32.min, _INT32.max)
        initializers[layer.bias].CopyFrom(numpy_helper.from_array(moved.astype(stored.dtype), layer.bias))
    return twin
