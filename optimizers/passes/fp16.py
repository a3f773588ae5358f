"""FP16: weights and arithmetic in half precision, for GPUs; inputs and outputs stay FP32."""

from typing import ClassVar

import onnx

from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.casting import FP16
from optimizers.passes.reduced import reduce_precision


class Fp16:
    """Convert to FP16, and keep the nodes in FP32 that it would harm; see ``optimizers.passes.reduced``."""

    spec: ClassVar[PassSpec] = PassSpec("fp16", 2, "lossy", produces="fp16", target="cuda")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If the model holds control flow or no FP32 weights, if it is larger than 2 GB, if every weight
                would stay FP32, or if it does not run on the calibration data.
        """
        return reduce_precision(model, context, FP16)
