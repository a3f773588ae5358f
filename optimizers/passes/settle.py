"""After a third-party tool rewrote a model: give it back its signature, and shapes that can be trusted."""

from collections import Counter

import onnx

from optimizers.graph import op_counts


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
    try:
        inferred = onnx.shape_inference.infer_shapes(after, data_prop=True)
    except (ValueError, onnx.shape_inference.InferenceError):
        return  # larger than 2 GiB, or operators that ONNX does not know: sessions infer on their own
    after.graph.value_info.extend(inferred.graph.value_info)


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
