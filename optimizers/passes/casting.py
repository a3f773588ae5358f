"""Casting: the graph in which all nodes but some compute in a 16-bit float format."""

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

from optimizers.graph import free_name, opset_of
from optimizers.passes import copy_of
from optimizers.passes.settle import settle

ANY_FLOAT = frozenset({"Shape", "Size"})
"""Operators that never look at the values of their input."""


class Precision(msgspec.Struct, frozen=True):
    """A 16-bit float format.

    Attributes:
        name: As it is written in messages.
        onnx_name: As ONNX writes it in type strings.
        element: ONNX's element type.
        dtype: numpy's, which rounds to nearest, ties to even.
        largest: Largest finite value.
        smallest: Smallest value with all bits of the mantissa.
        exact_terms: So many equal terms can be added one by one; the next one is rounded away. 2 to the bits of the
            mantissa.
    """

    name: str
    onnx_name: str
    element: int
    dtype: Any
    largest: float
    smallest: float
    exact_terms: int


FP16 = Precision("FP16", "float16", TensorProto.FLOAT16, np.float16, 65504.0, 2.0**-14, 2**11)
_BF16_LARGEST = 2.0**127 * (2 - 2.0**-7)
BF16 = Precision("BF16", "bfloat16", TensorProto.BFLOAT16, ml_dtypes.bfloat16, _BF16_LARGEST, 2.0**-126, 2**8)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return name -> element type of the tensors of the main graph, as far as it is known; weights included."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    known = {v.name: v.type.tensor_type.elem_type for v in values if v.type.HasField("tensor_type")}
    return known | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def narrow_inputs(node: onnx.NodeProto, types: Mapping[str, int], opset: int, precision: Precision) -> set[int]:
    """Return the positions of the FP32 inputs that ONNX lets have a 16-bit format, e.g. not the scales of Resize."""
    schema = _schema(node, opset)
    if schema is None or not schema.inputs:
        return set()
    formal, allowed, last = schema.inputs, _parameters(schema, precision), len(schema.inputs) - 1
    floats = (index for index, name in enumerate(node.input) if types.get(name) == TensorProto.FLOAT)
    return {index for index in floats if formal[min(index, last)].type_str in allowed}


def takes(node: onnx.NodeProto, types: Mapping[str, int], opset: int, precision: Precision) -> bool:
    """Whether a node can read and write a 16-bit format instead of FP32.

    Args:
        node: A node without subgraphs.
        types: From ``element_types``.
        opset: Of the default domain.
        precision: The format.
    """
    if node.op_type in DEFAULT_OP_BLOCK_LIST or any(
        name and not types.get(name) for name in (*node.input, *node.output)
    ):
        return False
    schema = _schema(node, opset)
    if schema is None:
        return False
    narrow = narrow_inputs(node, types, opset, precision)
    follow = {schema.inputs[min(index, len(schema.inputs) - 1)].type_str for index in narrow}
    if node.op_type == "Cast":
        follow |= {schema.outputs[0].type_str} & _parameters(schema, precision)
    floats = [index for index, name in enumerate(node.output) if types.get(name) == TensorProto.FLOAT]
    written = {schema.outputs[min(index, len(schema.outputs) - 1)].type_str for index in floats}
    return written <= follow and bool(narrow or written or node.op_type in ANY_FLOAT)


def convert(
    model: onnx.ModelProto, kept: Collection[int], types: Mapping[str, int], precision: Precision
) -> onnx.ModelProto:
    """Return a copy in which all nodes but some compute in a 16-bit format; tensors between two such stay in it.

    Values go from one FP32 node to the next as FP32, never through the narrow format. A weight that only converted
    nodes read is converted under its name; one that both kinds read is there twice.

    Args:
        model: Left unchanged; without control flow.
        kept: Indices of the nodes that stay FP32; the others must be such that ``takes`` holds.
        types: From ``element_types``.
        precision: The format.
    """
    nodes, opset = model.graph.node, opset_of(model)
    narrow = [set() if i in kept else narrow_inputs(node, types, opset, precision) for i, node in enumerate(nodes)]
    reads = ((name, pos in narrow[i]) for i, node in enumerate(nodes) for pos, name in enumerate(node.input))
    wide = {name for name, is_narrow in reads if not is_narrow}
    draft = _Draft(copy_of(model), types, precision, wide)
    for index, node in enumerate(list(draft.model.graph.node)):
        for position, name in enumerate(node.input):
            if types.get(name) == TensorProto.FLOAT and node.op_type not in ANY_FLOAT:
                node.input[position] = draft.version(name, narrow=position in narrow[index])
        draft.add(node, narrow=index not in kept)
    return draft.finished(model)


def _schema(node: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, max_inclusive_version=opset):
        return None
    return onnx.defs.get_schema(node.op_type, opset)


def _parameters(schema: onnx.defs.OpSchema, precision: Precision) -> set[str]:
    wanted = f"tensor({precision.onnx_name})"
    return {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}


class _Draft:
    """A graph under conversion: it knows in which formats each tensor exists so far."""

    def __init__(
        self, model: onnx.ModelProto, types: Mapping[str, int], precision: Precision, read_wide: Collection[str]
    ) -> None:
        self.model = model
        self._types = types
        self._precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._outputs = {value.name for value in model.graph.output}
        self._stay_wide = {*read_wide, *self._outputs}
        self._wide = {name: name for name, element in types.items() if element == TensorProto.FLOAT}
        self._narrow: dict[str, str] = {}
        self._taken = {*types, *(name for node in model.graph.node for name in node.output)}

    def version(self, name: str, *, narrow: bool) -> str:
        """Return the name under which an FP32 tensor of the input model exists in a format; cast it if it does not."""
        known, other = (self._narrow, self._wide) if narrow else (self._wide, self._narrow)
        if name not in known and name in self._weights:
            known[name] = self._narrow_weight(name)
        elif name not in known:
            known[name] = self._free(f"{name}_{self._precision.name.lower() if narrow else 'fp32'}")
            self._cast(other[name], known[name], self._precision.element if narrow else TensorProto.FLOAT)
        return known[name]

    def add(self, node: onnx.NodeProto, *, narrow: bool) -> None:
        """Add a node whose inputs are already right, and note in which format its outputs are."""
        self._nodes.append(node)
        for attribute in node.attribute:
            if narrow and node.op_type == "Cast" and (attribute.name, attribute.i) == ("to", TensorProto.FLOAT):
                attribute.i = self._precision.element
        for position, name in enumerate(node.output):
            if not narrow or self._types.get(name) != TensorProto.FLOAT:
                continue
            if name in self._outputs:  # callers get FP32 under this name
                node.output[position] = self._free(f"{name}_{self._precision.name.lower()}")
                self._cast(node.output[position], name, TensorProto.FLOAT)
            else:
                del self._wide[name]
            self._narrow[name] = node.output[position]

    def finished(self, before: onnx.ModelProto) -> onnx.ModelProto:
        """Put the nodes in, and settle the shapes."""
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        settle(self.model, before)
        return self.model

    def _narrow_weight(self, name: str) -> str:
        values = numpy_helper.to_array(self._weights[name]).astype(self._precision.dtype)
        if name in self._stay_wide:
            twin = self._free(f"{name}_{self._precision.name.lower()}")
            self.model.graph.initializer.append(numpy_helper.from_array(values, twin))
            return twin
        self._weights[name].CopyFrom(numpy_helper.from_array(values, name))
        return name

    def _cast(self, source: str, target: str, element: int) -> None:
        name = self._free(f"{target}_cast")
        self._nodes.append(helper.make_node("Cast", [source], [target], name=name, to=element))

    def _free(self, wish: str) -> str:
        name = free_name(wish, self._taken)
        self._taken.add(name)
        return name
