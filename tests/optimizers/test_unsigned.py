"""UINT8 quantization is found in every form that ONNX has for it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizers.unsigned import unsigned_nodes
from tests.optimizers.graphs import NODE

SCALE = numpy_helper.from_array(np.array(0.1, np.float32), "scale")


def model_of(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    weights = [SCALE, *(numpy_helper.from_array(array, name) for name, array in constants.items())]
    return helper.make_model(helper.make_graph(list(nodes), "g", ends[:1], ends[1:], weights))


def pair(*zero: str, **attributes: int) -> list[onnx.NodeProto]:
    return [
        NODE("QuantizeLinear", ["x", "scale", *zero], ["q"], name="Q", **attributes),
        NODE("DequantizeLinear", ["q", "scale", *zero], ["y"]),
    ]


@pytest.mark.parametrize(("dtype", "found"), [(np.uint8, ("Q", "y")), (np.int8, ()), (np.int16, ())])
def test_zero_point_says_the_type(dtype: type, found: tuple[str, ...]):
    zero = np.array(0, dtype)
    assert unsigned_nodes(model_of(*pair("zero"), zero=zero)) == found
    constant = NODE("Constant", [], ["zero"], value=numpy_helper.from_array(zero))
    assert unsigned_nodes(model_of(constant, *pair("zero"))) == found


def test_without_a_zero_point_the_type_is_uint8_unless_it_is_asked_for():
    assert unsigned_nodes(model_of(*pair())) == ("Q",)
    assert unsigned_nodes(model_of(*pair(""))) == ("Q",)


@pytest.mark.parametrize(("kind", "found"), [(TensorProto.UINT8, ("Q",)), (TensorProto.INT8, ())])
def test_asked_type_counts(kind: int, found: tuple[str, ...]):
    quantize, dequantize = pair()
    quantize.attribute.append(helper.make_attribute("output_dtype", kind))
    assert unsigned_nodes(model_of(quantize, dequantize)) == found


@pytest.mark.parametrize(("dtype", "found"), [(np.uint8, ("y",)), (np.int8, ())])
def test_weights_without_a_zero_point_have_their_own_type(dtype: type, found: tuple[str, ...]):
    node = NODE("DequantizeLinear", ["w", "scale"], ["y"])
    assert unsigned_nodes(model_of(node, w=np.zeros(4, dtype))) == found
