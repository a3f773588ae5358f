"""The least time that a device could take: its measured ceilings, and what a model asks of them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from server.artifact import SessionOptions
from server.providers import CPU, Device, open_ort_session
from server.tensors import Array

_DTYPES = {"fp32": TensorProto.FLOAT, "tf32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
_NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class Work(msgspec.Struct, frozen=True):
    """What one row of a model asks for.

    Attributes:
        flops: Multiplications and additions in matrix products and convolutions.
        weight_bytes: Of all weights, in FP32; read once per batch.
        row_bytes: Of the inputs and outputs.
    """

    flops: float
    weight_bytes: int
    row_bytes: int


class Ceilings(msgspec.Struct, frozen=True):
    """What the device reaches in the run.

    Attributes:
        flops_per_s: ``fp32``, ``tf32`` or ``fp16`` -> operations per second of a large matrix product.
        bytes_per_s: Read and written by an element-wise operator on a large tensor.
    """

    flops_per_s: dict[str, float]
    bytes_per_s: float

    def floor_s(self, work: Work, rows: int, precision: str) -> float:
        """Return the seconds that a batch needs at least, if everything between its weights and answers were fused."""
        size = 0.5 if precision == "fp16" else 1.0
        moved = size * work.weight_bytes + rows * work.row_bytes
        return max(rows * work.flops / self.flops_per_s[precision], moved / self.bytes_per_s)


def work_of(model: Path, row: Mapping[str, Array]) -> Work:
    """Count what one row asks for, by running the model on the CPU with the sizes of its matrix products as outputs."""
    graph = onnx.load(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    weight_bytes = sum(tensor.ByteSize() for tensor in graph.graph.initializer)
    heavy = [node for node in graph.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    needed = {name for node in heavy for name in (*node.input[:2], node.output[0])} - set(weights) - set(row)
    results = [output.name for output in graph.graph.output]
    extra = sorted(needed - set(results))
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    # Without optimization every tensor of the file is still there.
    session = open_ort_session(graph.SerializeToString(), CPU, SessionOptions(graph_level="disable"))
    found = dict(zip([*results, *extra], session.run([*results, *extra], dict(row)), strict=True))
    shapes = {**weights, **{name: array.shape for name, array in {**found, **row}.items()}}
    flops = sum(_flops(node, shapes) for node in heavy)
    moved = sum(array.nbytes for array in row.values()) + sum(found[name].nbytes for name in results)
    return Work(float(flops), weight_bytes, moved)


def _flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    first, second, made = shapes[node.input[0]], shapes[node.input[1]], int(np.prod(shapes[node.output[0]]))
    if node.op_type == "Conv":
        return 2 * made * int(np.prod(second[1:]))
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * made * int(first[-2] if transposed else first[-1])


def measure_ceilings(device: Device, seconds: float = 1.0) -> Ceilings:
    """Measure a large matrix product in each precision, and an element-wise operator on a large tensor."""
    on_gpu = device.kind != "cpu"
    side, elements = (8192, 1 << 28) if on_gpu else (1024, 1 << 24)
    flops_per_s = {}
    for precision, kind in _DTYPES.items():
        if on_gpu or precision == "fp32":
            options = {"use_tf32": "1"} if precision == "tf32" else {}
            x = (np.random.default_rng(0).standard_normal((side, side)) / np.sqrt(side)).astype(_NUMPY[kind])
            session = open_ort_session(_product(x, kind), device, SessionOptions(provider_options=options))
            run = bound_run(session, device, {"x": x})
            flops_per_s[precision] = 2 * side**3 / median_s(run, seconds)
    session = open_ort_session(_negation(elements), device, SessionOptions())
    run = bound_run(session, device, {"x": np.ones(elements, np.float32)})
    return Ceilings(flops_per_s, 8 * elements / median_s(run, seconds))


def bound_run(
    session: "onnxruntime.InferenceSession", device: Device, inputs: Mapping[str, Array]
) -> Callable[[], object]:
    """Return a call that runs a session with its inputs and outputs in the device's memory, without any copy."""
    place = "cpu" if device.kind == "cpu" else "cuda"
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, place, device.index))
    for output in session.get_outputs():
        binding.bind_output(output.name, place, device.index)
    session.run_with_iobinding(binding)
    fixed = zip(session.get_outputs(), binding.get_outputs(), strict=True)
    for output, value in list(fixed):  # the same memory from now on, as CUDA graphs require
        binding.bind_ortvalue_output(output.name, value)
    return lambda: session.run_with_iobinding(binding)


def median_s(run: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call that is repeated for so many seconds, after three calls that do not count."""
    for _ in range(3):
        run()
    times: list[float] = []
    until_s = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until_s:
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return float(np.median(times))


def _product(weights: Array, kind: int) -> bytes:
    # The weights are part of the model: so a CPU provider arranges them once, as it does those of every model.
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _serialized(node, kind, weights.shape, numpy_helper.from_array(weights, "w"))


def _negation(elements: int) -> bytes:
    return _serialized(helper.make_node("Neg", ["x"], ["y"]), TensorProto.FLOAT, (elements,))


def _serialized(node: onnx.NodeProto, kind: int, shape: tuple[int, ...], *weights: onnx.TensorProto) -> bytes:
    made = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = helper.make_graph([node], node.op_type, made[:1], made[1:], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
