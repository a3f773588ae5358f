"""UINT8 quantization, which TensorRT's parser takes for INT8 without an error where the zero point is 0."""

from collections.abc import Iterator

import onnx

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def unsigned_nodes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the QuantizeLinear and DequantizeLinear nodes of the main graph whose integers are UINT8.

    Args:
        model: May lack its external weights.

    Returns:
        The nodes' names, or their first outputs where they have none.

    Source:
        ONNX operators QuantizeLinear and DequantizeLinear: the zero point has the type; without one, QuantizeLinear
        goes by ``output_dtype``, and without that it gives UINT8.
    """
    types = dict(_types(model.graph))
    return tuple(
        node.name or node.output[0]
        for node in model.graph.node
        if node.op_type in (_QUANTIZE, _DEQUANTIZE) and _integers(node, types) == onnx.TensorProto.UINT8
    )


def _types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], part.t.data_type) for part in node.attribute if part.name == "value")


def _integers(node: onnx.NodeProto, types: dict[str, int]) -> int | None:
    """Return the ONNX type of the quantized side; nothing where only another node says it."""
    if len(node.input) > 2 and node.input[2]:
        return types.get(node.input[2])
    if node.op_type == _DEQUANTIZE:
        return types.get(node.input[0])
    asked = next((part.i for part in node.attribute if part.name == "output_dtype"), 0)
    return asked or onnx.TensorProto.UINT8
