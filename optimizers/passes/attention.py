"""What attention is in a graph: ``softmax(scale q k^T + mask) v``, computed for each head.

Exporters split into heads, scale and mask in many ways; ``layout`` tells which of them do the same.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizers.passes.layout import (
    Axes,
    Part,
    Size,
    Trail,
    axes_of,
    followed,
    names_of,
    product,
    scaled_from,
    sizes_of,
    trail_of,
)
from optimizers.passes.rules import constant, producer, rank, read_once, scalar
from server.tensors import Array

_ABSORBS = -1e30
"""A score added to a number up to here gives that number: to replace a score and to add to it are the same."""


@dataclass(frozen=True, slots=True)
class Mask:
    """What is added to the scores: a tensor, or a number where a condition is (or is not) true, and 0 elsewhere."""

    value: ir.Value
    fill: float | None = None
    fill_where: bool = True


@dataclass(frozen=True, slots=True)
class Linear:
    """``x weight + bias``: x has three axes, weight is [inputs, outputs], bias is [outputs]."""

    x: ir.Value
    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class Operand:
    """One of q, k and v before it is split into heads.

    Attributes:
        value: [batch, length, hidden], or [batch * length, hidden].
        linear: How it is made; ``None`` if it is no product with constant weights.
    """

    value: ir.Value
    linear: Linear | None

    @property
    def shaped(self) -> ir.Value:
        """The value whose first two axes are batch and length; the one that stays when the product is replaced."""
        return self.value if self.linear is None else self.linear.x


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a graph.

    Attributes:
        q: Queries; ``k`` and ``v`` are keys and values.
        heads: How many, at least 2.
        lengths: Number of queries and number of keys.
        scale: Factor of the scores.
        mask: What is added to them.
        guarded: Whether shares that are not a number become 0, as torch has it for rows without any key.
        joined: Whether the result is known to be [batch, length, hidden]; else it has the same elements in that order.
    """

    q: Operand
    k: Operand
    v: Operand
    heads: int
    lengths: tuple[Size, Size]
    scale: float
    mask: Mask | None
    guarded: bool
    joined: bool


class NotAttention(Exception):
    """A value is not made by an attention that onnxruntime's kernels compute; the message says why."""


def attention_of(root: ir.Value) -> Attention:
    """Return the attention that makes a value, whose last operator joins the heads.

    Raises:
        NotAttention: If there is none, or if a value in between has another reader.
    """
    joined = trail_of(root)
    context = producer(joined.source, "MatMul")
    shares, guarded = _shares(None if context is None else context.inputs[0])
    if context is None or shares is None:
        raise NotAttention("nothing is multiplied by a softmax over the last axis")
    scores, scale, mask, scored = _scores(_given(shares.inputs[0]))
    trails = [trail_of(_given(value)) for value in (*scores.inputs, context.inputs[1])]
    if joined.factor != 1.0 or trails[2].factor != 1.0:
        raise NotAttention("the values are scaled")
    operands = [_operand(trail.source) for trail in trails]
    q, k, v = (_split(operand, trail) for operand, trail in zip(operands, trails, strict=True))
    batch, heads, length, head = map(product, q)
    keys, depth = product(k[3]), product(v[3])
    expected = [(length, head), (head, keys), (keys, depth)]
    if [q, k, v] != [_laid_out(batch, heads, *last, swapped=last is expected[1]) for last in expected]:
        raise NotAttention("q, k and v are not laid out as batch, heads, length and head size")
    if heads.names or depth.names:
        raise NotAttention("the number or the size of the heads is not known")
    _require_fitting(mask, batch, heads)
    between = [*joined.between[1:], joined.source, *scored, *(value for trail in trails for value in trail.between)]
    for value in between if guarded else [*between, shares.outputs[0]]:
        _require_one_reader(value)
    return Attention(
        q=operands[0],
        k=operands[1],
        v=operands[2],
        heads=heads.number,
        lengths=(length, keys),
        scale=scale * trails[0].factor * trails[1].factor,
        mask=mask,
        guarded=guarded,
        joined=_is_joined(_laid_out(batch, heads, length, depth), joined),
    )


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise NotAttention("an operand is missing")
    return value


def _shares(value: ir.Value | None) -> tuple[ir.Node | None, bool]:
    """Return the softmax, and whether its result is guarded: ``Where(IsNaN(p), 0, p)``."""
    guard = producer(value, "Where")
    if guard is not None and scalar(guard.inputs[1]) == 0.0:
        test = producer(guard.inputs[0], "IsNaN")
        value = guard.inputs[2] if test is not None and test.inputs[0] is guard.inputs[2] else None
        if value is None or value.is_graph_output() or {usage.node for usage in value.uses()} != {guard, test}:
            return None, False
    node = producer(value, "Softmax")
    if node is None or node.attributes.get_int("axis", -1) not in (-1, 3) or rank(node.outputs[0]) != 4:
        return None, False
    return node, guard is not None


def _scores(value: ir.Value) -> tuple[ir.Node, float, Mask | None, list[ir.Value]]:
    """Return the product of q and k, its factor, the mask, and the values in between."""
    masked, replaced = producer(value, "Add"), producer(value, "Where")
    mask, inner = None, value
    if masked is not None:
        a, b = (_given(operand) for operand in masked.inputs)
        inner, mask = (a, Mask(b)) if _product(a) else (b, Mask(a))
    elif replaced is not None:
        condition, a, b = (_given(operand) for operand in replaced.inputs)
        fill_where = scalar(a) is not None
        inner, fill = (b, scalar(a)) if fill_where else (a, scalar(b))
        if fill is None or fill > _ABSORBS:
            raise NotAttention(f"scores are replaced by {fill}, which is no more than {_ABSORBS:g}, nor added to it")
        mask = Mask(_unexpanded(condition, inner), fill, fill_where)
    found = _product(inner)
    if found is None:
        raise NotAttention("the softmax is not taken of a scaled product and a mask")
    node, factor, between = found
    return node, factor, mask, [value, *between] if mask else between


def _product(value: ir.Value) -> tuple[ir.Node, float, list[ir.Value]] | None:
    factor, between = 1.0, [value]
    while (scaled := scaled_from(value)) is not None:
        value, factor = scaled[0], factor * scaled[1]
        between.append(value)
    node = producer(value, "MatMul")
    return None if node is None else (node, factor, between)


def _unexpanded(condition: ir.Value, scores: ir.Value) -> ir.Value:
    """Return what was expanded to the shape of the scores, which adding to them does as well."""
    expand = producer(condition, "Expand")
    shape = producer(expand.inputs[1], "Shape") if expand is not None else None
    if expand is None or shape is None or shape.inputs[0] is not scores or expand.inputs[0] is None:
        return condition
    return expand.inputs[0]


def _operand(value: ir.Value) -> Operand:
    if value.dtype != ir.DataType.FLOAT:
        raise NotAttention(f"'{value.name}' is {value.dtype}, not FLOAT")
    return Operand(value, _linear(value))


def _linear(value: ir.Value) -> Linear | None:
    """Return the product with constant weights, with or without a bias, that makes a value."""
    added, gemm = producer(value, "Add"), producer(value, "Gemm")
    if gemm is not None:
        bias = constant(gemm.inputs[2]) if len(gemm.inputs) > 2 else np.zeros(1, np.float32)
        settings = gemm.attributes
        plain = settings.get_float("alpha", 1.0) == settings.get_float("beta", 1.0) == 1.0
        flipped = bool(settings.get_int("transB", 0))
        return _with_constants(gemm, bias, flipped) if plain and not settings.get_int("transA", 0) else None
    if added is None:
        alone = producer(value, "MatMul")
        return None if alone is None else _with_constants(alone, np.zeros(1, np.float32))
    for total, offset in (added.inputs[:2], added.inputs[1::-1]):
        found = producer(total, "MatMul")
        if found is not None and read_once(found.outputs[0]):
            return _with_constants(found, constant(offset))
    return None


def _with_constants(node: ir.Node, bias: Array | None, flipped: bool = False) -> Linear | None:
    weight, x = constant(node.inputs[1]), node.inputs[0]
    flattened = producer(x, "Reshape") if x is not None and rank(x) == 2 else None
    x = x if flattened is None else flattened.inputs[0]
    if weight is None or weight.ndim != 2 or bias is None or bias.ndim > 1 or x is None or rank(x) != 3:
        return None
    matrix = weight.T if flipped else weight
    if bias.size not in (1, matrix.shape[1]) or _columns(x) != Size(matrix.shape[0]):
        return None
    return Linear(x, matrix, np.broadcast_to(bias, matrix.shape[1:]))


def _columns(x: ir.Value) -> Size | None:
    sizes = sizes_of(x)
    return sizes[-1] if sizes else None


def _split(operand: Operand, trail: Trail) -> Axes:
    """Return what the four axes of q, k or v consist of."""
    lead = sizes_of(operand.shaped)
    own = sizes_of(operand.value)
    if lead is None or own is None or len(lead) != 3 or len(own) not in (2, 3):
        raise NotAttention(f"'{operand.value.name}' has not the axes batch, length and hidden size")
    batch, length, hidden = lead[0], lead[1], own[-1]
    if batch is None or length is None or hidden is None:
        raise NotAttention(f"the shape of '{operand.value.name}' is not known")
    first, second = Part("batch", batch), Part("length", length)
    last = [Part("hidden", hidden)]
    axes = followed(axes_of([first], [second], last) if len(own) == 3 else axes_of([first, second], last), trail.steps)
    if axes is None or len(axes) != 4:
        raise NotAttention(f"how '{operand.value.name}' is split into heads is not known")
    return axes


def _laid_out(batch: Size, heads: Size, third: Size, fourth: Size, *, swapped: bool = False) -> Axes:
    length, head = (fourth, third) if swapped else (third, fourth)
    last = [[Part("length", length)], [Part("head", head)]]
    return axes_of([Part("batch", batch)], [Part("heads", heads)], *(last[::-1] if swapped else last))


def _is_joined(axes: Axes, joined: Trail) -> bool:
    """Whether the heads are known to be joined to [batch, length, hidden]; refuse another order of the elements."""
    batch, heads, length, head = axes
    known = names_of(joined.source, [product(parts) for parts in axes])
    before = followed(axes, joined.steps[:-1], known)
    if before is None or rank(joined.steps[-1]) not in (2, 3) or sum(before, ()) != batch + length + heads + head:
        raise NotAttention("the heads are not joined to batch, length and hidden size")
    return followed(before, joined.steps[-1:], known) == (batch, length, heads + head)


def _require_fitting(mask: Mask | None, batch: Size, heads: Size) -> None:
    """Refuse a mask that would make the result larger; where a size is not known, the kernel checks it at run time."""
    sizes = None if mask is None else sizes_of(mask.value)
    if mask is None:
        return
    if sizes is None or len(sizes) > 4:
        raise NotAttention(f"the mask '{mask.value.name}' has an unknown number of axes, or more than 4")
    if mask.fill is None and mask.value.dtype != ir.DataType.FLOAT:
        raise NotAttention(f"the mask '{mask.value.name}' is {mask.value.dtype}, not FLOAT")
    for size, own, what in zip(sizes[-4:-2][::-1], (heads, batch), ("heads", "batch"), strict=False):
        if size is not None and not size.names and not own.names and size.number not in (1, own.number):
            raise NotAttention(f"the mask '{mask.value.name}' has {what} {size.number}, the scores have {own.number}")


def _require_one_reader(value: ir.Value) -> None:
    if not read_once(value):
        raise NotAttention(f"'{value.name}' has another reader")
