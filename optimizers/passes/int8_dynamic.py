"""INT8 with activation scales computed at run time: weights of MatMul and Gemm, per channel."""

import tempfile
from pathlib import Path
from typing import ClassVar

import msgspec
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from optimizers.errors import PassFailed
from optimizers.graph import load_model
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.int8 import (
    DEFAULT_TENSOR_TYPE,
    chosen_nodes,
    int8_options,
    kept_note,
    prepared,
    reduced_range,
    sort_nodes,
    weighted_nodes,
)
from optimizers.passes.settle import settle

_OPS = frozenset({"MatMul", "Gemm"})


class Int8Dynamic(msgspec.Struct, frozen=True):
    """Quantize MatMul and Gemm; never Conv, whose dynamic form, ConvInteger, is 4 to 6 times slower than FP32.

    The quantizer writes every Gemm as MatMul and Add, kept ones too; sessions fuse those again.

    Attributes:
        keep: Names of nodes that stay in float.
    """

    spec: ClassVar[PassSpec] = PassSpec(
        "int8-dynamic", 2, "lossy", produces="int8", needs=frozenset({"host"}), target="cpu"
    )

    keep: tuple[str, ...] = ()

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If no MatMul or Gemm has a constant weight, if none is left to quantize or a name to keep is
                unknown, if the opset is too old, if the model is quantized already, or if the quantizer fails.
        """
        ready = prepared(model)
        nodes = chosen_nodes(ready, _OPS, self.keep)
        if not nodes:
            convolutions = len(weighted_nodes(ready, frozenset({"Conv"})))
            reason = f"; its {convolutions} Conv would become ConvInteger, 4-6 times slower" if convolutions else ""
            raise PassFailed(f"no MatMul or Gemm has a constant weight{reason}")
        note = f"{'7' if reduced_range(context.host) else '8'}-bit weights, per channel"
        note += kept_note(ready, _OPS, self.keep)
        quantized = self._quantize(ready, nodes, context)
        sort_nodes(quantized)
        quantized.ir_version = model.ir_version
        settle(quantized, model)
        count = sum(node.op_type == "MatMulInteger" for node in quantized.graph.node)
        if count == 0:
            raise PassFailed("onnxruntime's quantizer left every MatMul and Gemm in FP32")
        options = int8_options(context.host)
        return PassResult(quantized, changed=True, counts={"quantized": count}, note=note, options=options)

    def _quantize(self, ready: onnx.ModelProto, nodes: list[onnx.NodeProto], context: PassContext) -> onnx.ModelProto:
        # A Gemm is a MatMul of this name by the time that the quantizer looks for it.
        names = [name for node in nodes for name in (node.name, f"{node.name}_MatMul")]
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            target = Path(folder) / "model.onnx"
            try:
                quantize_dynamic(
                    ready,
                    target,
                    op_types_to_quantize=sorted(_OPS),
                    nodes_to_quantize=names,
                    per_channel=True,
                    reduce_range=reduced_range(context.host),
                    weight_type=QuantType.QInt8,
                    extra_options={"MatMulConstBOnly": True, **DEFAULT_TENSOR_TYPE},
                )
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as exc:
                raise PassFailed(f"onnxruntime's quantizer fails: {exc}") from exc
            return load_model(target)
