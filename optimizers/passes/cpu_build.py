"""The build for one kind of CPU: onnxruntime's own operators and layouts, found once and kept in the file.

At its level ALL onnxruntime replaces operators by its own: ``FusedConv``, ``BiasGelu``, ``SkipLayerNormalization``, and
convolutions on blocks of 8 or 16 channels (NCHWc) whose weights are laid out for the vector width of this CPU. Rules of
our own form ``EmbedLayerNormalization`` and ``Attention`` before that. Such a file opens without being transformed
again, and is bound to CPUs like this one and to onnxruntime.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

from optimizers.errors import PassFailed
from optimizers.graph import load_model, nodes_of, op_counts, opset_of, save_model
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.fuse_attention import ATTENTION_RULES
from optimizers.passes.fuse_embedding import EMBEDDING_RULES
from optimizers.passes.rules import apply_counted, drop_rule_names
from optimizers.passes.settle import TOOL_FAILURES, settle
from server.artifact import SessionOptions
from server.providers import ort_errors

Fusion = Literal["embedding", "attention"]
"""Rules of our own that form onnxruntime's operators."""

DISABLED_OPTIMIZERS = "optimization.disable_specified_optimizers"
"""Session config entry: onnxruntime's optimizers that must not run, separated by ``;``."""

BUILT_FOR = "slipstream.built_for"
"""Metadata of the file: the CPU that it was built on."""

_RULES = {"embedding": EMBEDDING_RULES, "attention": ATTENTION_RULES}
_OLDEST_OPSET = 13  # before, Softmax takes all axes from the given one on
_ENCODER_OPS = ({"LayerNormalization"}, {"Softmax", "com.microsoft:Attention", "com.microsoft:MultiHeadAttention"})
_FUSION_FAILURES = (*TOOL_FAILURES, ir.passes.PassError)


class CpuBuild(msgspec.Struct, frozen=True):
    """Let onnxruntime optimize for this CPU and keep the result; ``counts`` holds its own operators by name.

    Attributes:
        disabled: Names of onnxruntime's optimizers to leave out, such as ``SkipLayerNormFusion``, whose kernel is
            slower than the separate operators on some CPUs.
        fusions: Which rules of our own run before, in this order.
        encoder_fusions: Whether transformer encoders go through ``onnxruntime.transformers`` after that. It forms no
            attention, but it knows more spellings of GELU and of a normalized sum that is read again than sessions do.
    """

    disabled: tuple[str, ...] = ()
    fusions: tuple[Fusion, ...] = ("embedding", "attention")
    encoder_fusions: bool = True

    @property
    def spec(self) -> PassSpec:
        """Takes any FP32 model, makes one for CPUs like this."""
        return PassSpec("cpu-build", 2, "tolerance", "fp32", "cpu-build", needs=frozenset({"host"}), target="cpu")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Returns:
            A model whose sessions need no optimization: level ``disable`` is enough, and any other leaves it as it is.

        Raises:
            PassFailed: If onnxruntime cannot open the model.
        """
        fused, done = self._fused(model)
        fused, tool = self._encoder(fused)
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            source, target = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
            save_model(fused, source)
            self._optimize(source, target)
            built = load_model(target)
        built.ir_version = model.ir_version
        _drop_unused_domains(built)
        settle(built, model)
        counts = foreign_counts(built, model)
        if not counts:
            return PassResult(model, changed=False, note="onnxruntime has no operators of its own for this model")
        helper.set_model_props(built, _properties(model) | {BUILT_FOR: context.host.fingerprint})
        config = {DISABLED_OPTIMIZERS: ";".join(self.disabled)} if self.disabled else {}
        note = "; ".join(filter(None, (done, tool)))
        return PassResult(built, True, counts, note, SessionOptions(graph_level="disable", config=config))

    def _fused(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
        """Return the model after our rules, and what they did."""
        if not self.fusions or opset_of(model) < _OLDEST_OPSET:
            return model, ""
        typed = copy_of(model)
        settle(typed, _with_named_axes(model))  # rules ask for types and shapes
        try:
            graph = ir.from_proto(typed)
            counts: Counter[str] = Counter()
            for fusion in self.fusions:
                counts.update(apply_counted(graph, _RULES[fusion]))
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
            common.RemoveUnusedNodesPass()(graph)
            common.NameFixPass()(graph)
            fused = ir.to_proto(graph)
        except _FUSION_FAILURES as exc:
            return model, f"without rules of our own: {type(exc).__name__}: {str(exc)[:100]}"
        if not counts:
            return model, ""
        drop_rule_names(fused)
        fused.ir_version = model.ir_version
        settle(fused, model)
        return fused, "by rules: " + ", ".join(f"{count} x {name}" for name, count in counts.items())

    def _encoder(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
        """Return the model after onnxruntime's rules, and whether they were applied."""
        if not self.encoder_fusions or not all(names & op_counts(model).keys() for names in _ENCODER_OPS):
            return model, ""
        options = FusionOptions("bert")
        options.enable_skip_layer_norm = "SkipLayerNormFusion" not in self.disabled
        options.enable_bias_skip_layer_norm = options.enable_skip_layer_norm
        options.enable_attention = options.enable_embed_layer_norm = False  # left to rules of our own
        twin = copy_of(model)
        twin.producer_name = "pytorch"  # it warns of every other producer
        try:
            made = optimize_model(twin, "bert", optimization_options=options, opt_level=0)
            made.topological_sort()
        except _FUSION_FAILURES as exc:
            return model, f"without onnxruntime's encoder rules: {type(exc).__name__}: {str(exc)[:100]}"
        fused: onnx.ModelProto = made.model
        fused.producer_name = model.producer_name
        settle(fused, model)
        return fused, "with onnxruntime's encoder rules"

    def _optimize(self, source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(target)
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns that the file suits this kind of CPU only, which is the point
        if source.with_name(f"{source.name}.data").exists():
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimized.data"
            )
        if self.disabled:
            options.add_session_config_entry(DISABLED_OPTIMIZERS, ";".join(self.disabled))
        try:
            onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except ort_errors() as exc:
            raise PassFailed(f"onnxruntime cannot optimize the model: {exc}") from exc


def foreign_counts(after: onnx.ModelProto, before: onnx.ModelProto) -> dict[str, int]:
    """Return ``domain:Op`` -> how many more nodes of operators outside the standard domains there are."""
    found = Counter(op_counts(after))
    found.subtract(op_counts(before))
    return {name: count for name, count in sorted(found.items()) if count > 0 and ":" in name}


def _with_named_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every variable axis of an input has a name, so that its size can be followed."""
    twin = copy_of(model)
    for value in twin.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.WhichOneof("value") is None:
                dim.dim_param = f"{value.name}.{axis}"
    return twin


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """Remove the opset imports that onnxruntime adds for all of its own domains."""
    used = {node.domain for node in nodes_of(model)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
