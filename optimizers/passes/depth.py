"""How deep a node sums, and how large the sum can get on the way: what half precision endures badly."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from server.tensors import Array

Shape = tuple[int | None, ...]
"""Sizes of a tensor's axes; ``None`` where one is not known."""


class Reduction(msgspec.Struct, frozen=True):
    """What one node adds up for each element of its output.

    Attributes:
        depth: How many terms; 0 when the shapes do not tell.
        largest_sum: No partial sum exceeds this for the observed values; 0 when nothing was observed.
        of_products: Whether the terms are products of two operands. Matrix units of GPUs add those up in FP32 unless
            they are told not to.
    """

    depth: int
    largest_sum: float
    of_products: bool = False


class Observed(msgspec.Struct, frozen=True):
    """What is known about the tensors of a model.

    Attributes:
        shapes: Name -> shape.
        magnitudes: Name -> largest absolute value, of weights and of tensors seen on calibration data.
        weights: Name -> constant tensor.
    """

    shapes: Mapping[str, Shape]
    magnitudes: Mapping[str, float]
    weights: Mapping[str, onnx.TensorProto]

    def constant(self, name: str) -> Array | None:
        """Return the value of a constant tensor."""
        return numpy_helper.to_array(self.weights[name]) if name in self.weights else None

    def magnitude(self, name: str) -> float:
        """Return the largest absolute value of a tensor, 0 when it is not known."""
        return self.magnitudes.get(name, 0.0)


def reduction_of(node: onnx.NodeProto, observed: Observed) -> Reduction | None:
    """Return what a node adds up, or ``None`` for nodes that add nothing up or that are not known here.

    With ``x`` the first operand and depth ``D``, the largest partial sum is

    - ``max|x| * max_j sum_k |w_kj|`` for products with a constant weight (Hoelder), ``D max|a| max|b|`` for others;
    - ``D max|x|`` for sums and means, which are divided last, ``D max|x|^2`` for squares;
    - ``D`` for Softmax, whose terms are at most 1 after the maximum was subtracted.
    """
    find = _FINDERS.get(node.op_type)
    return find(node, observed) if find and node.domain in ("", "ai.onnx") else None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _size(shape: Shape | None, axes: list[int]) -> int:
    """Return the number of elements along some axes, 0 when the shape or one of them is not known."""
    if shape is None or any(axis >= len(shape) or axis < -len(shape) for axis in axes):
        return 0
    return math.prod(shape[axis] or 0 for axis in axes)


def _matmul(node: onnx.NodeProto, observed: Observed) -> Reduction:
    attributes = _attributes(node)
    a, b = node.input[:2]
    depth = _size(observed.shapes.get(a), [-2 if attributes.get("transA") else -1])
    depth = depth or _size(observed.shapes.get(b), [-1 if attributes.get("transB") else -2])
    weight = observed.constant(b)
    if weight is None or weight.ndim < 2:
        return Reduction(depth, depth * observed.magnitude(a) * observed.magnitude(b), of_products=True)
    along = np.abs(weight).sum(axis=-1 if attributes.get("transB") else -2)
    return Reduction(depth, observed.magnitude(a) * float(along.max(initial=0.0)), of_products=True)


def _convolution(node: onnx.NodeProto, observed: Observed) -> Reduction:
    x, w = node.input[:2]
    kernel = observed.shapes.get(w) or ()
    depth = _size(kernel, list(range(1, len(kernel))))
    weight = observed.constant(w)
    if weight is None or weight.ndim < 3:
        return Reduction(depth, depth * observed.magnitude(x) * observed.magnitude(w), of_products=True)
    along = np.abs(weight).sum(axis=tuple(range(1, weight.ndim)))
    return Reduction(depth, observed.magnitude(x) * float(along.max(initial=0.0)), of_products=True)


def _reduced_axes(node: onnx.NodeProto, observed: Observed) -> list[int]:
    rank = len(observed.shapes.get(node.input[0]) or ())
    given = _attributes(node).get("axes")
    if len(node.input) > 1 and node.input[1]:
        constant = observed.constant(node.input[1])
        given = None if constant is None else constant.reshape(-1).tolist()
    return [int(axis) for axis in given] if given else list(range(rank))


def _summed(node: onnx.NodeProto, observed: Observed, axes: list[int], power: int) -> Reduction:
    depth = _size(observed.shapes.get(node.input[0]), axes) if axes else 0
    return Reduction(depth, depth * observed.magnitude(node.input[0]) ** power)


def _reduce(power: int) -> Callable[[onnx.NodeProto, Observed], Reduction]:
    return lambda node, observed: _summed(node, observed, _reduced_axes(node, observed), power)


def _pool(node: onnx.NodeProto, observed: Observed) -> Reduction:
    kernel = _attributes(node).get("kernel_shape")
    depth = math.prod(kernel) if kernel else _size(observed.shapes.get(node.input[0]), _behind(node, observed, 2))
    return Reduction(depth, depth * observed.magnitude(node.input[0]))


def _behind(node: onnx.NodeProto, observed: Observed, first: int) -> list[int]:
    rank = len(observed.shapes.get(node.input[0]) or ())
    return list(range(first if first >= 0 else max(rank + first, 0), rank))


def _softmax(node: onnx.NodeProto, observed: Observed) -> Reduction:
    depth = _size(observed.shapes.get(node.input[0]), [_attributes(node).get("axis", -1)])
    return Reduction(depth, float(depth))


def _norm_behind(default: int) -> Callable[[onnx.NodeProto, Observed], Reduction]:
    def find(node: onnx.NodeProto, observed: Observed) -> Reduction:
        return _summed(node, observed, _behind(node, observed, _attributes(node).get("axis", default)), 2)

    return find


def _norm_along(node: onnx.NodeProto, observed: Observed) -> Reduction:
    return _summed(node, observed, [_attributes(node).get("axis", -1)], 2)


_FINDERS: dict[str, Callable[[onnx.NodeProto, Observed], Reduction]] = {
    "MatMul": _matmul,
    "Gemm": _matmul,
    "Conv": _convolution,
    "ReduceSum": _reduce(1),
    "ReduceMean": _reduce(1),
    "ReduceL1": _reduce(1),
    "ReduceL2": _reduce(2),
    "ReduceSumSquare": _reduce(2),
    "GlobalAveragePool": _pool,
    "AveragePool": _pool,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNormalization": _norm_behind(-1),
    "InstanceNormalization": _norm_behind(2),
    "LpNormalization": _norm_along,
}
