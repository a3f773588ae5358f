"""UINT8 inputs: the original, rewritten so that clients send pictures as bytes and the model normalizes them itself.

::

    pixel (UINT8) -> [Transpose, channels last to where the model has them] -> Cast -> Mul -> Add -> what read the input

A quarter of the bytes travel over the network and to the device. It changes the signature, so it is no pass: the
rewritten model is the original of everything that follows, and is itself proven against the untouched file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from optimizers.errors import ModelError, RecipeError
from optimizers.graph import free_name, graphs_of, load_model, nodes_of, opset_of, signature_of
from optimizers.isolation import SERVING
from optimizers.passes import copy_of
from optimizers.recipe import Uint8Input
from server.golden import sqnr_db
from server.providers import CPU
from server.session import Session
from server.tensors import NUMPY_DTYPE, Array, Signature, Tensors

PROVEN_DB = 60.0
"""Least signal-to-noise ratio of the rewritten model against numpy and the untouched one: 0.1 % of the amplitude."""

LEAST_OPSET = 7
"""From here on Mul and Add broadcast as numpy does."""

_WEIGHTS_ALONE = 4  # IR version; before it, every weight had to be an input as well

_COMPUTES_IN = {  # type of the original's input -> type of the normalization
    TensorProto.FLOAT16: TensorProto.FLOAT,
    TensorProto.FLOAT: TensorProto.FLOAT,
    TensorProto.DOUBLE: TensorProto.DOUBLE,
}


def with_uint8_inputs(model: onnx.ModelProto, inputs: Mapping[str, Uint8Input]) -> onnx.ModelProto:
    """Return a copy of a model that takes some of its float inputs as UINT8 and normalizes them.

    ``y = (scale * x - mean) / std`` is computed as ``x * (scale / std) - mean / std``, in FP32, or in FP64 for an
    FP64 input.

    Args:
        model: Left unchanged.
        inputs: Input -> how it is normalized.

    Raises:
        RecipeError: If an input does not exist, is not of a float type, or has no axis of that many channels.
        ModelError: If the model's opset is below 7, or if an input is also an output.
    """
    if opset_of(model) < LEAST_OPSET:
        raise ModelError(f"uint8_inputs needs opset {LEAST_OPSET}, the model has {opset_of(model)}; convert it first")
    made = copy_of(model)
    nodes: list[onnx.NodeProto] = []
    for name, plan in inputs.items():
        nodes += _rewrite(made, name, plan)
    rest = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend([*nodes, *rest])
    return made


def normalized(array: Array, plan: Uint8Input, axes: Sequence[object], dtype: np.dtype[np.generic]) -> Array:
    """Return what the untouched model takes for pictures, computed by numpy in FP64.

    Args:
        array: UINT8, as clients send it.
        plan: How it is normalized.
        axes: Sizes of the untouched model's input; names or ``None`` where they vary.
        dtype: Of the untouched model's input.
    """
    axis = _channel_axis("", plan, axes)
    pictures = np.moveaxis(array, -1, axis) if plan.channels_last else array
    shape = (-1, *[1] * (len(axes) - 1 - axis))
    mean, std = (np.array(values, np.float64).reshape(shape) for values in (plan.mean, plan.std))
    normal: Array = ((plan.scale * pictures.astype(np.float64) - mean) / std).astype(dtype)
    return normal


def require_same(
    untouched: Path, rewritten: Path, inputs: Mapping[str, Uint8Input], samples: Sequence[Tensors]
) -> None:
    """Prove the rewritten model against the untouched one with inputs that numpy normalized.

    Args:
        untouched: The user's file.
        rewritten: The file of the result of ``with_uint8_inputs``.
        inputs: Input -> how it is normalized.
        samples: Runs, with UINT8 arrays.

    Raises:
        ModelError: If an answer differs by more than ``PROVEN_DB`` allows.
        StartupError: If one of the two does not open.
        InferenceFailed: If one of the two fails on a sample.
    """
    signature = signature_of(load_model(untouched))
    before, after = Session(untouched, CPU, SERVING), Session(rewritten, CPU, SERVING)
    try:
        for index, sample in enumerate(samples):
            expected = before.run(_as_floats(sample, inputs, signature))
            seen = sqnr_db(expected, after.run(sample))
            if seen < PROVEN_DB:
                raise ModelError(
                    f"with uint8_inputs, sample {index} is answered with {seen:.1f} dB to the original on inputs that "
                    f"numpy normalized, at least {PROVEN_DB:g} dB are required; serve this model with float inputs"
                )
    finally:
        before.close()
        after.close()


def _as_floats(sample: Tensors, inputs: Mapping[str, Uint8Input], signature: Signature) -> Tensors:
    specs = {spec.name: spec for spec in signature.inputs}
    floats = {
        name: normalized(sample[name], plan, specs[name].shape, NUMPY_DTYPE[specs[name].datatype])
        for name, plan in inputs.items()
    }
    return {**sample, **floats}


def _rewrite(model: onnx.ModelProto, name: str, plan: Uint8Input) -> list[onnx.NodeProto]:
    """Give one input its new type, let its readers read the normalized tensor; return the nodes that make that."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {value.name: value for value in model.graph.input if value.name not in weights}
    if name not in found:
        raise RecipeError(f"uint8_inputs names '{name}'; the model's inputs are {', '.join(found)}")
    kind = found[name].type.tensor_type
    axes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
    if kind.elem_type not in _COMPUTES_IN or not axes:
        seen = f"{TensorProto.DataType.Name(kind.elem_type)} {axes}"
        raise RecipeError(
            f"uint8_inputs names '{name}', which is {seen}; it must be FLOAT, FLOAT16 or DOUBLE with axes"
        )
    if any(name == value.name for graph in graphs_of(model) for value in graph.output):
        raise ModelError(f"input '{name}' is also an output, so it cannot become UINT8; leave it out of uint8_inputs")
    axis = _channel_axis(name, plan, axes)
    chain = _Chain(model, name)
    if plan.channels_last:
        others = [index for index in range(len(axes)) if index != axis]
        chain.add("Transpose", perm=[(*others, axis).index(index) for index in range(len(axes))])
    element = _COMPUTES_IN[kind.elem_type]
    chain.add("Cast", to=element)
    shape = [1] * (len(axes) - 1 - axis)
    factor = plan.scale / np.array(plan.std, np.float64)
    offset = -np.array(plan.mean, np.float64) / np.array(plan.std, np.float64)
    dtype = helper.tensor_dtype_to_np_dtype(element)
    for op_type, values, neutral in (("Mul", factor, 1), ("Add", offset, 0)):
        if np.any(values != neutral):
            chain.add(op_type, values.reshape(-1, *shape).astype(dtype))
    if element != kind.elem_type:
        chain.add("Cast", to=kind.elem_type)
    for node in nodes_of(model):
        node.input[:] = [chain.last if read == name else read for read in node.input]
    kind.elem_type = TensorProto.UINT8
    if plan.channels_last:
        kind.shape.dim.insert(len(axes) - 1, kind.shape.dim.pop(axis))
    return chain.nodes


class _Chain:
    """Nodes one after the other, from an input on; weights go into the model, nodes do not."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.last = self._input = name
        self._model = model
        self._taken = {value.name for graph in graphs_of(model) for value in (*graph.input, *graph.initializer)}
        self._taken |= {used for node in nodes_of(model) for used in (*node.output, node.name)}

    def add(self, op_type: str, weight: Array | None = None, **attributes: Any) -> None:
        """Add a node that reads the last one, and maybe a weight."""
        name = self._free(f"{self._input}/{op_type.lower()}")
        reads = [self.last]
        if weight is not None:
            reads.append(self._free(f"{name}/by"))
            graph, tensor = self._model.graph, numpy_helper.from_array(weight, reads[-1])
            graph.initializer.append(tensor)
            if self._model.ir_version < _WEIGHTS_ALONE:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        self.nodes.append(helper.make_node(op_type, reads, [name], name=name, **attributes))
        self.last = name

    def _free(self, wish: str) -> str:
        name = free_name(wish, self._taken)
        self._taken.add(name)
        return name


def _channel_axis(name: str, plan: Uint8Input, axes: Sequence[object]) -> int:
    """Return the axis of the channels; the last one where nothing depends on it.

    Raises:
        RecipeError: If no axis, or more than one, fits.
    """
    count = max(len(plan.mean), len(plan.std))
    if count == 1 and not plan.channels_last:
        return len(axes) - 1
    if plan.channel_axis is not None:
        size = axes[plan.channel_axis] if 0 < plan.channel_axis < len(axes) else 0
        if isinstance(size, int) and (size == 0 or count not in (1, size)):
            raise RecipeError(
                f"channel_axis of '{name}' is {plan.channel_axis}; its shape is {list(axes)}, and mean and std have "
                f"{count} channels"
            )
        return plan.channel_axis
    fitting = [axis for axis, size in enumerate(axes) if axis and size == count]
    if len(fitting) != 1:
        raise RecipeError(
            f"'{name}' has the shape {list(axes)}, in which {len(fitting)} axes behind the first have the {count} "
            "channels of mean and std; name one with channel_axis"
        )
    return fitting[0]
