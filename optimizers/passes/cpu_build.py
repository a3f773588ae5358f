"""The build for one kind of CPU: onnxruntime's own operators and layouts, found once and kept in the file.

At its level ALL onnxruntime replaces operators by its own: ``FusedConv``, ``BiasGelu``, ``SkipLayerNormalization``,
``Attention``, and convolutions on blocks of 8 or 16 channels (NCHWc) whose weights are laid out for the vector width of
this CPU. Such a file opens without being transformed again, and is bound to CPUs like this one and to onnxruntime.
"""

import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import onnx
import onnxruntime
from onnx import helper
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

from optimizers.errors import PassFailed
from optimizers.graph import load_model, nodes_of, op_counts, save_model
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.settle import settle
from server.artifact import SessionOptions
from server.providers import ort_errors

DISABLED_OPTIMIZERS = "optimization.disable_specified_optimizers"
"""Session config entry: onnxruntime's optimizers that must not run, separated by ``;``."""

BUILT_FOR = "slipstream.built_for"
"""Metadata of the file: the CPU that it was built on."""

_ENCODER_OPS = frozenset({"LayerNormalization", "Softmax", "MatMul"})
_TOOL_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CpuBuild(msgspec.Struct, frozen=True):
    """Let onnxruntime optimize for this CPU and keep the result; ``counts`` holds its own operators by name.

    Attributes:
        disabled: Names of onnxruntime's optimizers to leave out, such as ``SkipLayerNormFusion``, whose kernel is
            slower than the separate operators on some CPUs.
        encoder_fusions: Whether transformer encoders first go through the rules of ``onnxruntime.transformers``, which
            know more spellings of attention and embeddings than the session does.
    """

    disabled: tuple[str, ...] = ()
    encoder_fusions: bool = True

    @property
    def spec(self) -> PassSpec:
        """Takes any FP32 model, makes one for CPUs like this."""
        return PassSpec("cpu-build", 1, "tolerance", "fp32", "cpu-build", needs=frozenset({"host"}), target="cpu")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Returns:
            A model whose sessions need no optimization: level ``disable`` is enough, and any other leaves it as it is.

        Raises:
            PassFailed: If onnxruntime cannot open the model.
        """
        fused, note = self._encoder(model)
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
        return PassResult(built, True, counts, note, SessionOptions(graph_level="disable", config=config))

    def _encoder(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
        if not self.encoder_fusions or not op_counts(model).keys() >= _ENCODER_OPS:
            return model, ""
        options = FusionOptions("bert")
        options.enable_skip_layer_norm = "SkipLayerNormFusion" not in self.disabled
        options.enable_bias_skip_layer_norm = options.enable_skip_layer_norm
        twin = copy_of(model)
        twin.producer_name = "pytorch"  # it warns of every other producer
        try:
            made = optimize_model(twin, "bert", optimization_options=options, opt_level=0)
            made.topological_sort()
        except _TOOL_FAILURES as exc:
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


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """Remove the opset imports that onnxruntime adds for all of its own domains."""
    used = {node.domain for node in nodes_of(model)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
