"""Weight-only quantization: matrices as blocks of 4- or 8-bit codes, multiplied by onnxruntime's MatMulNBits."""

from collections import Counter
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import free_name, nodes_of, weight_bytes
from optimizers.passes import Need, PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.int8 import weighted_nodes
from server.tensors import Array

_DOMAIN = "com.microsoft"
_BLOCK_SIZES = (16, 32, 64, 128, 256)


class WeightOnly(msgspec.Struct, frozen=True):
    """Replace MatMul and Gemm with constant weights by MatMulNBits; a Gemm keeps its bias as an Add.

    The codes are symmetric. onnxruntime's kernel for codes with zero points is wrong on AVX2 for one row (its issue
    29853), and zero points gain little on weights. The INT8 products of this operator do not saturate on CPUs without a
    dot product, unlike those of ``MatMulInteger``.

    Attributes:
        bits: Of one weight.
        block_size: Weights along the summed axis that share a scale: 16, 32, 64, 128 or 256. Larger blocks are faster
            and less exact.
        accuracy_level: 4 multiplies in INT8 and quantizes the activations block by block; 1 multiplies in FP32, which
            with 8 bits is about 20 times slower than FP32 weights.
        keep: Names of nodes that stay in float.
    """

    bits: Literal[4, 8] = 8
    block_size: int = 32
    accuracy_level: int = 4
    keep: tuple[str, ...] = ()

    @property
    def spec(self) -> PassSpec:
        """Declare the pass."""
        needs: frozenset[Need] = frozenset({"host"})
        return PassSpec("weight-only", 1, "lossy", produces="weight-only", needs=needs, target="cpu")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If the block size is not supported, if ``keep`` names a node that is not there, or if no matrix
                can be quantized.
        """
        if self.block_size not in _BLOCK_SIZES:
            raise PassFailed(f"blocks of {self.block_size} weights are not supported; take one of {_BLOCK_SIZES}")
        unknown = sorted(set(self.keep) - {node.name for node in model.graph.node})
        if unknown:
            raise PassFailed(f"keep names nodes that the model does not have: {', '.join(unknown)}")
        found = [node for node in weighted_nodes(model, frozenset({"MatMul", "Gemm"})) if node.name not in self.keep]
        draft = _Draft(copy_of(model), self)
        quantized = {node.output[0] for node in found if draft.suits(node)}
        if not quantized:
            raise PassFailed(
                f"none of {len(found)} MatMul and Gemm with constant weights can have {self.bits}-bit blocks"
            )
        before = weight_bytes(model)
        result = draft.finished(quantized)
        counts = {"quantized": len(quantized), "left_in_float": len(found) - len(quantized) + len(self.keep)}
        sizes = f"{before / 1e6:.2f} -> {weight_bytes(result) / 1e6:.2f} MB"
        note = f"{self.bits}-bit weights in blocks of {self.block_size}: {sizes}"
        return PassResult(result, changed=True, counts=counts, note=note)


def quantize_blocks(weight: Array, bits: int, block_size: int) -> tuple[Array, Array]:
    """Round a matrix to symmetric codes, block by block along its first axis.

    ``w ~ scale * (code - 2^(bits-1))``. The scale maps the element of largest magnitude, with its sign, to the lowest
    code, so that all codes are used: ``scale = -w_max / 2^(bits-1)``.

    Args:
        weight: FP32 [K, N], finite.
        bits: 4 or 8.
        block_size: Even.

    Returns:
        Codes as MatMulNBits reads them, UINT8 [N, ceil(K / block_size), block_size * bits / 8], with two 4-bit codes in
        a byte, the first one in the low half; and scales FP32 [N, ceil(K / block_size)]. Blocks are padded with zeros.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    depth, columns = weight.shape
    count, half = -(-depth // block_size), 1 << (bits - 1)
    padded = np.zeros((columns, count * block_size), np.float32)
    padded[:, :depth] = weight.T
    blocks = padded.reshape(columns, count, block_size)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scales = extreme / np.float32(-half)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(blocks * inverse) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0]


class _Draft:
    """A graph whose matrices are being replaced."""

    def __init__(self, model: onnx.ModelProto, settings: WeightOnly) -> None:
        self._model = model
        self._settings = settings
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._taken = {*self._weights, *(name for node in nodes_of(model) for name in (*node.input, *node.output))}
        self._packed: dict[tuple[str, bool, float], tuple[str, str]] = {}
        values = (*model.graph.input, *model.graph.value_info)
        self._ranks = {
            v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")
        }

    def suits(self, node: onnx.NodeProto) -> bool:
        """Whether MatMulNBits can take the place of a node, and whether its weight becomes smaller."""
        weight, attributes = self._weights[node.input[1]], _attributes(node)
        if len(weight.dims) != 2 or self._ranks.get(node.input[0], 2) < 2 or attributes.get("transA"):
            return False
        if attributes.get("beta", 1.0) != 1.0 and len(node.input) > 2 and node.input[2] not in self._weights:
            return False
        depth = weight.dims[1 if attributes.get("transB") else 0]
        blocks = -(-depth // self._settings.block_size)
        bytes_per_column = blocks * (self._settings.block_size * self._settings.bits // 8 + 4)
        return bytes_per_column < 4 * depth and bool(np.isfinite(numpy_helper.to_array(weight)).all())

    def finished(self, quantized: set[str]) -> onnx.ModelProto:
        """Replace the nodes with these outputs, and drop the weights that nobody reads any more."""
        graph = self._model.graph
        nodes = [n for node in graph.node for n in (self._replaced(node) if node.output[0] in quantized else [node])]
        fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(fresh)
        readers = Counter(name for node in nodes_of(self._model) for name in node.input)
        readers.update(value.name for value in graph.output)
        for name, _, _ in self._packed:
            if not readers[name] and self._weights[name] in graph.initializer:
                graph.initializer.remove(self._weights[name])
        if _DOMAIN not in {entry.domain for entry in self._model.opset_import}:
            self._model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
        return self._model

    def _replaced(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        attributes = _attributes(node)
        transposed, alpha = bool(attributes.get("transB")), float(attributes.get("alpha", 1.0))
        codes, scales = self._pack(node.input[1], transposed, alpha)
        rows, columns = self._weights[node.input[1]].dims
        depth, width = (columns, rows) if transposed else (rows, columns)
        bias = node.input[2] if len(node.input) > 2 else ""
        product = self._free(f"{node.output[0]}_product") if bias else node.output[0]
        settings = {name: getattr(self._settings, name) for name in ("bits", "block_size", "accuracy_level")}
        inputs = [node.input[0], codes, scales]
        made = helper.make_node(
            "MatMulNBits", inputs, [product], name=node.name, domain=_DOMAIN, K=depth, N=width, **settings
        )
        if not bias:
            return [made]
        addend = self._scaled(bias, float(attributes.get("beta", 1.0)))
        name = f"{node.name}_bias" if node.name else ""
        return [made, helper.make_node("Add", [product, addend], [node.output[0]], name=name)]

    def _pack(self, name: str, transposed: bool, alpha: float) -> tuple[str, str]:
        """Return the names of the codes and scales of a weight; nodes that share it share them."""
        key = (name, transposed, alpha)
        if key not in self._packed:
            values = numpy_helper.to_array(self._weights[name])
            values = values.T if transposed else values
            arrays = quantize_blocks(values, self._settings.bits, self._settings.block_size)
            suffixes = (f"q{self._settings.bits}", "scales")
            codes, scales = (self._free(f"{name}_{suffix}") for suffix in suffixes)
            self._add(arrays[0], codes)
            self._add((arrays[1] * np.float32(alpha)).astype(np.float32), scales)
            self._packed[key] = codes, scales
        return self._packed[key]

    def _scaled(self, bias: str, beta: float) -> str:
        if beta == 1.0:
            return bias
        name = self._free(f"{bias}_scaled")
        self._add(numpy_helper.to_array(self._weights[bias]) * np.float32(beta), name)
        return name

    def _add(self, values: Array, name: str) -> None:
        self._model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def _free(self, wish: str) -> str:
        name = free_name(wish, self._taken)
        self._taken.add(name)
        return name


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
