"""Ranges of the values that flow through a model, observed on calibration data.

Memory is bounded by one batch: each batch is reduced to a minimum, a maximum and a histogram per tensor before the next
one runs, and batches may have different sizes.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

from optimizers.errors import PassFailed
from optimizers.graph import save_model
from optimizers.passes import copy_of
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Array, Tensors

Range = tuple[float, float]
"""Lowest and highest value."""

_BINS = 2048
_PLAIN = SessionOptions(intra_op_threads=0, graph_level="disable")


def float_tensors(model: onnx.ModelProto, op_types: frozenset[str] | None = None) -> list[str]:
    """Return the float tensors of the main graph that nodes read or write, weights left out, in graph order.

    Args:
        model: A model with inferred shapes; tensors of unknown type are left out.
        op_types: Only what nodes of these operators touch; ``None`` means all.
    """
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats -= {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if op_types is None or node.op_type in op_types]
    touched = (name for node in nodes for name in (*node.input, *node.output))
    return [name for name in dict.fromkeys(touched) if name in floats]


def minmax_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, Range]:
    """Return the lowest and highest finite value of each tensor.

    Args:
        model: The model, weights inside.
        tensors: Names of float tensors of its main graph.
        batches: Calibration batches, at least one.
        work: An existing folder for a temporary file.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    ranges: dict[str, Range] = {}

    def observe(name: str, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        seen = ranges.get(name, (low, high))
        ranges[name] = (min(low, seen[0]), max(high, seen[1]))

    _observe(model, tensors, batches, work, observe)
    return ranges


def percentile_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path, percentile: float
) -> dict[str, Range]:
    """Return ranges that leave out the rarest values on both ends; two runs over the data.

    Args:
        model: The model, weights inside.
        tensors: Names of float tensors of its main graph.
        batches: Calibration batches, at least one.
        work: An existing folder for a temporary file.
        percentile: Share of the values to keep, in percent, e.g. 99.99.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    full = minmax_ranges(model, tensors, batches, work)
    counts = {name: np.zeros(_BINS, np.int64) for name in full}

    def observe(name: str, values: Array) -> None:
        counts[name] += np.histogram(values, bins=_BINS, range=full[name])[0]

    varying = [name for name in full if full[name][0] < full[name][1]]
    _observe(model, varying, batches, work, observe)
    tail = (1 - percentile / 100) / 2
    return full | {name: _without_tails(counts[name], full[name], tail) for name in varying}


def largest_magnitudes(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, float]:
    """Return the largest absolute value of each tensor; see ``minmax_ranges``."""
    ranges = minmax_ranges(model, tensors, batches, work)
    return {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}


def _without_tails(counts: Array, full: Range, tail: float) -> Range:
    share = np.cumsum(counts) / counts.sum()
    edges = np.linspace(*full, _BINS + 1)
    low = edges[int(np.searchsorted(share, tail, side="right"))]
    high = edges[int(np.searchsorted(share, 1 - tail)) + 1]
    return float(low), float(high)


def _observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Tensors],
    work: Path,
    observe: Callable[[str, Array], None],
) -> None:
    for name, values in _values(model, tensors, batches, work):
        finite = values[np.isfinite(values)]
        if finite.size:
            observe(name, finite)


def _values(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Tensors], work: Path
) -> Iterator[tuple[str, Array]]:
    """Run the model with the tensors as outputs and yield them batch by batch."""
    given = {value.name for value in model.graph.input}
    twin = copy_of(model)
    known = {value.name: value for value in model.graph.value_info}
    declared = {value.name for value in model.graph.output}
    twin.graph.output.extend(known[name] for name in tensors if name not in declared | given)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "observed.onnx"
        save_model(twin, path)
        try:
            session = Session(path, Device("cpu"), _PLAIN)
            wanted = tuple(name for name in tensors if name not in given)
            for batch in batches:
                outputs = session.run(batch, wanted) if wanted else {}
                yield from ((name, batch[name] if name in given else outputs[name]) for name in tensors)
        except SlipstreamError as exc:
            raise PassFailed(f"the model does not run on the calibration data: {exc}") from exc
