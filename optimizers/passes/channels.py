"""Rescaling of channels: who makes and who reads a tensor, its constants, and where a division can be hidden.

For passes that divide a channel by a number where it is made and multiply it by the same number where it is read.
"""

from collections import Counter, defaultdict

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from optimizers.graph import free_name, nodes_of
from server.tensors import Array

_HOMOGENEOUS = frozenset({"Identity", "LeakyRelu", "PRelu", "Relu"})


class Scaling(msgspec.Struct, frozen=True):
    """One constant input of a node, and what to multiply it by.

    Attributes:
        node: A node of the main graph.
        index: Of the input.
        factor: Broadcasts with the constant, which takes the shape of the product.
    """

    node: onnx.NodeProto
    index: int
    factor: Array


class Wiring:
    """Who makes and who reads each tensor of the main graph.

    Args:
        model: The readers of a weight follow ``Constants.scale``; other rewiring is not noticed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        everywhere = Counter(name for node in nodes_of(model) for name in node.input)
        here = Counter(name for node in graph.node for name in node.input)
        self._fixed = {value.name for value in graph.output} | set(everywhere - here)

    def private(self, tensor: str, reads: int = 1) -> bool:
        """Whether a tensor is read so many times by nodes of the main graph, and seen by nobody else.

        Args:
            tensor: A tensor or weight; outputs of the model, and what subgraphs read, are not private.
            reads: How often; a node that reads it twice counts twice.
        """
        return tensor not in self._fixed and len(self.readers.get(tensor, ())) == reads


class Constants:
    """The FP32 initializers of a main graph; those that callers may override are left out.

    Args:
        model: ``scale`` and ``add`` edit it in place.
        wiring: Of this model.
    """

    def __init__(self, model: onnx.ModelProto, wiring: Wiring) -> None:
        given = {value.name for value in model.graph.input}
        self._graph = model.graph
        self._wiring = wiring
        self._tensors = {
            tensor.name: tensor
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in given
        }
        self._taken = {*given, *(tensor.name for tensor in model.graph.initializer)}
        for node in nodes_of(model):
            self._taken |= {node.name, *node.input, *node.output}

    def of(self, node: onnx.NodeProto, index: int) -> Array | None:
        """Return an input of a node as an array, or ``None`` where it is missing or no FP32 constant."""
        known = index < len(node.input) and node.input[index] in self._tensors
        return self.require(node, index) if known else None

    def require(self, node: onnx.NodeProto, index: int) -> Array:
        """Return an input of a node that is known to be an FP32 constant."""
        return numpy_helper.to_array(self._tensors[node.input[index]])

    def scale(self, scaling: Scaling) -> None:
        """Multiply one input of one node; a constant that others read too is copied first."""
        node, index = scaling.node, scaling.index
        name = node.input[index]
        product = (self.require(node, index) * scaling.factor).astype(np.float32)
        if self._wiring.private(name):
            self._tensors[name].CopyFrom(numpy_helper.from_array(product, name))
            return
        node.input[index] = self.add(f"{name}_of_{node.name or node.output[0]}", product)
        self._wiring.readers[name].remove(node)
        self._wiring.readers[node.input[index]].append(node)

    def add(self, wish: str, values: Array) -> str:
        """Add a constant under a name like this one, and return the name."""
        name = self.free_name(wish)
        tensor = self._graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        self._tensors[name] = tensor
        return name

    def free_name(self, wish: str) -> str:
        """Return a name like this one that nothing in the model has, and take it."""
        name = free_name(wish, self._taken)
        self._taken.add(name)
        return name


def standard(node: onnx.NodeProto) -> bool:
    """Whether the node is an operator of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def homogeneous(node: onnx.NodeProto) -> bool:
    """Whether f(s x) = s f(x) for every s > 0, element by element, with respect to the first input."""
    return standard(node) and node.op_type in _HOMOGENEOUS


def attribute_of(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


class Division:
    """Hides a division of tensors, channel by channel along their last axis, in the constants of what makes them.

    Args:
        wiring: Of the model.
        constants: Of the model; only read.
    """

    def __init__(self, wiring: Wiring, constants: Constants) -> None:
        self._wiring = wiring
        self._constants = constants

    def plan(self, tensor: str, s: Array, reads: int = 1) -> list[Scaling] | str:
        """Return the scalings that divide a tensor by s and change nothing else, or what stands in the way.

        Args:
            tensor: What to divide.
            s: ``[channels]``, positive.
            reads: How often those read it who make up for the division.
        """
        if not self._wiring.private(tensor, reads):
            return "read elsewhere"
        node = self._wiring.makers.get(tensor)
        if node is None:
            return "an input"
        if not standard(node) or tensor != node.output[0]:
            return f"behind {node.op_type}"
        if homogeneous(node):
            return self.plan(node.input[0], s)
        match node.op_type:
            case "MatMul":
                return self._weight(node, s, axis=-1)
            case "Gemm":
                return self._gemm(node, s)
            case "LayerNormalization" | "RMSNormalization":
                return self._parameters(node, s)
            case "Add" | "Sub":
                return self._sum(node, s)
            case "Mul" | "Div":
                return self._product(node, s)
        return f"behind {node.op_type}"

    def _weight(self, node: onnx.NodeProto, s: Array, axis: int) -> list[Scaling] | str:
        weight = self._constants.of(node, 1)
        if weight is None or weight.ndim < 2 or weight.shape[axis] != len(s):
            return f"behind {node.op_type}"
        if not self._wiring.private(node.input[1]):
            return "weight read elsewhere"
        return [Scaling(node, 1, 1 / s if axis == -1 else (1 / s)[:, None])]

    def _gemm(self, node: onnx.NodeProto, s: Array) -> list[Scaling] | str:
        biased = len(node.input) > 2 and node.input[2] != ""
        if biased and self._constants.of(node, 2) is None:
            return "behind Gemm"
        weight = self._weight(node, s, axis=-2 if attribute_of(node, "transB", 0) else -1)
        return weight if isinstance(weight, str) or not biased else [*weight, Scaling(node, 2, 1 / s)]

    def _parameters(self, node: onnx.NodeProto, s: Array) -> list[Scaling] | str:
        indices = [index for index in (1, 2) if index < len(node.input) and node.input[index]]
        arrays = [self._constants.of(node, index) for index in indices]
        if any(array is None or array.ndim == 0 or array.shape[-1] != len(s) for array in arrays):
            return f"behind {node.op_type}"
        return [Scaling(node, index, 1 / s) for index in indices]

    def _sum(self, node: onnx.NodeProto, s: Array) -> list[Scaling] | str:
        constant = self._constant_index(node)
        if constant is None:
            return f"behind {node.op_type}"
        rest = self.plan(node.input[1 - constant], s)
        return rest if isinstance(rest, str) else [*rest, Scaling(node, constant, 1 / s)]

    def _product(self, node: onnx.NodeProto, s: Array) -> list[Scaling] | str:
        constant = self._constant_index(node)
        divides = node.op_type == "Div"
        if constant is None:  # one factor is enough: the dividend, or either one of a product
            plans = [self.plan(name, s) for name in (node.input[:1] if divides else reversed(node.input))]
            return next((plan for plan in plans if not isinstance(plan, str)), f"behind {node.op_type}")
        values = self._constants.require(node, constant)
        if values.ndim and values.shape[-1] == len(s):
            return [Scaling(node, constant, s if divides and constant == 1 else 1 / s)]
        if divides and constant == 0:
            return "behind Div"
        # Factors that are one number stay so: onnxruntime recognizes a GELU by them.
        return self.plan(node.input[1 - constant], s)

    def _constant_index(self, node: onnx.NodeProto) -> int | None:
        found = [index for index in (0, 1) if self._constants.of(node, index) is not None]
        return found[0] if len(found) == 1 else None
