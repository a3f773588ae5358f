"""Ranges of the values that flow through a model, observed on calibration data.

Memory is bounded by one batch: each batch is reduced to a minimum, a maximum and a histogram per tensor before the next
one runs, and batches may have different sizes. Tensors that together are large are observed in groups, one run each.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from optimizers.errors import PassFailed
from optimizers.graph import save_model
from optimizers.passes import copy_of
from optimizers.passes.ranges import BINS, LEVELS, Histogram, Method, range_of
from optimizers.passes.ranges import Range as Range
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Array, Tensors

_PLAIN = SessionOptions(intra_op_threads=0, graph_level="disable")
_GROUP_BYTES = 256 << 20


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
    try:
        for group in _groups(model, tensors, batches, work):
            for values in _values(model, group, batches, work):
                for name in group:
                    array = values.pop(name)
                    finite = array[np.isfinite(array)]
                    if finite.size:
                        observe(name, finite)
    except SlipstreamError as exc:
        raise PassFailed(f"the model does not run on the calibration data: {exc}") from exc


def _values(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> Iterator[dict[str, Array]]:
    """Yield the tensors of each batch."""
    given = {value.name for value in model.graph.input}
    declared = {value.name for value in model.graph.output}
    twin = copy_of(model)
    twin.graph.output.extend(value for value in model.graph.value_info if value.name in set(tensors) - declared - given)
    wanted = tuple(name for name in tensors if name not in given)
    with _opened(twin, work) as session:
        for batch in batches:
            outputs = session.run(batch, wanted) if wanted else {}
            outputs.update((name, batch[name]) for name in tensors if name in given)
            yield outputs


def _groups(model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path) -> list[list[str]]:
    """Cut the tensors into groups of at most 256 MB, or one tensor; the model itself counts the first batch's elements.

    Shapes in the file do not tell: axes may have names, or no size at all.
    """
    twin = copy_of(model)
    del twin.graph.output[:]
    sizes = [f"{name}/elements" for name in tensors]
    twin.graph.node.extend(helper.make_node("Size", [name], [size]) for name, size in zip(tensors, sizes, strict=True))
    twin.graph.output.extend(helper.make_tensor_value_info(size, TensorProto.INT64, []) for size in sizes)
    groups: list[list[str]] = []
    room = 0
    if not tensors:
        return groups
    with _opened(twin, work) as session:
        elements = session.run(batches[0])
    for name, size in zip(tensors, sizes, strict=True):
        needed = 4 * int(elements[size])
        if not groups or needed > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(name)
        room -= needed
    return groups


@contextmanager
def _opened(model: onnx.ModelProto, work: Path) -> Iterator[Session]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "observed.onnx"
        save_model(model, path)
        session = Session(path, Device("cpu"), _PLAIN)
        try:
            yield session
        finally:
            session.close()
