"""Opset: lift old models to the opset that quantization and converters handle best."""

from typing import ClassVar

import onnx
from onnx import version_converter

from optimizers.errors import PassFailed
from optimizers.graph import opset_of
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.settle import settle

OLDEST_OPSET = 13
"""Below it, per-channel scales cannot be expressed (``QuantizeLinear`` got its axis with opset 13)."""

TARGET_OPSET = 17
"""Old enough for TensorRT and converters, new enough for ``LayerNormalization``."""


class RaiseOpset:
    """Convert models below opset 13 to opset 17."""

    spec: ClassVar[PassSpec] = PassSpec("opset", 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If ONNX's converter has no way from the model's opset, or not for one of its operators.
        """
        opset = opset_of(model)
        if opset == 0 or opset >= OLDEST_OPSET:
            return PassResult(model, changed=False, note=f"opset {opset} is kept")
        try:
            raised = version_converter.convert_version(model, TARGET_OPSET)
        except (RuntimeError, ValueError, version_converter.ConvertError) as exc:
            raise PassFailed(f"opset {opset} cannot be converted to {TARGET_OPSET}: {exc}") from exc
        raised.ir_version = model.ir_version
        settle(raised, model)
        return PassResult(raised, changed=True, counts={"opset_from": opset, "opset_to": TARGET_OPSET})
