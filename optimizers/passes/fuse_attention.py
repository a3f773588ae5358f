"""Fusion of spelled-out attention into onnxruntime's own operators, for files that onnxruntime alone will run.

Both kernels add ``attention_bias`` to the scaled scores, as the formula does, so any mask keeps its meaning. They take
[batch or 1, heads or 1, queries, keys]: the last two axes are expanded where they are not known to be so already.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from optimizers.passes.attention import Attention, Mask, NotAttention, attention_of
from optimizers.passes.layout import sizes_of
from optimizers.passes.rules import Rule, made_by, rank, read_once, refused, weight_name

_DOMAIN = "com.microsoft"


class _AttentionRule(Rule):
    """What both rules share: they start at the Reshape that joins the heads."""

    def pattern(self, op: Any, turned: Any, target: Any) -> Any:
        """The last operator of what is replaced."""
        return op.Reshape(turned, target, _outputs=["root"])

    def check(self, _context: Any, root: ir.Value, **_: Any) -> MatchResult:
        """The values above are those of the formula, and nobody else reads them."""
        try:
            reason = self.reason(attention_of(root))
        except NotAttention as refusal:
            reason = str(refusal)
        return refused(reason) if reason else MatchResult()

    def rewrite(self, op: Any, target: ir.Value, root: ir.Value, **_: Any) -> Any:
        """Make the one operator, and what brings mask and result into shape."""
        found = attention_of(root)
        fused = self.fused(op, found, None if found.mask is None else _bias(op, found, found.mask))
        fused.producer().name = made_by(root).name
        if found.guarded:  # a row of shares that are not numbers gives a row of the result that has none either
            fused = op.Where(op.IsNaN(fused), op.Constant(value_float=0.0), fused)
        return fused if found.joined else op.Reshape(fused, target, **made_by(root).attributes)

    def reason(self, found: Attention) -> str:
        """Return why the operator cannot take this attention, or nothing."""
        raise NotImplementedError

    def fused(self, op: Any, found: Attention, bias: Any) -> Any:
        """Return the new operator."""
        raise NotImplementedError


class SelfAttention(_AttentionRule):
    """``softmax(scale q k^T + mask) v = Attention(x, [Wq Wk Wv], [bq bk bv], mask)`` with ``q = x Wq + bq``, etc."""

    def reason(self, found: Attention) -> str:
        """Return why the operator cannot take this attention, or nothing."""
        linears = [operand.linear for operand in (found.q, found.k, found.v)]
        inputs = {id(linear.x) for linear in linears if linear is not None}
        if None in linears:
            return "q, k and v are not all products with constant weights"
        if len(inputs) > 1:
            return "q, k and v are made of different inputs"
        shared = [o.value.name for o in (found.q, found.k, found.v) if not read_once(o.value)]
        return f"'{shared[0]}' has another reader" if shared else ""

    def fused(self, op: Any, found: Attention, bias: Any) -> Any:
        """Return the new operator."""
        linears = [operand.linear for operand in (found.q, found.k, found.v) if operand.linear is not None]
        node, name = made_by(found.q.value), found.q.value.name
        weight = np.concatenate([linear.weight for linear in linears], axis=1)
        offset = np.concatenate([linear.bias for linear in linears])
        return op.Attention(
            linears[0].x,
            op.initializer(ir.tensor(weight), name=weight_name(node, f"{name}_qkv_weight")),
            op.initializer(ir.tensor(offset), name=weight_name(node, f"{name}_qkv_bias")),
            None,
            None,
            bias,
            num_heads=found.heads,
            scale=found.scale,
            qkv_hidden_sizes=[linear.bias.size for linear in linears],
            _domain=_DOMAIN,
        )


class MultiHeadAttention(_AttentionRule):
    """``softmax(scale q k^T + mask) v = MultiHeadAttention(q, k, v, mask)`` for any q, k and v with three axes."""

    def reason(self, found: Attention) -> str:
        """Return why the operator cannot take this attention, or nothing."""
        others = [operand.value.name for operand in (found.q, found.k, found.v) if rank(operand.value) != 3]
        return f"'{others[0]}' has not three axes" if others else ""

    def fused(self, op: Any, found: Attention, bias: Any) -> Any:
        """Return the new operator."""
        q, k, v = found.q.value, found.k.value, found.v.value
        return op.MultiHeadAttention(
            q, k, v, None, None, bias, num_heads=found.heads, scale=found.scale, _domain=_DOMAIN
        )


ATTENTION_RULES: dict[str, list[RewriteRule]] = {
    "Attention": SelfAttention.build(),
    "MultiHeadAttention": MultiHeadAttention.build(),
}
"""Name of the fusion -> its rules; what they make exists in onnxruntime only. For opset 13 and later."""


def _bias(op: Any, found: Attention, mask: Mask) -> Any:
    """Return the mask as [batch or 1, heads or 1, queries, keys]."""
    value: Any = mask.value
    if mask.fill is not None:
        fill, zero = op.Constant(value_float=mask.fill), op.Constant(value_float=0.0)
        value = op.Where(value, fill, zero) if mask.fill_where else op.Where(value, zero, fill)
    sizes = sizes_of(mask.value) or []
    if len(sizes) == 4 and tuple(sizes[2:]) == found.lengths:
        return value
    if sizes and found.lengths == (sizes[-1], sizes[-1]):
        lengths = [_length(op, mask.value, len(sizes) - 1)] * 2  # the same in every layer, so it is computed once
    else:
        lengths = [_length(op, found.q.shaped, 1), _length(op, found.k.shaped, 1)]
    return op.Expand(value, op.Concat(op.Constant(value_ints=[1, 1]), *lengths, axis=0))


def _length(op: Any, value: ir.Value, axis: int) -> Any:
    """Return the size of an axis as a tensor with one element."""
    return op.Slice(op.Shape(value), op.Constant(value_ints=[axis]), op.Constant(value_ints=[axis + 1]))
