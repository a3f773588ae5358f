"""An ONNX graph written from top to bottom: weights and operators get their names as they come."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

OPSET, IR = 17, 8


class GraphWriter:
    """Collects nodes and weights; every method returns the name of the tensor that it made."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}

    def weight(self, array: Array, name: str = "") -> str:
        """Add an initializer; without a name, a constant of the graph."""
        name = name or f"constant_{len(self._weights)}"
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        """Add an INT64 constant of shape [len(values)]."""
        return self.weight(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Add an FP32 constant of rank 0."""
        return self.weight(np.array(value, np.float32))

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator with one output."""
        output = output or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}_node", **attributes))
        return output

    def save(
        self, path: Path, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> None:
        """Check the graph and write it as one file."""
        graph = helper.make_graph(self._nodes, name, inputs, outputs, list(self._weights.values()))
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="slipstream-quickstart")
        onnx.checker.check_model(model)
        onnx.save(model, path)
