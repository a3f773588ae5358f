"""SmoothQuant: outliers of activations are moved into the weights, which bear them better."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import onnx
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.channels import Constants, Division, Scaling, Wiring, attribute_of, standard
from optimizers.passes.observing import observed
from optimizers.passes.settle import settle
from server.tensors import Array, Tensors

_LEAST_SHARE = 1e-6  # a channel below this share of the largest one says nothing about its real scale


class SmoothQuant(msgspec.Struct, frozen=True):
    """Rescale the input channels of MatMul and Gemm with constant weights, so that activations quantize better.

    For a tensor X that feeds such nodes, channel j (last axis) is divided by s_j, and row j of their weights W is
    multiplied by it::

        s_j = max|X_j|^alpha / max_k |W_jk|^(1 - alpha)        Y = (X / s) (s W)

    with the maxima over the calibration data and over all these nodes. Channels that are always zero get the geometric
    mean of the others. 1/s goes into what makes X, when that is exact and nothing else sees it: the scale and bias of a
    LayerNormalization, the weight and bias of a MatMul or Gemm, a constant factor per channel; also through Add of a
    constant, products and positively homogeneous operators.

    Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
    arXiv 2211.10438, equation 4.

    Attributes:
        alpha: 0 to 1: how much of the difficulty moves into the weights; 0.5 is the paper's choice.
        insert: Whether to put a Mul by 1/s before the nodes where 1/s cannot be folded, which costs time. Otherwise
            such tensors are left alone.
    """

    alpha: float = 0.5
    insert: bool = False

    spec: ClassVar[PassSpec] = PassSpec("smoothquant", 1, "tolerance", needs=frozenset({"calibration"}))

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If ``alpha`` is not within 0 and 1.
        """
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be from 0 to 1, 0.5 is usual")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data, or if the model does not run on it.
        """
        if not context.calibration:
            raise PassFailed("no calibration data; give --calibration DATA.npz")
        after = copy_of(model)
        smoothing = _Smoothing(after, self)
        if not smoothing.consumers:
            return PassResult(model, changed=False, note="no MatMul or Gemm has a constant weight")
        maxima = channel_maxima(model, list(smoothing.consumers), context.calibration, context.work)
        for tensor in reversed(smoothing.consumers):  # what is folded into a weight changes the scales before it only
            smoothing.smooth(tensor, maxima)
        smoothing.insert()
        counts, note = smoothing.counts(), smoothing.note()
        if not counts["folded"] + counts["inserted"]:
            return PassResult(model, changed=False, counts=counts, note=note)
        settle(after, model)
        return PassResult(after, changed=True, counts=counts, note=f"alpha {self.alpha:g}; {note}")


def channel_maxima(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> dict[str, Array]:
    """Return the largest finite magnitude per channel of each tensor; memory is bounded by one batch.

    Args:
        model: The model, weights inside.
        tensors: Names of float tensors of its main graph, inputs included.
        batches: Calibration batches, of any sizes.
        work: An existing folder for a temporary file.

    Returns:
        Name -> float64 ``[channels]``, channels = last axis; tensors that never had an element are left out.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    maxima: dict[str, Array] = {}
    for values in observed(model, tensors, batches, work):
        for name in tensors:
            _raise_maxima(maxima, name, values[name])
    return maxima


def scales(activations: Array, weights: Array, alpha: float) -> Array | None:
    """Return s of the formula above, or ``None`` when no channel has a scale.

    Args:
        activations: float64 ``[channels]``, max|X_j|.
        weights: float64 ``[channels]``, max_k|W_jk|.
        alpha: 0 to 1.
    """
    usable = (activations > _LEAST_SHARE * activations.max()) & (weights > _LEAST_SHARE * weights.max())
    if not usable.any():
        return None
    logs = alpha * np.log(activations[usable]) - (1 - alpha) * np.log(weights[usable])
    made = np.full(len(activations), np.exp(logs.mean()))
    made[usable] = np.exp(logs)
    return made


class _Smoothing:
    """The edits of one run on a copy of the model, and what became of each tensor."""

    def __init__(self, model: onnx.ModelProto, settings: SmoothQuant) -> None:
        self._model = model
        self._settings = settings
        self._wiring = Wiring(model)
        self._constants = Constants(model, self._wiring)
        self._division = Division(self._wiring, self._constants)
        self._inserted: dict[str, Array] = {}
        self._folded = 0
        self._skipped: Counter[str] = Counter()
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            if self._rows(node) is not None:
                self.consumers.setdefault(node.input[0], []).append(node)

    def smooth(self, tensor: str, maxima: dict[str, Array]) -> None:
        """Fold the division of one tensor, or note it for ``insert``, or say why it is left alone."""
        nodes = self.consumers[tensor]
        if not all(self._wiring.private(node.input[1]) for node in nodes):
            self._skipped["weight read elsewhere"] += 1
            return
        weights = np.stack([rows for node in nodes if (rows := self._rows(node)) is not None]).max(axis=0)
        s = scales(maxima[tensor], weights, self._settings.alpha) if tensor in maxima else None
        if s is None:
            self._skipped["always zero"] += 1
            return
        plan = self._division.plan(tensor, s, reads=len(nodes))
        if isinstance(plan, str) and not self._settings.insert:
            self._skipped[plan] += 1
            return
        if isinstance(plan, str):
            self._inserted[tensor] = s
        else:
            self._folded += 1
            for scaling in plan:
                self._constants.scale(scaling)
        for node in nodes:
            self._constants.scale(Scaling(node, 1, s[:, None] if _row_axis(node) == 0 else s))

    def insert(self) -> None:
        """Put in the Mul nodes, each before the first node that reads it."""
        before: dict[str, onnx.NodeProto] = {}
        for tensor, s in self._inserted.items():
            constant = self._constants.add(f"{tensor}_smoothing", (1 / s).astype(np.float32))
            smoothed = self._constants.free_name(f"{tensor}_smoothed")
            first = self.consumers[tensor][0]
            before[first.output[0]] = helper.make_node("Mul", [tensor, constant], [smoothed], name=smoothed)
            for node in self.consumers[tensor]:
                node.input[0] = smoothed
        for place, node in reversed(list(enumerate(self._model.graph.node))):
            if node.output[0] in before:
                self._model.graph.node.insert(place, before[node.output[0]])

    def counts(self) -> dict[str, int]:
        """Return how many tensors were folded, got a Mul, or were left alone."""
        return {"folded": self._folded, "inserted": len(self._inserted), "skipped": self._skipped.total()}

    def note(self) -> str:
        """Return the counts as a phrase, with the reasons."""
        done = f"{self._folded} tensors folded, {len(self._inserted)} with a Mul"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._skipped.most_common())
        return f"{done}; left alone: {reasons}" if reasons else done

    def _rows(self, node: onnx.NodeProto) -> Array | None:
        """Return max_k|W_jk|, float64 ``[channels]``, or ``None`` where the node multiplies by no constant matrix."""
        axis = _row_axis(node)
        weight = None if axis is None else self._constants.of(node, 1)
        if axis is None or weight is None or weight.ndim != 2 or not weight.size or not np.isfinite(weight).all():
            return None
        rows: Array = np.abs(weight).max(axis=1 - axis).astype(np.float64)
        return rows


def _row_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of the weight that meets the last axis of the activation; ``None`` for other nodes."""
    if not standard(node) or node.op_type not in ("Gemm", "MatMul") or attribute_of(node, "transA", 0):
        return None
    return attribute_of(node, "transB", 0)


def _raise_maxima(maxima: dict[str, Array], name: str, values: Array) -> None:
    if not values.size:
        return
    magnitudes = np.where(np.isfinite(values), np.abs(values), 0).reshape(-1, values.shape[-1])
    seen = magnitudes.max(axis=0).astype(np.float64)
    maxima[name] = np.maximum(maxima[name], seen) if name in maxima else seen
