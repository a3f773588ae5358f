"""Opset: lift old models to the opset that quantization and converters handle best."""

import msgspec
import onnx
from onnx import helper, version_converter

from optimizers.errors import PassFailed
from optimizers.graph import opset_of
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.settle import settle

OLDEST_OPSET = 13
"""Below it, per-channel scales cannot be expressed (``QuantizeLinear`` got its axis with opset 13)."""

TARGET_OPSET = 17
"""Old enough for TensorRT and converters, new enough for ``LayerNormalization``."""


class RaiseOpset(msgspec.Struct, frozen=True):
    """Convert models below one opset to another.

    Attributes:
        oldest: Models of this opset and newer ones are kept as they are.
        target: What older ones are converted to; 20 has ``Gelu``, which not every converter reads.
    """

    oldest: int = OLDEST_OPSET
    target: int = TARGET_OPSET

    @property
    def spec(self) -> PassSpec:
        """Named after the target unless it is the usual one."""
        return PassSpec("opset" if self.target == TARGET_OPSET else f"opset-{self.target}", 2, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If ONNX's converter has no way from the model's opset, or not for one of its operators.
        """
        opset = opset_of(model)
        if opset == 0 or opset >= self.oldest:
            return PassResult(model, changed=False, note=f"opset {opset} is kept")
        try:
            raised = version_converter.convert_version(model, self.target)
        except (RuntimeError, ValueError, version_converter.ConvertError) as exc:
            raise PassFailed(f"opset {opset} cannot be converted to {self.target}: {exc}") from exc
        standard = [entry for entry in raised.opset_import if entry.domain in ("", "ai.onnx")]
        raised.ir_version = max(model.ir_version, helper.find_min_ir_version_for(standard))
        settle(raised, model)
        return PassResult(raised, changed=True, counts={"opset_from": opset, "opset_to": self.target})
