"""Simplify: constant folding, removal of dead and duplicate nodes, by onnxslim."""

from typing import ClassVar

import onnx
import onnxslim

from optimizers.errors import PassFailed
from optimizers.graph import opset_of
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.settle import removed, settle


class Simplify:
    """Run onnxslim; variable axes stay variable.

    onnxslim has changed outputs before, so its result is only ever used behind the golden check.
    """

    spec: ClassVar[PassSpec] = PassSpec("simplify", 1, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If onnxslim gives nothing back, or a model of another opset.
        """
        slim = onnxslim.slim(copy_of(model))  # it edits the model that it is given
        if not isinstance(slim, onnx.ModelProto) or opset_of(slim) != opset_of(model):
            raise PassFailed("onnxslim gave no model of the same opset back")
        settle(slim, model)
        counts = removed(model, slim)
        return PassResult(slim, changed=bool(counts), counts=counts, note="" if counts else "nothing to simplify")
