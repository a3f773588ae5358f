"""Cross-layer equalization: neighbouring layers share out the ranges of the channels between them."""

from typing import ClassVar

import msgspec
import numpy as np
import onnx

from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.channels import Constants, Scaling, Wiring, attribute_of, homogeneous, standard
from server.tensors import Array

_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_PASSED = _POOLS | {"Clip", "Flatten"}
_UNBOUNDED = float(np.finfo(np.float32).max)
_MATRIX_OPS = frozenset({"Gemm", "MatMul"})
_CONVERGED = 1e-3  # of log s: scales this near to 1 change no quantization step that matters
_LEAST_SHARE = 1e-6  # a channel below this share of the largest one is as good as absent


class Equalize(msgspec.Struct, frozen=True):
    """Equalize the ranges of each channel in the weights that make it and in those that read it.

    For two layers with nothing between them but positively homogeneous operators, f(s x) = s f(x), as in Conv -> Relu
    -> Conv, output channel i of the first is divided by s_i, and input channel i of the second multiplied by it::

        s_i = sqrt(r1_i r2_i) / r2_i        W1_i <- W1_i / s_i,  b1_i <- b1_i / s_i,  W2_i <- s_i W2_i

    r1_i and r2_i are the largest magnitudes of channel i in W1 and W2; both are sqrt(r1_i r2_i) afterwards. Layers are
    Conv, with groups too, and Gemm and MatMul (with an Add of a constant); between two Conv there may be pooling, and
    Flatten between Conv and Gemm. Since a layer may be in two pairs, all pairs are visited again until nothing
    changes. Clip to an upper bound, as in ReLU6, is not homogeneous and ends a chain.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721,
    section 4.1.

    Attributes:
        rounds: Most visits to all pairs, at least 1.
    """

    rounds: int = 3

    spec: ClassVar[PassSpec] = PassSpec("equalize", 1, "tolerance")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If ``rounds`` is below 1.
        """
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 1, 3 is usual")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass; it needs no data."""
        after = copy_of(model)
        chains = _Chains(after)
        pairs = chains.pairs()
        counts = {"pairs": len(pairs), "clipped": chains.clipped, "shared": chains.shared}
        stopped = f"{chains.clipped} stopped by a Clip, {chains.shared} by another reader"
        if not pairs:
            return PassResult(model, changed=False, counts=counts, note=f"no two layers to equalize; {stopped}")
        before = max(pair.spread(chains.constants) for pair in pairs)
        moved = False
        for _ in range(self.rounds):
            largest = max(pair.equalize(chains.constants) for pair in pairs)
            moved = moved or largest > _CONVERGED
            if largest <= _CONVERGED:
                break
        if not moved:
            return PassResult(model, changed=False, counts=counts, note=f"channels are equal already; {stopped}")
        now = max(pair.spread(chains.constants) for pair in pairs)
        note = f"widest channel over narrowest {before:.3g} -> {now:.3g} in {len(pairs)} pairs; {stopped}"
        return PassResult(after, changed=True, counts=counts, note=note)


class _Pair(msgspec.Struct, frozen=True):
    """Two layers, and the constants that are added to what the first one makes."""

    first: onnx.NodeProto
    biases: list[tuple[onnx.NodeProto, int]]
    second: onnx.NodeProto

    def equalize(self, constants: Constants) -> float:
        """Rescale both layers once, and return the largest change, as ``|log s|``."""
        first, second = constants.require(self.first, 1), constants.require(self.second, 1)
        r1 = _output_ranges(self.first, first)
        r2 = _input_ranges(self.second, second, len(r1))
        live = (r1 > _LEAST_SHARE * r1.max()) & (r2 > _LEAST_SHARE * r2.max())
        s = np.ones(len(r1))
        s[live] = np.sqrt(r1[live] / r2[live])
        constants.scale(Scaling(self.first, 1, _along(1 / s, _output_axis(self.first), first.ndim)))
        for node, index in self.biases:
            axes = first.ndim - 1 if node.op_type == "Add" else 1  # an Add spans the axes behind the channels too
            constants.scale(Scaling(node, index, _along(1 / s, 0, axes)))
        constants.scale(Scaling(self.second, 1, _input_factor(self.second, second.shape, s)))
        return float(np.abs(np.log(s)).max())

    def spread(self, constants: Constants) -> float:
        """Return the range of the widest channel over that of the narrowest, of the layer where it is larger."""
        r1 = _output_ranges(self.first, constants.require(self.first, 1))
        r2 = _input_ranges(self.second, constants.require(self.second, 1), len(r1))
        live = (r1 > _LEAST_SHARE * r1.max()) & (r2 > _LEAST_SHARE * r2.max())
        return max((float(r[live].max() / r[live].min()) for r in (r1, r2) if live.any()), default=1.0)


class _Chains:
    """Finds the pairs of a model, and counts those that something between them prevents."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._wiring = Wiring(model)
        self.constants = Constants(model, self._wiring)
        self.clipped = 0
        self.shared = 0
        self._nodes = model.graph.node

    def pairs(self) -> list[_Pair]:
        """Return the pairs in graph order."""
        layers = [node for node in self._nodes if self._is_layer(node) and not attribute_of(node, "transA", 0)]
        return [pair for pair in map(self._pair, layers) if pair is not None]

    def _pair(self, second: onnx.NodeProto) -> _Pair | None:
        first, passed = self._walk(second)
        biases = None if first is None else self._biases(first, passed)
        if first is None or biases is None or not _fit(first, passed, second) or not self._matches(first, second):
            return None
        between = [first.output[0], *(node.output[0] for node in passed)]
        weights = [first.input[1], second.input[1]]
        if any(node.op_type == "Clip" and not self._is_relu(node) for node in passed):
            self.clipped += 1
        elif not all(map(self._wiring.private, [*between, *weights])):
            self.shared += 1
        else:
            return _Pair(first, biases, second)
        return None

    def _walk(self, second: onnx.NodeProto) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
        """Return the layer above, if only operators are between that a pair may have, and these operators."""
        passed: list[onnx.NodeProto] = []
        tensor = second.input[0]
        while (node := self._wiring.makers.get(tensor)) is not None and not self._is_layer(node):
            added = self._added(node)
            if added is None and not homogeneous(node) and not (standard(node) and node.op_type in _PASSED):
                return None, passed
            passed.append(node)
            tensor = node.input[0 if added is None else 1 - added]
        return node, passed

    def _matches(self, first: onnx.NodeProto, second: onnx.NodeProto) -> bool:
        """Whether the second layer reads as many channels as the first makes; an Add may have broadcast one to many."""
        channels = self.constants.require(first, 1).shape[_output_axis(first)]
        weight = self.constants.require(second, 1)
        if second.op_type == "Conv":
            return bool(weight.shape[1] * attribute_of(second, "group", 1) == channels)
        features = weight.shape[1 - _output_axis(second)]
        return bool(features % channels == 0 if first.op_type == "Conv" else features == channels)

    def _biases(self, first: onnx.NodeProto, passed: list[onnx.NodeProto]) -> list[tuple[onnx.NodeProto, int]] | None:
        """Return the constants added to the output of a layer, or ``None`` where its bias is no constant."""
        biases = [(node, index) for node in passed if (index := self._added(node)) is not None]
        if len(first.input) < 3 or not first.input[2]:
            return biases
        return None if self.constants.of(first, 2) is None else [(first, 2), *biases]

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        if not standard(node) or node.op_type not in _MATRIX_OPS | {"Conv"}:
            return False
        weight = self.constants.of(node, 1)
        return weight is not None and weight.size > 0 and (node.op_type == "Conv" or weight.ndim == 2)

    def _added(self, node: onnx.NodeProto) -> int | None:
        """Return the index of the only constant of an Add; ``None`` for other nodes."""
        if not standard(node) or node.op_type != "Add":
            return None
        found = [index for index in (0, 1) if self.constants.of(node, index) is not None]
        return found[0] if len(found) == 1 else None

    def _is_relu(self, clip: onnx.NodeProto) -> bool:
        """Whether a Clip has the lower bound 0 and no upper one."""
        if len(clip.input) == 1:  # bounds are attributes before opset 11
            bounds = {attribute.name: attribute.f for attribute in clip.attribute}
            return bounds.get("min") == 0 and bounds.get("max", _UNBOUNDED) >= _UNBOUNDED
        low = self.constants.of(clip, 1)
        high = self.constants.of(clip, 2)
        unbounded = len(clip.input) < 3 or not clip.input[2] or (high is not None and high.min() >= _UNBOUNDED)
        return low is not None and low.max() == 0 == low.min() and unbounded


def _fit(first: onnx.NodeProto, passed: list[onnx.NodeProto], second: onnx.NodeProto) -> bool:
    """Whether channels of the first layer are channels of the second: the axis is 1 for Conv, the last for others."""
    op_types = [node.op_type for node in passed]
    flat = [node for node in passed if node.op_type == "Flatten"]
    if second.op_type == "Conv":
        return first.op_type == "Conv" and not flat
    if first.op_type == "Conv":
        return len(flat) == 1 and attribute_of(flat[0], "axis", 1) == 1 and "Add" not in op_types
    return not flat and not _POOLS & set(op_types)


def _output_axis(layer: onnx.NodeProto) -> int:
    return 0 if layer.op_type == "Conv" or attribute_of(layer, "transB", 0) else 1


def _output_ranges(layer: onnx.NodeProto, weight: Array) -> Array:
    """Return the largest magnitude per output channel, float64."""
    rows = np.moveaxis(weight, _output_axis(layer), 0)
    ranges: Array = np.abs(rows.reshape(len(rows), -1)).max(axis=1).astype(np.float64)
    return ranges


def _input_ranges(layer: onnx.NodeProto, weight: Array, channels: int) -> Array:
    """Return the largest magnitude per input channel, float64; Flatten makes several rows of one channel."""
    if layer.op_type == "Conv":
        groups = attribute_of(layer, "group", 1)
        split = np.abs(weight).reshape(groups, len(weight) // groups, channels // groups, -1).max(axis=(1, 3))
    else:
        split = np.abs(weight).max(axis=_output_axis(layer)).reshape(channels, -1).max(axis=1)
    ranges: Array = split.reshape(channels).astype(np.float64)
    return ranges


def _input_factor(layer: onnx.NodeProto, shape: tuple[int, ...], s: Array) -> Array:
    """Return s in a shape that multiplies the input channels of a weight."""
    if layer.op_type != "Conv":
        axis = 1 - _output_axis(layer)
        return _along(np.repeat(s, shape[axis] // len(s)), axis, 2)
    groups = attribute_of(layer, "group", 1)
    per_output = np.repeat(s.reshape(groups, -1), shape[0] // groups, axis=0)
    return per_output.reshape(*per_output.shape, *(1,) * (len(shape) - 2))


def _along(s: Array, axis: int, axes: int) -> Array:
    return s.reshape([len(s) if index == axis else 1 for index in range(axes)])
