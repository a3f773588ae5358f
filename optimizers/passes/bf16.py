"""BF16: the range of FP32 with 8 bits of mantissa, for GPUs; inputs and outputs stay FP32."""

from typing import ClassVar

import onnx

from optimizers.errors import PassFailed
from optimizers.graph import opset_of
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.casting import ANY_FLOAT, BF16, element_types, takes
from optimizers.passes.reduced import reduce_precision
from optimizers.passes.settle import settle

CPU_KERNELS = ANY_FLOAT | {
    "Cast",
    "Concat",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "LayerNormalization",
    "Reshape",
    "ScatterND",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""What onnxruntime 1.32 runs in BF16 on the CPU: operators that move values, and LayerNormalization. Unlike for FP16 it
does not cast around the others; a session with one of them does not open."""


class Bf16:
    """Convert to BF16, and keep the nodes in FP32 that it would harm; see ``optimizers.passes.reduced``.

    Few values leave its range; what it lacks is precision, so sums of more than 256 terms stay in FP32, those of
    products excepted, which GPUs accumulate in FP32. Convolution and pooling take BF16 from opset 22 on.
    """

    spec: ClassVar[PassSpec] = PassSpec("bf16", 1, "lossy", produces="bf16", needs=frozenset({"host"}), target="cuda")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If the host has no GPU to verify the result on and the CPU lacks a kernel, or for the reasons of
                ``reduce_precision``.
        """
        missing = _without_cpu_kernel(model)
        if missing and not context.host.gpus:
            raise PassFailed(
                f"onnxruntime has no BF16 kernels on the CPU for {', '.join(missing)}, and this host has no GPU to "
                "verify the result on"
            )
        return reduce_precision(model, context, BF16)


def _without_cpu_kernel(model: onnx.ModelProto) -> list[str]:
    known = copy_of(model)
    settle(known, model)
    types, opset = element_types(known), opset_of(known)
    converted = {node.op_type for node in known.graph.node if takes(node, types, opset, BF16)}
    return sorted(converted - CPU_KERNELS)
