"""Means and second moments of what weighted operators multiply with their weights, observed on calibration data.

Memory is bounded by one batch: each batch is reduced to a sum and a sum of outer products per node before the next one
runs, and batches may have different sizes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.passes.int8 import WEIGHTED_OPS, weighted_nodes
from optimizers.passes.observing import observed
from server.tensors import Array, Tensors

_MOST_PATCHES = 4096  # of one batch: neighbouring patches overlap, so more of them add time and little else

Rows = Array
"""FP32 ``[rows, K]``, or ``[groups, rows, K]`` for a convolution with several groups."""


class InputMoments(msgspec.Struct, frozen=True):
    """Moments of the rows ``x`` that a node multiplies with its weight.

    Attributes:
        rows: How many rows were seen.
        mean: ``sum(x) / rows``, ``[K]`` float64; ``[groups, K]`` for a convolution with several groups.
        gram: ``sum(x x^T) / rows``, ``[K, K]`` float64; ``[groups, K, K]`` for a convolution with several groups.
    """

    rows: int
    mean: Array
    gram: Array


class Window(msgspec.Struct, frozen=True):
    """How a convolution walks over its input; every tuple has one entry per spatial axis.

    Attributes:
        kernel: Sizes of the kernel.
        strides: Steps between patches.
        dilations: Steps between the elements of a patch.
        pads: Zeros before and after, as ONNX writes ``auto_pad`` and ``pads``.
        auto_pad: ``NOTSET`` means that ``pads`` counts.
        groups: Into how many parts the input channels are split.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    groups: int

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return the zeros before and after each spatial axis of an input of these sizes."""
        axes = len(self.kernel)
        if self.auto_pad == "VALID":
            return [(0, 0)] * axes
        if self.auto_pad == "NOTSET":
            return list(zip(self.pads[:axes], self.pads[axes:], strict=True))
        padding = []
        for size, stride, extent in zip(sizes, self.strides, self.extents(), strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            less, more = total // 2, total - total // 2
            padding.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return padding

    def extents(self) -> tuple[int, ...]:
        """Return how far a patch reaches along each spatial axis."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))


def input_moments(
    model: onnx.ModelProto, nodes: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, InputMoments]:
    """Return the moments of the rows that each node multiplies with its weight.

    A row of MatMul and Gemm is the last axis of the first input (the first axis for a Gemm with ``transA``). A row of
    Conv is one patch, its elements in the order of the weight, ``[Cin / groups * kh * kw]``; a batch with more than
    4096 patches counts with 4096 of them, drawn the same way in every run. Rows with NaN or infinity are left out.
    Nodes that multiply the same rows share one result.

    Args:
        model: The model, weights inside.
        nodes: Names of MatMul, Gemm and Conv nodes of its main graph whose second input is a FLOAT weight.
        batches: Calibration batches, at least one.
        work: An existing folder for a temporary file.

    Returns:
        Node name -> moments; nodes that saw no finite row are left out.

    Raises:
        PassFailed: If a name is not that of such a node, or if the model does not run on the batches.
    """
    known = {node.name: node for node in weighted_nodes(model, WEIGHTED_OPS)}
    missing = [name for name in nodes if name not in known]
    if missing:
        raise PassFailed(f"no MatMul, Gemm or Conv with a constant weight is called '{missing[0]}'")
    sources = {name: (known[name].input[0], _walk_of(model, known[name])) for name in nodes}
    sums: dict[tuple[str, Window | str], InputMoments] = {}
    tensors = [tensor for tensor, _ in sources.values()]
    for number, values in enumerate(observed(model, tensors, batches, work)):
        for tensor, walk in dict.fromkeys(sources.values()):
            _add(sums, (tensor, walk), _finite(rows_of(values[tensor], walk, number)))
    results = {source: _divided(total) for source, total in sums.items()}
    return {name: results[source] for name, source in sources.items() if source in results}


def rows_of(values: Array, walk: Window | str, number: int = 0) -> Rows:
    """Return the rows that a node multiplies with its weight.

    Args:
        values: The first input of the node.
        walk: The window of a convolution, ``rows`` for the last axis, or ``columns`` for the first of two.
        number: Of the batch; which patches are drawn depends on nothing else.
    """
    if isinstance(walk, Window):
        return _patches(values, walk, number)
    return values.T if walk == "columns" else values.reshape(-1, values.shape[-1])


def _patches(values: Array, window: Window, number: int) -> Rows:
    axes = len(window.kernel)
    spatial = tuple(range(2, 2 + axes))
    padded = np.pad(values, [(0, 0), (0, 0), *window.padding(values.shape[2:])])
    views = sliding_window_view(padded, window.extents(), spatial)
    steps = (*(slice(None, None, step) for step in window.strides), *(slice(None, None, d) for d in window.dilations))
    views = np.moveaxis(views[(slice(None), slice(None), *steps)], 1, 1 + axes)  # [N, *patches, C, *kernel]
    places = views.shape[: 1 + axes]
    count = math.prod(places)
    chosen = np.arange(count)
    if count > _MOST_PATCHES:
        chosen = np.sort(np.random.default_rng(number).choice(count, _MOST_PATCHES, replace=False))
    rows = views[np.unravel_index(chosen, places)]
    if window.groups == 1:
        return rows.reshape(len(chosen), -1)
    return np.moveaxis(rows.reshape(len(chosen), window.groups, -1), 1, 0)


def _finite(rows: Rows) -> Rows:
    return rows[..., np.isfinite(rows).all(axis=(*range(rows.ndim - 2), -1)), :]


def _add(sums: dict[tuple[str, Window | str], InputMoments], source: tuple[str, Window | str], rows: Rows) -> None:
    count = rows.shape[-2]
    if count == 0:
        return
    first, second = rows.sum(axis=-2, dtype=np.float64), rows.swapaxes(-1, -2) @ rows  # FP32 within a batch only
    before = sums.get(source)
    if before is None:
        sums[source] = InputMoments(count, first, second.astype(np.float64))
        return
    np.add(before.gram, second, out=before.gram)
    sums[source] = InputMoments(before.rows + count, before.mean + first, before.gram)


def _divided(total: InputMoments) -> InputMoments:
    return InputMoments(total.rows, total.mean / total.rows, total.gram / total.rows)


def _walk_of(model: onnx.ModelProto, node: onnx.NodeProto) -> Window | str:
    """Return how a node takes rows from its input; see ``rows_of``."""
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type != "Conv":
        return "columns" if settings.get("transA") else "rows"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    axes = len(weight.dims) - 2
    return Window(
        kernel=tuple(weight.dims[2:]),
        strides=tuple(settings.get("strides", [1] * axes)),
        dilations=tuple(settings.get("dilations", [1] * axes)),
        pads=tuple(settings.get("pads", [0] * 2 * axes)),
        auto_pad=settings.get("auto_pad", b"NOTSET").decode(),
        groups=settings.get("group", 1),
    )
