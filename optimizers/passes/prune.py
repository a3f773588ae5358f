"""Structured pruning: remove the hidden channels that the next layer can best do without, and refit that layer."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np
import onnx
from msgspec import Meta

from optimizers.errors import PassFailed
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.moments import InputMoments
from optimizers.passes.refit import (
    LinearLayer,
    Unsuited,
    Weights,
    editable,
    linear_layers,
    listed,
    observed_moments,
    read_layer,
    refit_kept,
    relative_output_error,
    require_calibration,
    ridge_strength,
    scalar_settings,
    shrunk,
    write_layer,
)
from optimizers.passes.settle import settle
from server.tensors import Array

MULTIPLE = 8
"""Of channels to keep: kernels compute 8 at a time, so that 57 channels cost as much as 64."""

# fmt: off
_ELEMENTWISE = frozenset(
    [
        "Abs", "Add", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid",
        "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu"
    ]
)
# fmt: on
_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
_POOLS = _GLOBAL_POOLS | {"AveragePool", "MaxPool"}
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


class Chain(msgspec.Struct, frozen=True):
    """A layer whose output channels only one other layer reads.

    Attributes:
        producer: Makes the channels.
        between: Nodes that treat each channel on its own, with the axis of the channels of their output, from the end.
        consumer: Node that mixes the channels.
    """

    producer: LinearLayer
    between: list[tuple[onnx.NodeProto, int]]
    consumer: onnx.NodeProto


class Plan(msgspec.Struct, frozen=True):
    """What becomes of a chain.

    Attributes:
        chain: The chain.
        kept: Channels that remain, ascending.
        matrix: New weight of the consumer, float64 ``[k, N]``.
        bias: New bias of the consumer, float64 ``[N]``; ``None`` leaves it as it is.
        error: Squared error of the consumer's outputs over their energy, on the calibration data.
    """

    chain: Chain
    kept: Array
    matrix: Array
    bias: Array | None
    error: float


class PruneChannels(msgspec.Struct, frozen=True):
    """Remove hidden channels between two layers: hidden units of an MLP, output channels of a Conv.

    A hidden channel is one between a Conv, Gemm or MatMul and the only Conv, Gemm or MatMul that reads it, with nothing
    but activations, biases, BatchNormalization, depthwise Conv and pooling between them. Tensors that are added to
    others (residual connections), are outputs, or have several such readers stay as they are.

    Channels go one by one. Removing channel j and refitting the consumer ``W`` costs ``|W_j|^2 / [H^-1]_jj`` of squared
    output error, with ``H = G + l I`` and ``G`` the Gram matrix of the consumer's inputs; ``G_jj |W_j|^2`` where the
    channels are uncorrelated. The cheapest one goes, ``W`` and ``H^-1`` follow, and the next is chosen. ``l``
    depends on how few rows there are.

    Source: B. Hassibi, D. Stork, Second order derivatives for network pruning: optimal brain surgeon (1993), per layer
    as in E. Frantar, D. Alistarh, Optimal brain compression, arXiv 2208.11580, with groups of weights.

    Attributes:
        share: Of the channels of each chain, to remove at most; as many are kept as make a multiple of 8.
        refit: Whether the consumer is refitted; without, channels are merely dropped.
    """

    share: Annotated[float, Meta(gt=0, lt=1)] = 0.25
    refit: bool = True

    @property
    def spec(self) -> PassSpec:
        """Declare the pass."""
        return PassSpec("prune-channels", 1, "lossy", needs=frozenset({"calibration"}))

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data, if the model does not run on it, or if no channel can be
                removed, with the reasons.
        """
        require_calibration(context)
        twin = editable(model)
        weights = Weights(twin)
        found, skipped = _chains(weights)
        chains = {chain.consumer.name: chain for chain in found if self._kept(chain) < chain.producer.outputs}
        if len(chains) < len(found):
            skipped[f"with too few channels to remove {self.share:.0%} in steps of {MULTIPLE}"] = len(found) - len(
                chains
            )
        if not chains:
            raise PassFailed(f"no hidden channel can be removed: {listed(skipped) or 'no layer has a constant weight'}")
        layers = [read_layer(weights, chain.consumer) for chain in chains.values()]
        plans = [
            self._plan(chains[layer.node.name], layer, moments)
            for layer, moments in observed_moments(twin, layers, context)
        ]
        if not plans:
            raise PassFailed("no hidden channel can be removed: no finite value reaches them on the calibration data")
        for plan in plans:  # from front to back: a consumer is refitted before it loses channels as a producer
            _narrow(weights, plan.chain, plan.kept)
            write_layer(weights, read_layer(weights, plan.chain.consumer), plan.matrix, plan.bias)
        settle(twin, model)
        return _result(twin, plans, skipped)

    def _kept(self, chain: Chain) -> int:
        """Return how many channels remain, all of them where that is a multiple of 8 no smaller number reaches."""
        least = math.ceil(round(chain.producer.outputs * (1 - self.share), 6) / MULTIPLE) * MULTIPLE
        return min(max(least, MULTIPLE), chain.producer.outputs)

    def _plan(self, chain: Chain, layer: LinearLayer, moments: InputMoments) -> Plan:
        gram, weight, patch = layer.gram(moments), layer.matrix, layer.patch
        strength = ridge_strength(gram, moments.rows)
        removed = cheapest_channels(shrunk(gram, strength), weight, chain.producer.outputs - self._kept(chain), patch)
        kept = np.setdiff1d(np.arange(chain.producer.outputs), removed)
        rows = (kept[:, None] * patch + np.arange(patch)).ravel()
        fitted = refit_kept(gram, weight, rows, strength) if self.refit else weight[rows]
        full = np.zeros_like(weight)
        full[rows] = fitted
        bias = None
        if self.refit and layer.bias is not None:
            bias = layer.bias + moments.mean @ (weight - full)
        return Plan(chain, kept, fitted, bias, relative_output_error(weight, full, gram))


def cheapest_channels(hessian: Array, weight: Array, count: int, patch: int) -> list[int]:
    """Return the channels whose removal, one by one and each with a refit, costs least squared output error.

    With ``D_j`` the diagonal block of ``H^-1`` for channel j, removing it costs ``tr(D_j^-1 W_j W_j^T)``, moves the
    weights by ``-H^-1_:j D_j^-1 W_j`` and the inverse by ``-H^-1_:j D_j^-1 H^-1_j:``. Both moves are kept as products
    of thin matrices; only the blocks ``D_j`` and ``W_j W_j^T`` are kept up to date.

    Args:
        hessian: ``H``, float64 ``[C * patch, C * patch]``, positive definite unless 0.
        weight: ``W``, float64 ``[C * patch, N]``.
        count: How many channels to remove, less than C.
        patch: Rows of ``W`` per channel.

    Returns:
        Channels in the order of their removal, ``count`` of them.
    """
    channels = len(weight) // patch
    scale = float(np.trace(hessian)) / len(hessian)
    if scale <= 0:
        return list(range(channels - count, channels))  # the inputs are constant: a bias replaces any of them
    inverse, blocks = np.linalg.inv(hessian / scale), np.arange(len(weight)).reshape(channels, patch)
    spreads = inverse[blocks[:, :, None], blocks[:, None, :]]
    rows = weight.reshape(channels, patch, -1)
    powers = rows @ rows.transpose(0, 2, 1)
    moves, columns = np.zeros((2, len(weight), count * patch))  # the inverse has lost moves @ columns^T so far,
    taken = np.zeros((count * patch, weight.shape[1]))  # and the weights moves @ taken
    removed: list[int] = []
    for step in range(count):
        costs = np.einsum("cpq,cqp->c", np.linalg.inv(spreads), powers)
        costs[removed] = np.inf
        worst, now = int(np.argmin(costs)), slice(step * patch, (step + 1) * patch)
        block = blocks[worst]
        columns[:, now] = inverse[:, block] - moves @ columns[block].T
        taken[now] = weight[block] - moves[block] @ taken
        shared = (weight @ taken[now].T - moves @ (taken @ taken[now].T)).reshape(channels, patch, patch)
        moves[:, now] = np.linalg.solve(spreads[worst], columns[:, now].T).T
        move = moves[:, now].reshape(channels, patch, patch)
        spreads -= move @ columns[:, now].reshape(channels, patch, patch).transpose(0, 2, 1)
        crossed = move @ shared.transpose(0, 2, 1)
        powers += move @ shared[worst] @ move.transpose(0, 2, 1) - crossed - crossed.transpose(0, 2, 1)
        removed.append(worst)
        spreads[removed] = np.eye(patch)
    return removed


def _chains(weights: Weights) -> tuple[list[Chain], Counter[str]]:
    """Return the chains from front to back, and why layers start none: reason -> count."""
    layers, skipped = linear_layers(weights)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in weights.model.graph.node:
        for name in node.input:
            readers[name].append(node)
    chains = []
    for layer in layers:
        try:
            chains.append(_chain(weights, readers, layer))
        except Unsuited as exc:
            skipped[str(exc)] += 1
    return chains, skipped


def _chain(weights: Weights, readers: Mapping[str, list[onnx.NodeProto]], layer: LinearLayer) -> Chain:
    """Follow the channels of a layer to their only reader.

    Raises:
        Unsuited: If they leave the main graph, are mixed with other tensors, or reach no or several other layers.
    """
    if layer.bias is None and layer.node.op_type != "MatMul":
        raise Unsuited("with a bias that is not one number per channel")
    between, consumers = _follow(weights, readers, layer)
    axes = {layer.node.output[0]: -1 - len(layer.kernel)} | {node.output[0]: axis for node, axis in between}
    for node, _ in between:
        if not all(_known(weights, node, name, axes, layer.outputs) for name in node.input if name):
            raise Unsuited("whose channels meet another tensor, e.g. in a residual connection")
    if len(consumers) != 1:
        raise Unsuited(f"whose channels {len(consumers)} other layers read" if consumers else "that no layer follows")
    consumer = read_layer(weights, consumers[0])
    if consumer.inputs != layer.outputs * consumer.patch:
        raise Unsuited("whose channels are mixed along another axis")
    return Chain(layer, between, consumers[0])


def _follow(
    weights: Weights, readers: Mapping[str, list[onnx.NodeProto]], layer: LinearLayer
) -> tuple[list[tuple[onnx.NodeProto, int]], list[onnx.NodeProto]]:
    """Return the nodes that treat the channels of a layer one by one, with their axes, and those that mix them."""
    axes = {layer.node.output[0]: -1 - len(layer.kernel)}
    between, consumers, pending, pooled = list[tuple[onnx.NodeProto, int]](), list[onnx.NodeProto](), list(axes), ""
    while pending:
        tensor = pending.pop()
        if weights.reads(tensor) != len(readers[tensor]):
            raise Unsuited("whose channels are outputs, or read by a subgraph")
        for node in readers[tensor]:
            if _mixes(weights, node, tensor, axes[tensor]):
                consumers.append(node)
            elif node.output[0] not in axes:
                axes[node.output[0]] = _axis_behind(weights, node, axes[tensor], layer, pooled=tensor == pooled)
                between.append((node, axes[node.output[0]]))
                pending.append(node.output[0])
                pooled = node.output[0] if node.op_type in _GLOBAL_POOLS else pooled
    return between, consumers


def _mixes(weights: Weights, node: onnx.NodeProto, tensor: str, axis: int) -> bool:
    """Whether a node is a layer that takes the tensor as its input, channels along the axis that it sums over."""
    if node.op_type not in _WEIGHTED or node.domain not in ("", "ai.onnx") or node.input[0] != tensor:
        return False
    weight = weights.tensor(node.input[1])
    if weight is None or _groups(node) != 1:
        return False
    return axis == (1 - len(weight.dims) if node.op_type == "Conv" else -1)


def _axis_behind(weights: Weights, node: onnx.NodeProto, axis: int, layer: LinearLayer, *, pooled: bool) -> int:
    """Return the axis of the channels behind a node that treats each on its own, counted from the end.

    Raises:
        Unsuited: If the node does not.
    """
    if any(name and weights.reads(name) for name in node.output[1:]):
        raise Unsuited(f"followed by {node.op_type} with several outputs")
    images = axis < -1
    separate = node.domain in ("", "ai.onnx") and (
        node.op_type in _ELEMENTWISE
        or (images and (node.op_type in _POOLS or _depthwise(weights, node, layer.outputs)))
        or (node.op_type == "BatchNormalization" and (images or layer.node.op_type == "Gemm"))
    )
    if separate:
        return axis
    if node.op_type == "Flatten" and pooled and scalar_settings(node).get("axis", 1) == 1:
        return -1
    raise Unsuited(f"followed by {node.op_type}, which mixes channels or is not known")


def _depthwise(weights: Weights, node: onnx.NodeProto, channels: int) -> bool:
    """Whether a node is a Conv with constants that makes one channel of each channel."""
    weight = weights.tensor(node.input[1]) if node.op_type == "Conv" else None
    return weight is not None and _groups(node) == channels == weight.dims[0]


def _known(weights: Weights, node: onnx.NodeProto, name: str, axes: Mapping[str, int], channels: int) -> bool:
    """Whether an input of a node in a chain is the chain itself, or a constant with or without an axis of channels."""
    if name in axes:
        return node.op_type == "Flatten" or axes[name] == axes[node.output[0]]
    tensor = weights.tensor(name)
    if tensor is None:
        return False
    axis = _channel_axis(node, len(tensor.dims), axes[node.output[0]])
    return axis is None or tensor.dims[axis] in (1, channels)


def _channel_axis(node: onnx.NodeProto, rank: int, axis: int) -> int | None:
    """Return along which axis a constant of a node has the channels, or ``None`` if it has too few axes for any.

    Args:
        node: A node of a chain.
        rank: How many axes the constant has.
        axis: Of the channels of the node's output, counted from the end.
    """
    if node.op_type in ("BatchNormalization", "Conv"):
        return 0
    return rank + axis if rank >= -axis else None


def _narrow(weights: Weights, chain: Chain, kept: Array) -> None:
    """Keep some channels of the producer, and of the constants between it and the consumer."""
    producer, channels = chain.producer, chain.producer.outputs
    if producer.node.op_type != "MatMul" and producer.bias is not None and len(producer.node.input) > 2:
        bias = read_layer(weights, producer.node).bias
        write_layer(weights, producer, producer.matrix[:, kept], None if bias is None else bias[kept])
    else:
        write_layer(weights, producer, producer.matrix[:, kept])
    for node, axis in chain.between:
        for position, name in enumerate(node.input):
            value = weights.constant(name)
            where = None if value is None else _channel_axis(node, value.ndim, axis)
            if value is not None and where is not None and value.shape[where] == channels:
                weights.replace(node, position, np.take(value, kept, axis=where))
        if node.op_type == "Conv":
            next(attribute for attribute in node.attribute if attribute.name == "group").i = len(kept)


def _groups(node: onnx.NodeProto) -> int:
    return int(scalar_settings(node).get("group", 1))


def _result(model: onnx.ModelProto, plans: list[Plan], skipped: Counter[str]) -> PassResult:
    before = sum(plan.chain.producer.outputs for plan in plans)
    removed = before - sum(len(plan.kept) for plan in plans)
    worst = max(plan.error for plan in plans)
    note = f"{removed} of {before} channels between {len(plans)} pairs of layers, output error at most {worst:.2%}"
    counts = {"chains": len(plans), "channels_removed": removed, "skipped": skipped.total()}
    return PassResult(
        model, changed=True, counts=counts, note=f"{note}; skipped: {listed(skipped)}" if skipped else note
    )
