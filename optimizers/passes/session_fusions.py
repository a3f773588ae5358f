"""Session fusions: which of onnxruntime's own fusions a session of this model leaves out on this host."""

from typing import ClassVar

import msgspec
import onnx

from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.cpu_build import DISABLED_OPTIMIZERS
from server.artifact import SessionOptions

_FORMED_FROM = {"SkipLayerNormFusion": "LayerNormalization"}


class SessionFusions(msgspec.Struct, frozen=True):
    """Leave out fusions that can make a model slower; the file stays as it is, its sessions are opened otherwise.

    onnxruntime joins ``Add`` and ``LayerNormalization`` into ``SkipLayerNormalization`` as soon as it knows the shapes.
    On the CPU the joined kernel can be slower than the two (MiniLM: 10 % on a Zen 4), so it is worth a race.

    Attributes:
        disabled: Names of onnxruntime's optimizers.
    """

    disabled: tuple[str, ...] = ("SkipLayerNormFusion",)
    spec: ClassVar[PassSpec] = PassSpec("session-fusions", 1, "exact", needs=frozenset({"host"}), target="cpu")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass; nothing changes when the model has no operator that such a fusion starts from."""
        present = {node.op_type for node in model.graph.node}
        useful = [name for name in self.disabled if _FORMED_FROM.get(name, "") in present or name not in _FORMED_FROM]
        if not useful:
            return PassResult(model, changed=False, note="no operator that these fusions start from")
        options = SessionOptions(config={DISABLED_OPTIMIZERS: ";".join(useful)})
        return PassResult(model, changed=True, counts=dict.fromkeys(useful, 1), note="left out", options=options)
