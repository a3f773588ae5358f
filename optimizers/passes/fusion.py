"""Fusion: several operators become one standard operator, by onnxscript's rules or by onnxruntime's BASIC level.

Fusions into onnxruntime's own operators are left to onnxruntime, which applies them when it opens the model: a file
with such operators would run nowhere else, and the best choice depends on the machine.
"""

import tempfile
from pathlib import Path
from typing import ClassVar

import onnx
import onnxruntime
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.rules.common import affine_conv_fusion_rule, conv_affine_fusion_rule, fuse_hardswish_rules
from onnxscript.rewriter.rules.fusion._layer_norm import layer_normalization_rules

from optimizers.errors import PassFailed
from optimizers.graph import foreign_ops, load_model, opset_of, save_model
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.settle import removed, settle
from server.providers import ort_errors

_HARDSWISH_OPSET = 14
_LAYER_NORMALIZATION_OPSET = 17


class Fuse:
    """Fold constants; fuse Conv with BatchNormalization, affine steps, padding; form HardSwish, LayerNormalization."""

    spec: ClassVar[PassSpec] = PassSpec("fusion", 1, "tolerance")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If the result holds operators outside the standard domains that the input did not hold.
        """
        fused = rewriter.rewrite(optimizer.optimize(copy_of(model)), _rules(opset_of(model)))
        fused.ir_version = model.ir_version
        settle(fused, model)
        counts = removed(model, fused)
        _require_portable(model, fused)
        return PassResult(fused, changed=bool(counts), counts=counts, note="" if counts else "no pattern found")


class OrtBasic:
    """Let onnxruntime optimize at its BASIC level, whose result is standard ONNX, and keep that as the model."""

    spec: ClassVar[PassSpec] = PassSpec("ort-basic", 1, "tolerance")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If onnxruntime cannot open the model, or if its result is not portable.
        """
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            source, target = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
            save_model(model, source)
            _optimize(source, target)
            fused = load_model(target)
        _drop_unused_domains(fused)
        fused.ir_version = model.ir_version
        settle(fused, model)
        counts = removed(model, fused)
        _require_portable(model, fused)
        return PassResult(fused, changed=bool(counts), counts=counts, note="" if counts else "nothing to fuse")


def _rules(opset: int) -> list[RewriteRule]:
    """Return the rules whose results exist in this opset."""
    rules = [conv_affine_fusion_rule, affine_conv_fusion_rule]
    if opset >= _HARDSWISH_OPSET:
        rules += fuse_hardswish_rules().rules
    if opset >= _LAYER_NORMALIZATION_OPSET:
        rules += layer_normalization_rules
    return rules


def _optimize(source: Path, target: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except ort_errors() as exc:
        raise PassFailed(f"onnxruntime cannot optimize the model: {exc}") from exc


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """Remove the opset imports that onnxruntime adds for all of its own domains."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used or foreign_ops(model)]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _require_portable(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    new = sorted(set(foreign_ops(after)) - set(foreign_ops(before)))
    if new:
        raise PassFailed(f"not portable: the result holds {', '.join(new)}")
