"""After a third-party tool rewrote a model: give it back its signature, and shapes that can be trusted."""

import logging
from collections import Counter
from collections.abc import Iterator

import onnx
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from optimizers.graph import op_counts

logger = logging.getLogger(__name__)

_LARGEST_SIZE = 2**31 - 1  # of an axis; a Slice up to here has no end
_LARGEST_READ_BYTES = 4096
"""Shape inference reads small weights, such as the target of a Reshape; of larger ones it needs the shape only."""

TOOL_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What tools of others raise on models that they do not understand."""


def settle(after: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Restore the inputs and outputs of ``before`` in ``after``, and infer the shapes in between anew.

    Tools invent names for axes that have none, and some give one name to unrelated axes. The signature is a promise to
    callers, and onnxruntime reuses a buffer where two shapes have the same names, so neither may stay.

    Args:
        after: The rewritten model; edited in place. It must have the outputs of ``before``.
        before: The model that the tool was given.
    """
    _restore(after, before)
    del after.graph.value_info[:]
    light = _without_weights(after)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except (ValueError, onnx.shape_inference.InferenceError):
        return  # the types in the model contradict each other somewhere: sessions infer on their own
    after.graph.value_info.extend(inferred.graph.value_info)
    guesses = any(map(_squeezes_unseen, after.graph.node))
    if any(_unknown(after)) and not guesses and _sorted(after.graph):
        after.graph.value_info.extend(_symbolic(light, set(_unknown(after))))


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose large weights have no content, so that inference takes models beyond 2 GiB, and is quick."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    for field in ("node", "input", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _LARGEST_READ_BYTES:
            graph.initializer.append(tensor)
        else:
            stub = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            stub.data_location = onnx.TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="left-out")
    return light


def _unknown(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the names of values in the main graph whose number of axes is not known."""
    known = {value.name for value in model.graph.value_info if value.type.tensor_type.HasField("shape")}
    known.update(value.name for value in model.graph.output)
    for node in model.graph.node:
        yield from (name for name in node.output if name and name not in known)


def _squeezes_unseen(node: onnx.NodeProto) -> bool:
    """Whether a node drops every axis of size 1; symbolic inference takes it that variable axes never have size 1."""
    return node.op_type == "Squeeze" and len(node.input) == 1 and not node.attribute


def _sorted(graph: onnx.GraphProto) -> bool:
    """Whether every node reads only what is there before it; symbolic inference takes nothing else."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    for node in graph.node:
        if not known.issuperset(node.input):
            return False
        known.update(node.output)
    return True


def _symbolic(light: onnx.ModelProto, wanted: set[str]) -> list[onnx.ValueInfoProto]:
    """Return what onnxruntime's symbolic inference finds out about values; it knows onnxruntime's own operators too.

    Only sizes that are numbers are taken: its names for other axes may coincide where the sizes do not.
    """
    inference = SymbolicShapeInference(_LARGEST_SIZE, auto_merge=False, guess_output_rank=False, verbose=0)
    try:
        # Its entry point would write a file into the working folder when a shape stays unknown.
        inference._preprocess(light)
        while inference.run_:
            inference._infer_impl()
    except TOOL_FAILURES as exc:
        logger.debug("symbolic shape inference fails: %s", exc)
        return []
    found = [
        value
        for value in inference.out_mp_.graph.value_info
        if value.name in wanted and value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape")
    ]
    for value in found:
        for size in value.type.tensor_type.shape.dim:
            size.ClearField("dim_param")
    return found


def removed(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, int]:
    """Return operator -> number of nodes gone, new ones as ``+Op``; nothing unless ``after`` has fewer nodes."""
    old, new = Counter(op_counts(before)), Counter(op_counts(after))
    if new.total() >= old.total():
        return {}
    return dict(old - new) | {f"+{op}": count for op, count in (new - old).items()}


def _restore(after: onnx.ModelProto, before: onnx.ModelProto) -> None:
    weights = {tensor.name for tensor in after.graph.initializer}
    del after.graph.input[:]
    after.graph.input.extend(value for value in before.graph.input if value.name not in weights)
    del after.graph.output[:]
    after.graph.output.extend(before.graph.output)
