"""Asks what a family of fusion rules makes of a model, and why a rule does not apply."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, RewriteRule, RewriteRuleSet

from optimizers.passes import PassResult, copy_of
from optimizers.passes.check import require_equivalent
from optimizers.passes.fusion import Family, Fuse
from optimizers.passes.settle import settle
from tests.optimizers.graphs import context_of


def fused(model: onnx.ModelProto, family: Family, batches: Sequence[dict], work: Path) -> PassResult:
    """Apply one family; the result must answer as the model does, with onnxruntime's own optimizations disabled."""
    before = model.SerializeToString()
    result = Fuse((family,)).run(model, context_of(work))
    assert model.SerializeToString() == before
    if result.changed:
        require_equivalent(model, result, "tolerance", batches, work)
    return result


def refusals(model: onnx.ModelProto, rules: Sequence[RewriteRule]) -> str:
    """Return the reasons why none of the rules applies to the model."""
    typed = copy_of(model)
    settle(typed, model)
    tracer = MatchingTracer()
    RewriteRuleSet(list(rules)).apply_to_model(ir.from_proto(typed), tracer=tracer)
    found = [match for matches in tracer.best_matches_map.values() for match in matches]
    return "; ".join(match.match_result.reason or "" for match in found)
