"""INT8 with activation scales computed at run time: weights of MatMul and Gemm, per channel."""

import tempfile
from pathlib import Path
from typing import ClassVar

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from optimizers.errors import PassFailed
from optimizers.graph import load_model
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.int8 import DEFAULT_TENSOR_TYPE, int8_options, prepared, reduced_range, weighted_nodes
from optimizers.passes.settle import settle

_OPS = frozenset({"MatMul", "Gemm"})


class Int8Dynamic:
    """Quantize MatMul and Gemm; never Conv, whose dynamic form, ConvInteger, is 4 to 6 times slower than FP32."""

    spec: ClassVar[PassSpec] = PassSpec(
        "int8-dynamic", 1, "lossy", produces="int8", needs=frozenset({"host"}), target="cpu"
    )

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If no MatMul or Gemm has a constant weight, if the opset is too old, or if the quantizer fails.
        """
        if not weighted_nodes(model, _OPS):
            convolutions = len(weighted_nodes(model, frozenset({"Conv"})))
            reason = f"; its {convolutions} Conv would become ConvInteger, 4-6 times slower" if convolutions else ""
            raise PassFailed(f"no MatMul or Gemm has a constant weight{reason}")
        reduce = reduced_range(context.host)
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            target = Path(folder) / "model.onnx"
            try:
                quantize_dynamic(
                    prepared(model),
                    target,
                    op_types_to_quantize=sorted(_OPS),
                    per_channel=True,
                    reduce_range=reduce,
                    weight_type=QuantType.QInt8,
                    extra_options={"MatMulConstBOnly": True, **DEFAULT_TENSOR_TYPE},
                )
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as exc:
                raise PassFailed(f"onnxruntime's quantizer fails: {exc}") from exc
            quantized = load_model(target)
        quantized.ir_version = model.ir_version
        settle(quantized, model)
        count = sum(node.op_type == "MatMulInteger" for node in quantized.graph.node)
        if count == 0:
            raise PassFailed("onnxruntime's quantizer left every MatMul and Gemm in FP32")
        note = f"{'7' if reduce else '8'}-bit weights, per channel"
        options = int8_options(context.host)
        return PassResult(quantized, changed=True, counts={"quantized": count}, note=note, options=options)
