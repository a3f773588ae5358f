"""Cutting a model into pipeline stages: where it can be cut, what crosses a cut, and which cuts balance the stages.

A cut between two nodes of the graph's order is one that any set of tensors may cross; the fewer bytes, the better. The
best cuts are found by dynamic programming over measured times, as in the partitioner of PipeDream (Narayanan et al.,
2019), without replicated stages: the slowest stage bounds the throughput of a pipeline.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import onnx
from onnx import helper

from optimizers.errors import ModelError
from optimizers.graph import copy_fields
from server.tensors import DATATYPE_OF_NUMPY

MOST_CUTS = 24
_UNKNOWN_SIZE = 64
"""Of a variable axis other than the first, where the bytes that cross are estimated: the tokens of a short text."""


class Cut(msgspec.Struct, frozen=True):
    """A place between two nodes.

    Attributes:
        after: Nodes before it.
        crossing: Tensors that nodes behind it need of those before it.
        crossing_bytes: Their size for one row.
        weight_bytes: Size of the weights that nodes before it use.
    """

    after: int
    crossing: tuple[str, ...]
    crossing_bytes: int
    weight_bytes: int


class Cutter:
    """Cuts one model.

    Args:
        model: A valid model, its nodes in topological order; not changed.

    Raises:
        ModelError: If its shapes cannot be inferred, e.g. because it has more than 2 GB.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._types = _types(model)

    def cuts(self, most: int = MOST_CUTS) -> list[Cut]:
        """Return the best places to cut, in order.

        The graph is divided into ranges of about equal weight (of bytes of weights and of nodes); each gives the place
        that the fewest bytes cross. A place that is crossed by a tensor of unknown type, or that is no dense tensor, is
        none.

        Args:
            most: Largest number of places.
        """
        places = list(self._places())
        if len(places) <= most:
            return places
        last = places[-1]
        per_node = max(1.0, last.weight_bytes / last.after)  # nodes without weights count as well
        total = last.weight_bytes + last.after * per_node
        best: dict[int, Cut] = {}
        for cut in places:
            part = min(most - 1, math.floor(most * (cut.weight_bytes + cut.after * per_node) / total))
            if part not in best or cut.crossing_bytes < best[part].crossing_bytes:
                best[part] = cut
        return list(best.values())

    def first(self, cut: Cut) -> onnx.ModelProto:
        """Return everything before a cut as a model of its own."""
        return self._part(0, cut.after)

    def stages(self, cuts: Sequence[Cut]) -> list[onnx.ModelProto]:
        """Cut the model; tensors keep their names.

        Args:
            cuts: Where, in order.

        Returns:
            One model per stage, one more than cuts. Its inputs are what it needs of the model's inputs and of earlier
            stages; its outputs are what later stages need, and the model's outputs that it computes.
        """
        bounds = [0, *(cut.after for cut in cuts), len(self._model.graph.node)]
        return [self._part(start, stop) for start, stop in pairwise(bounds)]

    def _part(self, start: int, stop: int) -> onnx.ModelProto:
        graph = self._model.graph
        nodes = graph.node[start:stop]
        made = [name for node in nodes for name in node.output if name]
        used = dict.fromkeys(name for node in nodes for name in _uses(node))
        weights = {tensor.name for tensor in graph.initializer}
        later = {name for node in graph.node[stop:] for name in _uses(node)} | {value.name for value in graph.output}
        part = onnx.ModelProto()
        copy_fields(self._model, part, "graph")
        part.graph.name = f"{graph.name}-{start}-{stop}"
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in used)
        part.graph.input.extend(self._types[name] for name in used if name not in {*made, *weights})
        part.graph.output.extend(self._types[name] for name in made if name in later)
        return part

    def _places(self) -> Iterator[Cut]:
        """Yield every place between two nodes that only tensors of known types cross."""
        graph = self._model.graph
        sizes = {name: size for name, value in self._types.items() if (size := _row_bytes(value))}
        weights = {tensor.name: tensor.ByteSize() for tensor in graph.initializer}
        last_use = {name: index for index, node in enumerate(graph.node) for name in _uses(node)}
        crossing: dict[str, None] = {}
        seen: set[str] = set()
        weight_bytes = 0
        for index, node in enumerate(graph.node[:-1]):
            new = {name for name in _uses(node) if name in weights} - seen
            seen |= new
            weight_bytes += sum(weights[name] for name in new)
            crossing |= dict.fromkeys(node.output)
            crossing = {name: None for name in crossing if last_use.get(name, -1) > index}
            if crossing and all(name in sizes for name in crossing):
                yield Cut(index + 1, tuple(crossing), sum(sizes[name] for name in crossing), weight_bytes)


def choose(
    seconds: Sequence[float], weight_bytes: Sequence[int], stages: int, limit_bytes: int = 0
) -> tuple[int, ...] | None:
    """Choose the cuts with which the slowest stage is the fastest.

    Args:
        seconds: Run time of everything before each cut, and of the whole model as the last; noise may make it fall.
        weight_bytes: Size of the weights before each cut, and of all.
        stages: How many, at least 1.
        limit_bytes: Weights that a device holds; 0 sets no limit.

    Returns:
        Indices of the cuts in order; ``None`` where no choice keeps the limit, or where there are too few cuts.
    """
    until_s = np.maximum.accumulate(np.array([0.0, *seconds]))
    until_bytes = np.array([0, *weight_bytes])
    last = len(seconds)

    def cost(start: int, stop: int) -> float:
        too_large = limit_bytes and until_bytes[stop] - until_bytes[start] > limit_bytes
        return math.inf if too_large else float(until_s[stop] - until_s[start])

    # By the place where so many stages end: the slowest of them, and the cuts between them.
    best: dict[int, tuple[float, tuple[int, ...]]] = {stop: (cost(0, stop), ()) for stop in range(1, last + 1)}
    for _ in range(stages - 1):
        best = {
            stop: min((max(slowest, cost(start, stop)), (*cuts, start - 1)) for start, (slowest, cuts) in earlier)
            for stop in range(1, last + 1)
            if (earlier := [(start, found) for start, found in best.items() if start < stop])
        }
    slowest, cuts = best.get(last, (math.inf, ()))
    return None if slowest == math.inf else cuts


def _uses(node: onnx.NodeProto) -> Iterable[str]:
    """Return the tensors that a node takes, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
        for graph in graphs:
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inside |= {name for inner in graph.node for name in inner.output}
            taken = [name for inner in graph.node for name in _uses(inner)]
            names += [name for name in (*taken, *(value.name for value in graph.output)) if name not in inside]
    return names


def _types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Return name -> type of the tensors of the main graph, as far as they are declared or can be inferred."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError) as exc:
        raise ModelError(f"the shapes of the model cannot be inferred: {exc}") from exc
    return {value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)}


def _row_bytes(value: onnx.ValueInfoProto) -> int:
    """Return the bytes of one row of a dense tensor of known rank and served type; 0 for any other value."""
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.elem_type or not tensor.HasField("shape"):
        return 0
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if dtype not in DATATYPE_OF_NUMPY:  # what a session takes and gives
        return 0
    sizes = [
        dim.dim_value if dim.HasField("dim_value") else (_UNKNOWN_SIZE if axis else 1)
        for axis, dim in enumerate(tensor.shape.dim)
    ]
    return max(1, dtype.itemsize * math.prod(sizes))
