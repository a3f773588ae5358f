"""Fusion of the embeddings of an encoder into onnxruntime's own operator, for files that onnxruntime alone will run."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from optimizers.passes.layout import names_of, sizes_of, unify_sizes
from optimizers.passes.rules import Rule, axis_size, constant, made_by, private, producer, rank, refused, weight_name
from server.tensors import Array

_MOST_TERMS = 3


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Rows of a table [rows, hidden].

    Attributes:
        value: What is added up.
        table: A constant.
        indices: Which rows; ``None`` for all of them, or for those that ``part`` takes.
        part: A Slice of the rows.
    """

    value: ir.Value
    table: Array
    indices: ir.Value | None = None
    part: ir.Node | None = None


class EmbedLayerNormalization(Rule):
    """``LayerNormalization(T1[i] + T2[j] + T3[k]) = EmbedLayerNormalization(i, k, T1, T2, T3, j)``; ``T3`` is optional.

    ``i`` are indices that the caller gives, [batch, length]. The others may be any indices of that shape or fewer
    rows: computed, constant, or the first rows of a table. The operator takes INT32 only, so INT64 indices are cast.
    """

    def pattern(self, op: Any, total: Any, gamma: Any, beta: Any) -> Any:
        """The last operator of what is replaced."""
        return op.LayerNormalization(total, gamma, beta, _outputs=["root"])

    def check(self, _context: Any, total: ir.Value, gamma: ir.Value, root: ir.Value, **_: Any) -> MatchResult:
        """The value is the sum of two or three lookups, one by indices of the caller, normalized over the last axis."""
        node = made_by(root)
        if node.attributes.get_int("axis", -1) not in (-1, 2):
            return refused("the normalization is not over the last of three axes")
        found = _lookups(total)
        if isinstance(found, str):
            return refused(found)
        widths = {lookup.table.shape[1] for lookup in found} | {axis_size(gamma, -1)}
        return MatchResult() if len(widths) == 1 else refused(f"tables and scale have {widths} columns")

    def rewrite(self, op: Any, total: ir.Value, gamma: ir.Value, beta: ir.Value, root: ir.Value) -> Any:
        """Make the one operator, and indices of the shape and type that it takes."""
        found = _lookups(total)
        if isinstance(found, str):
            return None
        words, node = found[0], made_by(root)
        tables = [
            op.initializer(ir.tensor(np.ascontiguousarray(lookup.table)), name=weight_name(node, f"{root.name}_{role}"))
            for lookup, role in zip(found, ("words", "positions", "segments"), strict=False)
        ]
        shape = op.Shape(words.indices)
        rows = [_int32(op, words.indices), *(op.Expand(_rows(op, lookup), shape) for lookup in found[1:])]
        fused = op.EmbedLayerNormalization(
            rows[0],
            rows[2] if len(found) == _MOST_TERMS else None,
            tables[0],
            tables[1],
            tables[2] if len(found) == _MOST_TERMS else None,
            gamma,
            beta,
            None,
            rows[1],
            epsilon=node.attributes.get_float("epsilon", 1e-5),
            mask_index_type=0,
            _domain="com.microsoft",
        )
        fused.producer().name = node.name
        _tell_sizes(root, words)
        return fused


class ShapeOfLookup(Rule):
    """``Shape(T[i]) = [Shape(i), columns of T]``, so that nobody looks up rows to learn how many there are."""

    def pattern(self, op: Any, found: Any) -> Any:
        """The last operator of what is replaced."""
        return op.Shape(found, _outputs=["shape"])

    def check(self, _context: Any, found: ir.Value, shape: ir.Value, **_: Any) -> MatchResult:
        """Rows of a constant table are looked up, and the whole shape is asked for."""
        lookup, asked = producer(found, "Gather"), made_by(shape).attributes
        table = None if lookup is None else constant(lookup.inputs[0])
        if lookup is None or table is None or table.ndim != 2 or lookup.attributes.get_int("axis", 0) != 0:
            return refused("it is no lookup of rows in a constant table")
        if asked.get_int("start", 0) != 0 or "end" in asked:
            return refused("a part of the shape is asked for")
        return MatchResult()

    def rewrite(self, op: Any, found: ir.Value, **_: Any) -> Any:
        """Make the shape of the result."""
        table, indices = made_by(found).inputs[:2]
        columns = None if table is None else axis_size(table, -1)
        return op.Concat(op.Shape(indices), op.Constant(value_ints=[columns]), axis=0)


EMBEDDING_RULES: dict[str, list[RewriteRule]] = {
    "Shape(Gather)": ShapeOfLookup.build(),
    "EmbedLayerNormalization": EmbedLayerNormalization.build(),
}
"""Name of the fusion -> its rules; what they make exists in onnxruntime only. For opset 17 and later."""


def _lookups(total: ir.Value) -> list[_Lookup] | str:
    """Return what is added up, the one by the caller's indices first, or why it is no sum of two or three lookups."""
    if not private(total) or total.dtype != ir.DataType.FLOAT:
        return "the sum is not FLOAT, or has another reader"
    terms = _terms(total)
    found = [lookup for lookup in map(_lookup, terms) if lookup is not None]
    if not 1 < len(terms) <= _MOST_TERMS or len(found) < len(terms):
        return f"{len(found)} of {len(terms)} terms of the sum are rows of a constant table; 2 or 3 are needed"
    given = [lookup for lookup in found if lookup.indices is not None and _given_by_caller(lookup.indices)]
    if not given:
        return "no indices are given by the caller as [batch, length]"
    words = max(given, key=lambda lookup: lookup.table.shape[0])
    return [words, *(lookup for lookup in found if lookup is not words)]


def _terms(total: ir.Value) -> list[ir.Value]:
    """Return the terms of nested sums that nobody else reads."""
    added = producer(total, "Add") if private(total) else None
    operands = [] if added is None else [operand for operand in added.inputs if operand is not None]
    return [term for operand in operands for term in _terms(operand)] if operands else [total]


def _lookup(value: ir.Value) -> _Lookup | None:
    whole = _rows_of(constant(value))
    if whole is not None:
        return _Lookup(value, whole)
    gathered, part = producer(value, "Gather"), producer(value, "Slice")
    if not private(value):
        return None
    if gathered is not None and gathered.attributes.get_int("axis", 0) == 0:
        table, indices = constant(gathered.inputs[0]), gathered.inputs[1]
        known = table is not None and table.ndim == 2 and indices is not None and rank(indices) in (1, 2)
        return _Lookup(value, table, indices) if known and table is not None else None
    if part is not None:
        table = _rows_of(constant(part.inputs[0]))
        axes = constant(part.inputs[3]) if len(part.inputs) > 3 else None
        rows_axis = (rank(part.inputs[0]) or 0) - 2 if part.inputs[0] is not None else 0
        if table is not None and axes is not None and axes.tolist() in ([rows_axis], [-2]):
            return _Lookup(value, table, part=part)
    return None


def _rows_of(array: Array | None) -> Array | None:
    """Return a constant [rows, hidden] or [1, rows, hidden] as a table."""
    if array is None or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] != 1):
        return None
    return array.reshape(array.shape[-2:])


def _given_by_caller(indices: ir.Value) -> bool:
    """Whether they are a graph input with two axes, or its cast; others may have fewer rows than the result."""
    cast = producer(indices, "Cast")
    source = indices if cast is None else cast.inputs[0]
    return source is not None and source.is_graph_input() and rank(source) == 2 and axis_size(source, 0) != 1


def _rows(op: Any, lookup: _Lookup) -> Any:
    """Return the indices of a lookup as INT32, with one or two axes."""
    if lookup.indices is not None:
        return _int32(op, lookup.indices)
    every = op.Constant(value=ir.tensor(np.arange(lookup.table.shape[0], dtype=np.int32)))
    if lookup.part is None:
        return every
    begin, end, _, *step = lookup.part.inputs[1:5]
    return op.Slice(every, begin, end, op.Constant(value_ints=[0]), *step)


def _int32(op: Any, indices: Any) -> Any:
    return indices if indices.dtype == ir.DataType.INT32 else op.Cast(indices, to=ir.DataType.INT32)


def _tell_sizes(root: ir.Value, words: _Lookup) -> None:
    """Give the axes of the result, whose size inference may not know, the names of those of the indices."""
    sizes = sizes_of(words.indices) if words.indices is not None else None
    graph = made_by(root).graph
    if sizes and graph is not None:
        unify_sizes(graph, names_of(root, [size for size in sizes if size is not None]))
