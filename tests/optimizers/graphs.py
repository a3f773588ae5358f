"""Builds small ONNX models in memory, and what passes need to run on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimizers.passes import PassContext
from server.host import HostFacts

FLOAT = TensorProto.FLOAT
NODE = helper.make_node

WITH_DOT = HostFacts("a CPU with an INT8 dot product", ("avx2", "avx512f", "avx512_vnni"), 2)
WITHOUT_DOT = HostFacts("a CPU without one", ("avx2",), 2)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list],
    outputs: dict[str, list],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """Build a model; inputs and outputs are FP32, name -> shape."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def context_of(work: Path, calibration: Sequence[dict] = (), host: HostFacts = WITH_DOT) -> PassContext:
    return PassContext(host=host, calibration=calibration, seed=0, work=work)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
