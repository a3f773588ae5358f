"""AdaRound: round every weight up or down so that the outputs of its layer change least, not the weight itself."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import nodes_of
from optimizers.passes import Need, PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.int8 import WEIGHTED_OPS, reduced_range, untie_weights, weighted_nodes
from optimizers.passes.moments import InputMoments, input_moments
from server.tensors import Array

_LARGEST_K = 2500  # one step costs out * K^2
_GRAM_BYTES = 2**28  # of one run over the data
_FLOATING_OPERATIONS = 6e10  # of the descent of one layer: 3 seconds of one core
_FEWEST_STEPS = 200  # fewer do not beat what the sweeps find on their own
_MOST_SWEEPS = 10
_WARM_UP = 0.2
_PENALTY = 0.5
_DISTANCE = 50.0  # learning rate times steps: how far a variable can travel


class AdaRound(msgspec.Struct, frozen=True):
    """Move the weights of Conv, MatMul and Gemm to the INT8 grid that the quantizer will put over them.

    The grid is that of onnxruntime's quantizer for symmetric INT8 weights per channel. Each channel keeps its largest
    element, so the quantizer finds the same scale again, and reproduces exactly the codes learned here. Layers that
    stay in FP32 afterwards would only lose precision: set ``convolutions`` accordingly.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568; with the
    second moments of the inputs in place of samples.

    Attributes:
        steps: Of gradient descent per layer; large layers get fewer, see ``learned_codes``.
        convolutions: Whether Conv will be quantized; not so by ``Int8Dynamic``.
        target: As that of ``Int8Static``: for ``tensorrt`` weights always have 8 bits.
        keep: Names of nodes that the quantizer will keep in float; they are left alone.
    """

    steps: int = 500
    convolutions: bool = True
    target: Literal["cpu", "tensorrt"] = "cpu"
    keep: tuple[str, ...] = ()

    @property
    def spec(self) -> PassSpec:
        """Declare the pass; only the CPU's grid depends on the host."""
        needs: frozenset[Need] = frozenset({"calibration", "host"} if self.target == "cpu" else {"calibration"})
        return PassSpec("adaround", 1, "lossy", needs=needs, target=self.target)

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        A layer, and within it each channel, keeps its weights when the error did not fall. Layers with a weight that
        is read twice, that is not a matrix, or with more than 2500 inputs per output are skipped.

        Raises:
            PassFailed: If there is no calibration data, if no such operator has a constant weight, or if the model
                does not run on the data.
        """
        if not context.calibration:
            raise PassFailed("no calibration data; give --calibration DATA.npz")
        ops = WEIGHTED_OPS if self.convolutions else WEIGHTED_OPS - {"Conv"}
        if not weighted_nodes(model, ops):
            raise PassFailed(f"no {', '.join(sorted(ops))} has a constant weight")
        twin = _untied(model)
        layers = [node for node in weighted_nodes(twin, ops) if node.name not in self.keep]
        chosen = _learnable(twin, layers)
        largest = 64 if self.target == "cpu" and reduced_range(context.host) else 127
        weights = {tensor.name: tensor for tensor in twin.graph.initializer}
        learned: dict[str, Array] = {}
        falls: list[float] = []
        for part in _parts(chosen, weights):
            moments = input_moments(twin, [node.name for node in part], context.calibration, context.work)
            for node in part:
                weight = numpy_helper.to_array(weights[node.input[1]])
                better, fall = _rounded(node, weight, moments.get(node.name), largest, self.steps)
                if fall > 0:
                    learned[node.input[1]] = better
                    falls.append(fall)
        for name, weight in learned.items():
            weights[name].CopyFrom(numpy_helper.from_array(weight, name))
        return _result(model, twin, falls, kept=len(chosen) - len(falls), skipped=len(layers) - len(chosen))


def as_channels(node: onnx.NodeProto, weight: Array) -> Array:
    """Return a weight as ``[groups, channels per group, K]``, K in the order of ``InputMoments``."""
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        groups = settings.get("group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return (weight if settings.get("transB") else weight.T)[np.newaxis]


def _as_weight(node: onnx.NodeProto, channels: Array, shape: tuple[int, ...]) -> Array:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    if node.op_type == "Conv" or transposed:
        return channels.reshape(shape)
    return np.ascontiguousarray(channels[0].T)


def _untied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose nodes have names, and whose MatMul and Gemm have weights of their own."""
    twin = copy_of(model)
    taken = {node.name for node in twin.graph.node}
    for index, node in enumerate(twin.graph.node):
        if not node.name and f"{node.op_type}_{index}" not in taken:
            node.name = f"{node.op_type}_{index}"
    untie_weights(twin)
    return twin


def _learnable(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in nodes_of(model) for name in node.input)
    readers.update(value.name for value in model.graph.output)
    names = Counter(node.name for node in layers)
    chosen = []
    for node in layers:
        shape = tuple(weights[node.input[1]].dims)
        private = readers[node.input[1]] == 1 and names[node.name] == 1 and node.input[0] not in weights
        if private and (node.op_type == "Conv" or len(shape) == 2) and _width(node, shape) <= _LARGEST_K:
            chosen.append(node)
    return chosen


def _width(node: onnx.NodeProto, shape: Sequence[int]) -> int:
    """Return K, the number of inputs of one output."""
    return int(as_channels(node, np.broadcast_to(np.float32(0), tuple(shape))).shape[-1])


def _parts(layers: Sequence[onnx.NodeProto], weights: dict[str, onnx.TensorProto]) -> Iterator[list[onnx.NodeProto]]:
    """Split layers so that the second moments of each part fit into memory; each part costs one run over the data."""
    part: list[onnx.NodeProto] = []
    size = 0
    for node in layers:
        channels = as_channels(node, np.broadcast_to(np.float32(0), tuple(weights[node.input[1]].dims)))
        needed = channels.shape[0] * channels.shape[-1] ** 2 * np.dtype(np.float64).itemsize
        if part and size + needed > _GRAM_BYTES:
            yield part
            part, size = [], 0
        part.append(node)
        size += needed
    if part:
        yield part


def _rounded(
    node: onnx.NodeProto, weight: Array, moments: InputMoments | None, largest: int, steps: int
) -> tuple[Array, float]:
    """Return the weight on the grid and the share of the error that is gone; 0 when nothing was gained."""
    if moments is None or not np.isfinite(weight).all():
        return weight, 0.0
    channels = as_channels(node, weight)
    scales = channel_scales(channels, largest)
    gram = shrunk(moments)
    nearest, learned = np.rint(channels / scales), learned_codes(channels, scales, largest, gram, steps)
    before, after = (channel_errors(codes * scales - channels, gram) for codes in (nearest, learned))
    fell = (after < before)[..., np.newaxis]
    if not fell.any():
        return weight, 0.0
    edge = np.abs(channels).max(axis=-1, keepdims=True)
    on_grid = np.clip((learned * scales).astype(np.float32), -edge, edge)  # beyond it, the scale would grow
    pinned = np.abs(channels) == edge
    better = np.where(fell & ~pinned, on_grid, channels)
    gone = 1 - float(np.minimum(before, after).sum() / before.sum())
    return _as_weight(node, better, weight.shape), gone


def channel_scales(channels: Array, largest: int) -> Array:
    """Return the step of each channel's grid, as onnxruntime's quantizer computes it for symmetric INT8 weights.

    Args:
        channels: FP32 ``[..., K]``.
        largest: The code of the largest element, 127, or 64 where onnxruntime reduces the range.

    Returns:
        FP32 ``[..., 1]``; 1 for channels of zeros.
    """
    span = 2 * np.abs(channels).max(axis=-1, keepdims=True).astype(np.float64)
    scales = span / (2 * largest)
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def channel_errors(difference: Array, gram: Array) -> Array:
    """Return ``(W - W~) G (W - W~)^T`` per channel: its expected squared error at the output.

    Args:
        difference: ``[groups, channels, K]``.
        gram: ``[groups, K, K]``, or ``[K, K]``.

    Returns:
        float64 ``[groups, channels]``.
    """
    wide = difference.astype(np.float64)
    return np.asarray(np.einsum("gok,gok->go", wide @ gram, wide))


def learned_codes(channels: Array, scales: Array, largest: int, gram: Array, steps: int) -> Array:
    """Return codes, each the integer below or above its weight, with a small error at the output.

    Gradient descent on the relaxed problem comes first; layers whose ``2 steps out K^2`` operations exceed 6e10 get
    fewer steps, or none if that leaves less than 200. Sweeps follow, which flip single codes for as long as the
    error falls; alone they reach most of the gain in a small part of the time.

    Args:
        channels: FP32 ``[groups, channels, K]``.
        scales: FP32 ``[groups, channels, 1]``.
        largest: Largest code.
        gram: ``[groups, K, K]``, or ``[K, K]``.
        steps: Of gradient descent, at most.

    Returns:
        ``[groups, channels, K]`` integers as float32; the largest elements of a channel keep their nearest code.
    """
    codes = (channels / scales).astype(np.float32)
    below = np.clip(np.floor(codes), -largest, largest - 1)
    magnitude = np.abs(channels)
    fixed = magnitude == magnitude.max(axis=-1, keepdims=True)
    gram = np.broadcast_to(gram, (channels.shape[0], *gram.shape[-2:]))
    even = (gram / max(float(np.trace(gram.mean(axis=0))) / gram.shape[-1], 1e-30)).astype(np.float32)
    affordable = min(steps, int(_FLOATING_OPERATIONS / (2 * channels.size * gram.shape[-1])))
    up = np.clip(np.rint(codes) - below, 0, 1)
    if affordable >= min(steps, _FEWEST_STEPS) and affordable > 0:
        up = np.where(fixed, up, _descended(codes - below, even, affordable))
    return below + _swept(up, codes - below, even, ~fixed)


def _descended(fraction: Array, gram: Array, steps: int) -> Array:
    """Minimize ``(h - f) G (h - f)^T + penalty`` over ``h`` in [0, 1] with Adam; returns 0 or 1 per weight.

    ``h = clip(1.2 sigmoid(V) - 0.1, 0, 1)``, the penalty ``sum(1 - |2h - 1|^b)`` with ``b`` from 20 down to 2 drives
    ``h`` to the ends.
    """
    start = np.clip(fraction, 0.01, 0.99)
    variable = np.log((start + 0.1) / (1.1 - start))
    first, second = np.zeros_like(variable), np.zeros_like(variable)
    for step in range(1, steps + 1):
        sigmoid = 1 / (1 + np.exp(-variable))
        stretched = 1.2 * sigmoid - 0.1
        up = np.clip(stretched, 0, 1)
        gradient = 2 * (up - fraction) @ gram + _pressure(up, step / steps)
        gradient *= 1.2 * sigmoid * (1 - sigmoid) * (up == stretched)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = _DISTANCE / steps * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        variable = variable - np.float32(rate) * first / (np.sqrt(second) + np.float32(1e-8))
    return (variable > 0).astype(np.float32)


def _pressure(up: Array, progress: float) -> Array | float:
    """Return the gradient of the penalty; none during the warm-up."""
    if progress <= _WARM_UP:
        return 0.0
    power = 2 + 9 * (1 + np.cos(np.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
    centred = 2 * up - 1
    return np.asarray(-2 * _PENALTY * np.sign(centred) * power * np.abs(centred) ** np.float32(power - 1))


def _swept(up: Array, fraction: Array, gram: Array, free: Array) -> Array:
    """Flip one code after the other where the error falls, until none does; a flip by d adds ``2 d r_k + G_kk``."""
    up = up.copy()
    slope = (up - fraction) @ gram
    for _ in range(_MOST_SWEEPS):
        flipped = False
        for k in range(up.shape[-1]):
            turn = 1 - 2 * up[..., k]
            falls = free[..., k] & (2 * turn * slope[..., k] + gram[:, k, k, np.newaxis] < 0)
            if falls.any():
                places = np.nonzero(falls)
                up[..., k] += np.where(falls, turn, 0)
                slope[places] += turn[places][:, np.newaxis] * gram[places[0], k]
                flipped = True
        if not flipped:
            break
    return up


def shrunk(moments: InputMoments) -> Array:
    """Return the second moments with covariances pulled towards 0, the more so the fewer rows were seen.

    ``mean mean^T + (1 - a) C + a diag(C)``, ``C`` the covariance and ``a = K / (K + rows)``: with fewer rows than
    columns there are always roundings that these rows do not notice, and others would.
    """
    mean = moments.mean[..., :, np.newaxis] * moments.mean[..., np.newaxis, :]
    covariance = moments.gram - mean
    pull = moments.mean.shape[-1] / (moments.mean.shape[-1] + moments.rows)
    diagonal = np.eye(moments.mean.shape[-1]) * covariance
    return np.asarray(mean + (1 - pull) * covariance + pull * diagonal)


def _result(
    model: onnx.ModelProto, twin: onnx.ModelProto, falls: Sequence[float], kept: int, skipped: int
) -> PassResult:
    counts = {"rounded": len(falls), "kept": kept, "skipped": skipped}
    counts = {name: count for name, count in counts.items() if count}
    if not falls:
        return PassResult(model, changed=False, counts=counts, note="rounding to nearest is best for every layer")
    note = f"error of {len(falls)} layers fell by {np.median(falls):.0%} (median) against rounding to nearest"
    return PassResult(twin, changed=True, counts=counts, note=note)
