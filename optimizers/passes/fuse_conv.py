"""Fusions into Conv: what scales or shifts each channel disappears into the weights.

A Conv is linear, ``Conv(x, W, B) = W * x + B``, so with one factor ``s`` and one offset ``t`` per output channel
``s (W * x + B) + t = Conv(x, s W, s B + t)``. Weights are computed in FP64 and rounded once.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule
from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule, normalize_pad_format_conv_rule

from optimizers.passes.rules import Rule, constant, made_by, refused, scalar, tensor_like, weight, weight_name
from server.tensors import Array

_DEFAULT_EPSILON = 1e-5  # of BatchNormalization


class _IntoConv(Rule):
    """What the rules share; each finds its factor and offset per output channel, or the reason why there is none."""

    op_type = "Conv"

    def reason(self, conv: ir.Node) -> str:
        """Return why the weights cannot be folded into, or nothing."""
        for value in conv.inputs[1:]:
            if value is not None and constant(value) is None:
                return f"'{value.name}' of {self.op_type} is not constant"
        return ""

    def channels(self, conv: ir.Node) -> int:
        """Return the number of output channels."""
        shape = _weights(conv).shape
        return int(shape[0] if self.op_type == "Conv" else shape[1] * conv.attributes.get_int("group", 1))

    def fits(self, value: ir.Value, conv: ir.Node) -> str:
        """Return why a value is not one constant, or one for each output channel; nothing when it is."""
        array, axes = constant(value), _weights(conv).ndim
        if array is None:
            return f"'{value.name}' is not constant"
        shape = [1] * (axes - array.ndim) + list(array.shape)
        if len(shape) == axes and array.size in (1, shape[1]) and shape[1] in (1, self.channels(conv)):
            return ""
        return f"'{value.name}' has shape {list(array.shape)}, which is not one element per channel"

    def per_channel(self, value: ir.Value, conv: ir.Node) -> Array:
        """Return what a constant that fits holds for each output channel ``[C]``."""
        return np.broadcast_to(weight(value).reshape(-1), (self.channels(conv),))

    def folded(self, op: Any, conv: ir.Node, scale: Array, shift: Array) -> Any:
        """Return the operator whose output channel ``c`` is ``scale[c]`` times the old one plus ``shift[c]``."""
        bias = (weight(conv.inputs[2]) if len(conv.inputs) > 2 else 0.0) * scale + shift
        return _with_weights(op, conv, self.scaled(_weights(conv), scale, conv), np.broadcast_to(bias, scale.shape))

    def scaled(self, kernel: Array, scale: Array, conv: ir.Node) -> Array:
        """Return the weights with every output channel scaled."""
        if self.op_type == "Conv":
            return kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
        groups = conv.attributes.get_int("group", 1)  # weights of ConvTranspose are [inputs, outputs / groups, ...]
        split = kernel.reshape(groups, -1, *kernel.shape[1:])
        factors = scale.reshape(groups, 1, kernel.shape[1], *[1] * (kernel.ndim - 2))
        return (split * factors).reshape(kernel.shape)


class ConvBatchNormalization(_IntoConv):
    """``BN(Conv(x, W, B)) = Conv(x, s W, s (B - mean) + beta)`` with ``s = gamma / sqrt(var + epsilon)``."""

    def pattern(self, op: Any, x: Any) -> Any:
        """The last operators of what is replaced."""
        convolved = getattr(op, self.op_type)(x, _allow_other_inputs=True, _outputs=["convolved"])
        return op.BatchNormalization(convolved, _allow_other_inputs=True, _outputs=["normalized"])

    def check(self, _context: Any, convolved: ir.Value, normalized: ir.Value, **_: Any) -> MatchResult:
        """All weights and statistics are constant, and the statistics are not those of the batch."""
        norm = made_by(normalized)
        if norm.attributes.get_int("training_mode", 0) or len(norm.outputs) > 1:
            return refused("BatchNormalization in training mode computes its own statistics")
        if any(constant(value) is None for value in norm.inputs[1:]):
            return refused("a statistic of BatchNormalization is not constant")
        reason = self.reason(made_by(convolved))
        return refused(reason) if reason else MatchResult()

    def rewrite(self, op: Any, convolved: ir.Value, normalized: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        norm = made_by(normalized)
        gamma, beta, mean, variance = (weight(value) for value in norm.inputs[1:5])
        scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", _DEFAULT_EPSILON))
        return self.folded(op, made_by(convolved), scale, beta - mean * scale)


class ConvTransposeBatchNormalization(ConvBatchNormalization):
    """``BN(ConvTranspose(x, W, B)) = ConvTranspose(x, s W, s (B - mean) + beta)``."""

    op_type = "ConvTranspose"


class ConvMul(_IntoConv):
    """``s Conv(x, W, B) = Conv(x, s W, s B)`` with one constant factor, or one per output channel."""

    def pattern(self, op: Any, x: Any, factor: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Mul(op.Conv(x, _allow_other_inputs=True, _outputs=["convolved"]), factor)

    def check(self, _context: Any, convolved: ir.Value, factor: ir.Value, **_: Any) -> MatchResult:
        """Weights and factor are constant, and the factor varies along the channels only."""
        conv = made_by(convolved)
        reason = self.reason(conv) or self.fits(factor, conv)
        return refused(reason) if reason else MatchResult()

    def rewrite(self, op: Any, convolved: ir.Value, factor: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        conv = made_by(convolved)
        return self.folded(op, conv, self.per_channel(factor, conv), np.zeros(self.channels(conv)))


class ConvAdd(_IntoConv):
    """``Conv(x, W, B) + t = Conv(x, W, B + t)`` with one constant offset, or one per output channel."""

    def pattern(self, op: Any, x: Any, offset: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Add(op.Conv(x, _allow_other_inputs=True, _outputs=["convolved"]), offset)

    def check(self, _context: Any, convolved: ir.Value, offset: ir.Value, **_: Any) -> MatchResult:
        """Weights and offset are constant, and the offset varies along the channels only."""
        conv = made_by(convolved)
        reason = self.reason(conv) or self.fits(offset, conv)
        return refused(reason) if reason else MatchResult()

    def rewrite(self, op: Any, convolved: ir.Value, offset: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        conv = made_by(convolved)
        return self.folded(op, conv, np.ones(self.channels(conv)), self.per_channel(offset, conv))


class MulConv(_IntoConv):
    """``Conv(s x, W, B) = Conv(x, s W, B)`` with one constant factor for the whole input, such as 1/255."""

    def pattern(self, op: Any, x: Any, factor: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Conv(op.Mul(x, factor), _allow_other_inputs=True, _outputs=["convolved"])

    def check(self, _context: Any, x: ir.Value, convolved: ir.Value, factor: ir.Value, **_: Any) -> MatchResult:
        """The weights are constant, and the factor is one constant; zeros of a padding stay zeros."""
        if reason := self.reason(made_by(convolved)):
            return refused(reason)
        return MatchResult() if scalar(factor, x) is not None else refused("the factor is not one constant")

    def rewrite(self, op: Any, x: ir.Value, convolved: ir.Value, factor: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        conv = made_by(convolved)
        bias = weight(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(self.channels(conv))
        return _with_weights(op, conv, _weights(conv) * scalar(factor), bias, x)


class AddConv(_IntoConv):
    """``Conv(x + t, W, B) = Conv(x, W, B + t sum(W))`` with one constant offset and no padding."""

    def pattern(self, op: Any, x: Any, offset: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Conv(op.Add(x, offset), _allow_other_inputs=True, _outputs=["convolved"])

    def check(self, _context: Any, x: ir.Value, convolved: ir.Value, offset: ir.Value, **_: Any) -> MatchResult:
        """The weights are constant, the offset is one constant, and no border is filled with zeros."""
        conv = made_by(convolved)
        if any(conv.attributes.get_ints("pads", [])) or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            return refused("zeros of the padding would be shifted too")
        if reason := self.reason(conv):
            return refused(reason)
        return MatchResult() if scalar(offset, x) is not None else refused("the offset is not one constant")

    def rewrite(self, op: Any, x: ir.Value, convolved: ir.Value, offset: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        conv = made_by(convolved)
        kernel = _weights(conv)
        old = weight(conv.inputs[2]) if len(conv.inputs) > 2 else 0.0
        shift = kernel.sum(axis=tuple(range(1, kernel.ndim))) * scalar(offset)
        return _with_weights(op, conv, kernel, old + shift, x)


CONV_RULES: dict[str, list[RewriteRule]] = {
    "Conv+BatchNormalization": ConvBatchNormalization.build(),
    "ConvTranspose+BatchNormalization": ConvTransposeBatchNormalization.build(),
    "Conv+Mul": ConvMul.build(commuted=True),
    "Conv+Add": ConvAdd.build(commuted=True),
    "Mul+Conv": MulConv.build(commuted=True),
    "Add+Conv": AddConv.build(commuted=True),
    "Pad+Conv": [normalize_pad_format_conv_rule, fuse_pad_into_conv_rule],
}
"""Name of the fusion -> its rules; ``Pad(x)`` with zeros before a Conv becomes the padding of the Conv."""


def _with_weights(op: Any, conv: ir.Node, kernel: Array, bias: Array, x: ir.Value | None = None) -> Any:
    name = conv.outputs[0].name
    fused = getattr(op, conv.op_type)(
        conv.inputs[0] if x is None else x,
        op.initializer(tensor_like(kernel, conv.inputs[1]), weight_name(conv, f"{name}_weight")),
        op.initializer(tensor_like(bias, conv.inputs[1]), weight_name(conv, f"{name}_bias")),
        **conv.attributes,
    )
    fused.producer().name = conv.name
    return fused


def _weights(conv: ir.Node) -> Array:
    return weight(conv.inputs[1])
