"""Fold: constants, nodes that do nothing, and what is computed twice, by onnx-ir and onnxscript."""

from collections.abc import Callable
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.rules import common as rules

from optimizers.errors import PassFailed
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.rules import apply_counted, drop_rule_names
from optimizers.passes.settle import settle

_LARGEST_FOLDED = 1 << 20
"""Elements of a folded result: larger ones, such as an expanded mask, cost more to read than to compute."""

_MOST_ROUNDS = 4

_RULES: dict[str, list[RewriteRule]] = {
    "no effect": [
        rules.add_0_rule,
        rules.sub_0_rule,
        rules.mul_by_1_rule,
        rules.div_by_1_rule,
        rules.dropout_inference_rule,
        rules.dropout_zero_rule,
        rules.no_op_cast_rule,
        rules.no_op_transpose_rule,
        rules.no_op_expand_rule,
    ],
    "chains": [
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.min_max_rule,
        rules.max_min_rule,
        rules.min_min_rule,
        rules.max_max_rule,
        rules.successive_relu_rule,
        rules.successive_clip_rule,
        rules.successive_relu_clip_rule,
        rules.successive_clip_relu_rule,
    ],
}


class Fold:
    """Compute what is constant, drop what is not read or has no effect, and compute only once what is the same.

    ``counts`` says how many nodes each step removed, and how many equal initializers were merged. Quantization nodes
    are never folded: their constants say how the values around them are quantized.
    """

    spec: ClassVar[PassSpec] = PassSpec("fold", 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If onnx-ir cannot rewrite the model.
        """
        typed = copy_of(model)
        settle(typed, model)
        try:
            graph = ir.from_proto(typed)
            counts = _folded(graph)
            folded = ir.to_proto(graph)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ir.passes.PassError) as exc:
            raise PassFailed(f"onnx-ir cannot rewrite the model: {type(exc).__name__}: {exc}") from exc
        if not counts:
            return PassResult(model, changed=False, note="nothing is constant, unused or computed twice")
        drop_rule_names(folded)
        folded.ir_version = model.ir_version
        settle(folded, model)
        return PassResult(folded, changed=True, counts=counts, note=", ".join(f"{n} {k}" for k, n in counts.items()))


def _folded(graph: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _ in range(_MOST_ROUNDS):
        before = sum(counts.values())
        _add(counts, "unused", _nodes_removed(graph, lambda it: common.RemoveUnusedNodesPass()(it)))
        _add(counts, "constant", _nodes_removed(graph, _fold_constants))
        for name, times in apply_counted(graph, _RULES).items():
            _add(counts, name, times)
        _add(counts, "duplicate initializers", _merge_initializers(graph))
        _add(counts, "duplicate", _nodes_removed(graph, lambda it: common.CommonSubexpressionEliminationPass()(it)))
        if sum(counts.values()) == before:
            break
    common.OutputFixPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    common.NameFixPass()(graph)
    return counts


def _fold_constants(graph: ir.Model) -> None:
    optimizer.fold_constants(graph, output_size_limit=_LARGEST_FOLDED)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.RemoveUnusedNodesPass()(graph)


def _merge_initializers(graph: ir.Model) -> int:
    before = len(graph.graph.initializers)
    common.DeduplicateInitializersPass()(graph)
    return before - len(graph.graph.initializers)


def _nodes_removed(graph: ir.Model, step: Callable[[ir.Model], object]) -> int:
    before = _nodes(graph)
    step(graph)
    return before - _nodes(graph)


def _nodes(graph: ir.Model) -> int:
    return sum(node.op_type != "Constant" for node in graph.graph.all_nodes())


def _add(counts: dict[str, int], name: str, times: int) -> None:
    if times > 0:
        counts[name] = counts.get(name, 0) + times
