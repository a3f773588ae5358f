"""What a peer is asked and what it answers, as plain JSON: the peer's environment has only onnx, numpy, onnxruntime."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "QLinearConv"})


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read the request, answer it, write the answer.

    Args:
        answer: Takes ``model`` and ``data`` (paths), ``output`` (an empty folder), ``cores``, ``int8_dot`` (whether the
            CPU multiplies 8-bit integers without saturation); returns ``model`` (a path), ``session`` (name -> value,
            empty for onnxruntime's defaults) and ``notes``.
    """
    request, place = (Path(argument) for argument in sys.argv[1:])
    place.write_text(json.dumps(answer(json.loads(request.read_text(encoding="utf-8")))), encoding="utf-8")


def operators_of(model: str) -> dict[str, int]:
    """Return operator -> count of the main graph's nodes."""
    counts: dict[str, int] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def is_convolutional(model: str) -> bool:
    """Whether onnxruntime's guide says static (convolutions) or dynamic quantization (transformers, dense models)."""
    return not CONVOLUTIONS.isdisjoint(operators_of(model))


def feeds_of(model: str, data: str) -> list[dict[str, Any]]:
    """Return one feed per sample: a row of one, or the complete tensor where the input has no axis for samples."""
    graph = onnx.load(model, load_external_data=False).graph
    ranks = {entry.name: len(entry.type.tensor_type.shape.dim) for entry in graph.input}
    with np.load(data, allow_pickle=False) as arrays:
        samples = {name: arrays[name] for name in arrays.files}
    count = min(len(array) for array in samples.values())
    return [
        {name: array[i] if array.ndim > ranks[name] else array[i : i + 1] for name, array in samples.items()}
        for i in range(count)
    ]
