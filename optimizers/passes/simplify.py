"""Simplify: constant folding, removal of dead and duplicate nodes, by onnxslim."""

from typing import ClassVar

import onnx
import onnxslim

from optimizers.errors import ModelError, PassFailed
from optimizers.graph import check, opset_of
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.settle import removed, settle

_CAREFUL = ("graph_fusion", "weight_tying")
"""What onnxslim leaves out in the second attempt: its patterns, where nearly all of its faults were."""

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)


class Simplify:
    """Run onnxslim; variable axes stay variable.

    Where its fusion patterns raise or break the model, it runs a second time without them. onnxslim has changed outputs
    before, so its result is only ever used behind the golden check.
    """

    spec: ClassVar[PassSpec] = PassSpec("simplify", 2, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If onnxslim raises, or gives no valid model of the same opset back, also without its patterns.
        """
        try:
            slim, note = _slimmed(model, ()), ""
        except PassFailed as exc:
            try:
                slim, note = _slimmed(model, _CAREFUL), f"without onnxslim's patterns: {exc}"
            except PassFailed as again:
                raise PassFailed(f"{exc}; without its patterns: {again}") from again
        counts = removed(model, slim)
        if not counts:
            return PassResult(model, changed=False, note=note or "nothing to simplify")
        return PassResult(slim, changed=True, counts=counts, note=note)


def _slimmed(model: onnx.ModelProto, skipped: tuple[str, ...]) -> onnx.ModelProto:
    """Return what onnxslim makes of a model.

    Raises:
        PassFailed: If it raises, or if its result is not valid.
    """
    try:
        slim = onnxslim.slim(copy_of(model), skip_optimizations=list(skipped))  # it edits the model that it is given
    except _FAILURES as exc:
        raise PassFailed(f"onnxslim raises {type(exc).__name__}: {str(exc)[:200]}") from exc
    if not isinstance(slim, onnx.ModelProto) or opset_of(slim) != opset_of(model):
        raise PassFailed("onnxslim gave no model of the same opset back")
    slim.ir_version = model.ir_version
    settle(slim, model)
    try:
        check(slim)
    except ModelError as exc:
        raise PassFailed(f"onnxslim's result is not valid: {exc}") from exc
    return slim
