"""What rewrite rules ask about values, and how a set of rules is applied and counted.

A rule is an ``onnxscript.rewriter.RewriteRuleClassBase``: its pattern is the last operators of what it replaces, its
check walks up from there and says why it does not apply, its rewrite makes one standard ONNX operator.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.rewriter import RULE_NAME_TAG, MatchResult, RewriteRule, RewriteRuleClassBase, RewriteRuleSet

from optimizers.graph import free_name, nodes_of
from server.tensors import Array

_MOST_ROUNDS = 8
"""A rule may make room for another one; chains longer than this are left as they are."""


_UntypedRule: Any = RewriteRuleClassBase  # it passes what the pattern binds by name, which its signatures do not say


class Rule(_UntypedRule):  # type: ignore[misc]
    """Base of the rules: ``pattern``, ``check`` and ``rewrite`` take what the pattern binds, by name."""

    @classmethod
    def build(cls, *, commuted: bool = False) -> list[RewriteRule]:
        """Return the rule, and with ``commuted`` also those with swapped operands of sums and products."""
        rule: RewriteRule = cls.rule()
        return list(rule.commute()) if commuted else [rule]


def refused(reason: str) -> MatchResult:
    """Return what ``check`` gives when a rule does not apply."""
    return MatchResult().fail(reason)


def constant(value: ir.Value | None) -> Array | None:
    """Return what a value holds when no run can change it, else ``None``; inputs with a default are no constants."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def weight(value: ir.Value | None) -> Array:
    """Return a constant as FP64.

    Raises:
        ValueError: If the value is not constant.
    """
    array = constant(value)
    if array is None:
        raise ValueError(f"'{None if value is None else value.name}' is not constant")
    return array.astype(np.float64)


def scalar(value: ir.Value | None, beside: ir.Value | None = None) -> float | None:
    """Return the single element of a constant, else ``None``.

    Args:
        value: The value in question.
        beside: The tensor that it is combined with: a constant of more axes would give the result more axes.
    """
    array = constant(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiu":
        return None
    if beside is not None and array.ndim > (rank(beside) or 0):
        return None
    return float(array.item())


def rank(value: ir.Value) -> int | None:
    """Return the number of axes, or ``None`` where it is not known."""
    return None if value.shape is None else value.shape.rank()


def axis_size(value: ir.Value, axis: int) -> int | None:
    """Return the size of an axis, or ``None`` where it is variable or not known."""
    if value.shape is None or not -value.shape.rank() <= axis < value.shape.rank():
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def private(value: ir.Value) -> bool:
    """Whether exactly one node reads the value, and no caller does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def read_once(value: ir.Value) -> bool:
    """Whether no caller and one node reads the elements of a value; nodes that ask for its shape do not count."""
    readers = [usage.node for usage in value.uses() if usage.node.op_type != "Shape"]
    return len(readers) == 1 and not value.is_graph_output()


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes the value if it is a standard operator of this type, else ``None``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def made_by(value: ir.Value) -> ir.Node:
    """Return the node that makes a value which a pattern has matched.

    Raises:
        ValueError: If the value is an input or a weight.
    """
    node = value.producer()
    if node is None:
        raise ValueError(f"'{value.name}' is made by no node")
    return node


def weight_name(node: ir.Node, wish: str) -> str:
    """Return a name for a new initializer beside a node; the rewriter would replace one of the same name."""
    graph = node.graph
    return free_name(wish, graph.initializers if isinstance(graph, ir.Graph) else {})


def tensor_like(array: Array, old: ir.Value | None) -> ir.TensorProtocol:
    """Return an array as a tensor in the datatype of an existing weight."""
    kept = constant(old)
    return ir.tensor(array if kept is None else np.ascontiguousarray(array).astype(kept.dtype))


def apply_counted(model: ir.Model, rules: Mapping[str, Sequence[RewriteRule]]) -> dict[str, int]:
    """Apply rules until none applies any more; edits in place.

    Args:
        model: The model; rules also apply inside the subgraphs of control flow.
        rules: Name of the fusion -> the rules that form it.

    Returns:
        Name -> how often it was applied; names that never applied are left out.
    """
    sets = {name: RewriteRuleSet(list(those)) for name, those in rules.items()}
    counts: Counter[str] = Counter()
    for _ in range(_MOST_ROUNDS):
        found = {name: those.apply_to_model(model) for name, those in sets.items()}
        counts.update({name: count for name, count in found.items() if count})
        if not any(found.values()):
            break
    return dict(counts)


def drop_rule_names(model: onnx.ModelProto) -> None:
    """Remove the note that the rewriter leaves on new nodes; it has no place in files of older IR versions."""
    for node in nodes_of(model):
        kept = [entry for entry in node.metadata_props if entry.key != RULE_NAME_TAG]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
