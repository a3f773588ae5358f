"""Ranges of the values that flow through a model, observed on calibration data.

Memory is bounded by one batch: each batch is reduced to a minimum, a maximum and a histogram per tensor before the next
one runs, and batches may have different sizes. Tensors that together are large are observed in groups, one run each.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from optimizers.passes.observing import in_groups, observed
from optimizers.passes.ranges import BINS, LEVELS, Histogram, Method, range_of
from optimizers.passes.ranges import Range as Range
from server.tensors import Array, Tensors


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


def ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Sequence[Tensors],
    work: Path,
    method: Method = "minmax",
    symmetric: bool = False,
) -> dict[str, Range]:
    """Return the range to quantize of each tensor; one run over the data for ``minmax``, two for other methods.

    Infinite values do not count; a tensor without finite values is left out.

    Args:
        model: The model, weights inside.
        tensors: Names of float tensors of its main graph.
        batches: Calibration batches, at least one.
        work: An existing folder for temporary files.
        method: How to choose the range.
        symmetric: Whether ranges must be ``(-t, t)``; they are then chosen for magnitudes, with half of the levels.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    full = minmax_ranges(model, tensors, batches, work)
    if symmetric:
        full = {name: (0.0, max(abs(low), abs(high))) for name, (low, high) in full.items()}
    chosen = full
    if method != "minmax":
        levels = LEVELS // 2 if symmetric else LEVELS
        histograms = _histograms(model, full, batches, work, symmetric)
        chosen = full | {name: range_of(histogram, method, levels) for name, histogram in histograms.items()}
    return {name: (-high if symmetric else low, high) for name, (low, high) in chosen.items()}


def minmax_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, Range]:
    """Return the lowest and highest finite value of each tensor.

    Args:
        model: The model, weights inside.
        tensors: Names of float tensors of its main graph.
        batches: Calibration batches, at least one.
        work: An existing folder for temporary files.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    seen: dict[str, Range] = {}

    def observe(name: str, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        before = seen.get(name, (low, high))
        seen[name] = (min(low, before[0]), max(high, before[1]))

    _observe(model, tensors, batches, work, observe)
    return seen


def largest_magnitudes(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, float]:
    """Return the largest absolute value of each tensor; see ``minmax_ranges``."""
    found = minmax_ranges(model, tensors, batches, work)
    return {name: max(abs(low), abs(high)) for name, (low, high) in found.items()}


def _histograms(
    model: onnx.ModelProto, full: dict[str, Range], batches: Sequence[Tensors], work: Path, folded: bool
) -> dict[str, Histogram]:
    """Count the values other than zero, or their magnitudes, of the tensors that have any."""
    limits = {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in full.items()}
    limits = {name: (low, high) for name, (low, high) in limits.items() if low < high}
    counts = {name: np.zeros(BINS, np.int64) for name in limits}

    def observe(name: str, values: Array) -> None:
        # In single precision, differences of masks (-3.4e38) overflow, and bins of tiny values have no width.
        present = values[values != 0].astype(np.float64)
        counts[name] += np.histogram(np.abs(present) if folded else present, bins=BINS, range=limits[name])[0]

    _observe(model, list(limits), batches, work, observe)
    return {name: Histogram(counts[name], low, high) for name, (low, high) in limits.items()}


def _observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Sequence[Tensors],
    work: Path,
    observe: Callable[[str, Array], None],
) -> None:
    """Call ``observe`` with the finite values of every tensor in every batch."""
    for group in in_groups(model, tensors, batches, work):
        for values in observed(model, group, batches, work):
            for name in group:
                array = values.pop(name)
                finite = array[np.isfinite(array)]
                if finite.size:
                    observe(name, finite)
