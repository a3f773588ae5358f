"""Fusion of a spelled-out layer normalization into ``LayerNormalization``."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from optimizers.passes.rules import Rule, axis_size, constant, made_by, private, producer, rank, refused, scalar


class LayerNormalization(Rule):
    """``(x - m) / sqrt(mean((x - m)^2) + epsilon) * scale = LayerNormalization(x, scale)`` with ``m = mean(x)``.

    The means are taken over the last axis. Squares may be ``Mul`` or ``Pow``, the division ``Div`` or a product with
    ``Reciprocal``, and ``x - m`` may be computed once or twice.
    """

    def pattern(self, op: Any, normalized: Any, scale: Any) -> Any:
        """The last operator of what is replaced."""
        return op.Mul(normalized, scale, _outputs=["root"])

    def check(self, _context: Any, normalized: ir.Value, scale: ir.Value, **_: Any) -> MatchResult:
        """The values above are those of the formula, nobody else reads them, and the scale fits the last axis."""
        found = _formula(normalized)
        if isinstance(found, str):
            return refused(found)
        x = found[0]
        if x.dtype != ir.DataType.FLOAT:
            return refused(f"'{x.name}' is {x.dtype}; other types would be rounded elsewhere")
        return _fits_last_axis(scale, x, "scale")

    def rewrite(self, op: Any, normalized: ir.Value, scale: ir.Value, root: ir.Value) -> Any:
        """Make the one operator."""
        found = _formula(normalized)
        if isinstance(found, str):
            return None
        x, epsilon = found
        fused = op.LayerNormalization(x, scale, axis=-1, epsilon=epsilon)
        fused.producer().name = made_by(root).name
        return fused


class LayerNormalizationAdd(Rule):
    """``LayerNormalization(x, scale) + bias = LayerNormalization(x, scale, bias)``."""

    def pattern(self, op: Any, x: Any, scale: Any, bias: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Add(op.LayerNormalization(x, scale, _outputs=["scaled"]), bias)

    def check(self, _context: Any, x: ir.Value, scaled: ir.Value, bias: ir.Value, **_: Any) -> MatchResult:
        """The normalization is over the last axis, and the bias fits it."""
        axis = made_by(scaled).attributes.get_int("axis", -1)
        if axis not in (-1, (rank(x) or 0) - 1):
            return refused(f"the normalization starts at axis {axis}, which is not the last one")
        return _fits_last_axis(bias, x, "bias")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, scaled: ir.Value, bias: ir.Value) -> Any:
        """Make the one operator."""
        old = made_by(scaled)
        fused = op.LayerNormalization(x, scale, bias, **old.attributes)
        fused.producer().name = old.name
        return fused


NORMALIZATION_RULES: dict[str, list[RewriteRule]] = {
    "LayerNormalization": LayerNormalization.build(commuted=True),
    "LayerNormalization+Add": LayerNormalizationAdd.build(commuted=True),
}
"""Name of the fusion -> its rules; their result exists from opset 17 on."""


def _formula(normalized: ir.Value) -> tuple[ir.Value, float] | str:
    """Return ``x`` and epsilon, or why the value is no normalized ``x``."""
    parts = _quotient(normalized)
    if parts is None:
        return "nothing is divided by a square root"
    deviation, variance_and_epsilon = parts
    summed = producer(variance_and_epsilon, "Add")
    if summed is None:
        return "no epsilon is added to the variance"
    mean_square, epsilon = _with_scalar(summed)
    if mean_square is None:
        return "epsilon is not constant"
    reduced = _last_axis_mean(mean_square)
    square = None if reduced is None else _squared(reduced)
    if square is None:
        return "the variance is not the mean of squares over the last axis"
    x, other = _centred(deviation), _centred(square)
    if x is None or other is not x:
        return "what is divided and what is squared are not x minus its mean over the last axis"
    inner = (normalized, variance_and_epsilon, mean_square, reduced)
    if not all(value is not None and private(value) for value in inner) or not _only_here(deviation, square):
        return "a value in between has another reader"
    return x, epsilon


def _quotient(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return ``a`` and ``b`` of ``a / sqrt(b)``."""
    divided = producer(value, "Div")
    if divided is not None:
        return _beside_root(divided.inputs[0], producer(divided.inputs[1], "Sqrt"))
    for a, factor in _both_ways(producer(value, "Mul")):
        inverse = producer(factor, "Reciprocal")
        if inverse is not None and private(factor):
            return _beside_root(a, producer(inverse.inputs[0], "Sqrt"))
    return None


def _beside_root(a: ir.Value | None, root: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    if a is None or root is None or root.inputs[0] is None or not private(root.outputs[0]):
        return None
    return a, root.inputs[0]


def _both_ways(node: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    if node is None:
        return []
    left, right = node.inputs[0], node.inputs[1]
    return [] if left is None or right is None else [(left, right), (right, left)]


def _with_scalar(node: ir.Node) -> tuple[ir.Value | None, float]:
    for value, number in _both_ways(node):
        if (epsilon := scalar(number)) is not None:
            return value, epsilon
    return None, 0.0


def _last_axis_mean(value: ir.Value | None) -> ir.Value | None:
    """Return ``x`` if the value is its mean over the last axis, which is kept."""
    node = producer(value, "ReduceMean")
    if node is None or not node.attributes.get_int("keepdims", 1):
        return None
    x = node.inputs[0]
    if x is None:
        return None
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes.get_ints("axes", []))
    axes = [] if given is None else given.reshape(-1).tolist()
    last = -1 if x.shape is None else x.shape.rank() - 1
    return x if axes in ([-1], [last]) else None


def _squared(value: ir.Value) -> ir.Value | None:
    power, product = producer(value, "Pow"), producer(value, "Mul")
    if power is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == 2.0 else None
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _centred(value: ir.Value) -> ir.Value | None:
    """Return ``x`` if the value is ``x`` minus its mean."""
    node = producer(value, "Sub")
    if node is None:
        return None
    x = node.inputs[0]
    return x if x is not None and _last_axis_mean(node.inputs[1]) is x else None


def _only_here(deviation: ir.Value, square: ir.Value) -> bool:
    """Whether the deviations are read by the quotient and by the square, which may read it twice, and nowhere else."""
    readers = {id(usage.node) for value in (deviation, square) for usage in value.uses()}
    return len(readers) == 2 and not deviation.is_graph_output() and not square.is_graph_output()


def _fits_last_axis(value: ir.Value, x: ir.Value, role: str) -> MatchResult:
    size = axis_size(x, -1)
    shape = None if value.shape is None else list(value.shape)
    if size is None or shape != [size]:
        return refused(f"the {role} has shape {shape}, the last axis of '{x.name}' has size {size}")
    return MatchResult()
