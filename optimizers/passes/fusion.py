"""Fusion: several operators become one standard operator, by rules of our own or by onnxruntime's BASIC level.

Fusions into onnxruntime's own operators are left to onnxruntime, which applies them when it opens the model: a file
with such operators would run nowhere else, and the best choice depends on the machine (see ``cpu_build``).
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
from onnxscript.rewriter import RewriteRule

from optimizers.errors import PassFailed
from optimizers.graph import foreign_ops, load_model, nodes_of, opset_of, save_model
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.fuse_activation import GELU_RULES, HARDSWISH_RULES
from optimizers.passes.fuse_conv import CONV_RULES
from optimizers.passes.fuse_gemm import GEMM_RULES
from optimizers.passes.fuse_normalization import NORMALIZATION_RULES
from optimizers.passes.rules import apply_counted, drop_rule_names
from optimizers.passes.settle import removed, settle
from server.providers import ort_errors

Family = Literal["conv", "gemm", "normalization", "activation"]
"""Rules that are applied together, by what they form."""

FAMILIES: tuple[Family, ...] = ("conv", "gemm", "normalization", "activation")
"""All of them, in the order in which they run."""

_HARDSWISH_OPSET = 14
_LAYER_NORMALIZATION_OPSET = 17
_GELU_OPSET = 20


class Fuse(msgspec.Struct, frozen=True):
    """Form standard operators by rules; ``counts`` says how often each rule was applied, by the name of the fusion.

    Attributes:
        families: Which rules; one pass for each family lets a harmful rule be rolled back without losing the others.
    """

    families: tuple[Family, ...] = FAMILIES

    @property
    def spec(self) -> PassSpec:
        """Named after its families unless it has all of them."""
        name = "fusion" if self.families == FAMILIES else f"fusion-{'-'.join(self.families)}"
        return PassSpec(name, 2, "tolerance")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If the rewriter fails, or if the result holds operators outside the standard domains that the
                input did not hold.
        """
        try:
            fused, counts = self._fused(model)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ir.passes.PassError) as exc:
            raise PassFailed(f"the rewriter fails: {type(exc).__name__}: {exc}") from exc
        if not counts:
            return PassResult(model, changed=False, note="no pattern found")
        drop_rule_names(fused)
        fused.ir_version = model.ir_version
        settle(fused, model)
        _require_portable(model, fused)
        return PassResult(fused, changed=True, counts=counts, note=_summary(counts))

    def _fused(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
        typed = copy_of(model)
        settle(typed, model)  # rules ask for types and shapes
        graph = ir.from_proto(typed)
        counts: Counter[str] = Counter()
        for family in self.families:
            counts.update(apply_counted(graph, rules_of(family, opset_of(model))))
            common.RemoveUnusedNodesPass()(graph)
        _lift_constants(graph)
        return ir.to_proto(graph), dict(counts)


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


def rules_of(family: Family, opset: int) -> dict[str, list[RewriteRule]]:
    """Return name of the fusion -> its rules, those whose results exist in an opset."""
    if family == "normalization":
        return NORMALIZATION_RULES if opset >= _LAYER_NORMALIZATION_OPSET else {}
    if family == "activation":
        gelu = GELU_RULES if opset >= _GELU_OPSET else {}
        return gelu | (HARDSWISH_RULES if opset >= _HARDSWISH_OPSET else {})
    return CONV_RULES if family == "conv" else GEMM_RULES


def _lift_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)


def _summary(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


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
    used = {node.domain for node in nodes_of(model)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used or foreign_ops(model)]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _require_portable(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    new = sorted(set(foreign_ops(after)) - set(foreign_ops(before)))
    if new:
        raise PassFailed(f"not portable: the result holds {', '.join(new)}")
