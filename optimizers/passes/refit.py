"""What compression passes share: layers seen as ``y = x W + b``, and closed forms that refit ``W`` to real inputs.

Every closed form needs the inputs only through their Gram matrix ``G = sum(x x^T) / rows``, since the squared error of
the outputs of a layer is ``tr(E^T G E)`` for an error ``E`` of its weights: no gradients, no samples in memory.

Where a layer has a bias, or can be given one, the mean error of its outputs is put there. What is left to fit is their
deviation from the mean, so that ``G`` is then the covariance.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import free_name, nodes_of
from optimizers.passes import PassContext, copy_of
from optimizers.passes.moments import InputMoments, input_moments
from server.tensors import Array

LARGEST_INPUTS = 4096
"""Largest K of a layer: beyond, its Gram matrix takes more than 128 MiB and its decomposition more than minutes."""

_LEAST_RIDGE = 1e-6  # of the mean diagonal: keeps a singular Gram matrix invertible at a condition of at most 1e6 K
_LARGEST_RIDGE = 1e3  # practically the old weights
_GRAM_BYTES = 256 * 2**20  # Gram matrices held at a time


class Unsuited(Exception):
    """A layer cannot be taken; the message is the reason, worded so that it can be counted."""


class LinearLayer(msgspec.Struct, frozen=True):
    """A MatMul, a Gemm, or a Conv with one group, whose weight is constant and has no other reader.

    Attributes:
        node: The node, in the model under edit.
        tensor: Its weight.
        inputs: K; ``Cin * kh * kw`` for Conv.
        outputs: N.
        kernel: Spatial sizes of the kernel; empty for MatMul and Gemm.
        bias: ``b``, float64 ``[N]``, zeros where there is none yet; ``None`` where none can be set.
        bias_reader: The node that adds the bias (the Add behind a MatMul); ``None`` where none can be set.
        bias_position: Which input of that node the bias is.
    """

    node: onnx.NodeProto
    tensor: onnx.TensorProto
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    bias: Array | None = None
    bias_reader: onnx.NodeProto | None = None
    bias_position: int = 2

    @property
    def matrix(self) -> Array:
        """``W`` as it is now, float64 ``[K, N]``, for Conv in the order of the weight; decoded anew at every access."""
        weight = numpy_helper.to_array(self.tensor)
        if self.node.op_type == "Conv":
            return weight.reshape(len(weight), -1).T.astype(np.float64)
        return (weight.T if scalar_settings(self.node).get("transB") else weight).astype(np.float64)

    @property
    def patch(self) -> int:
        """Rows of ``matrix`` per input channel: the size of the kernel."""
        return math.prod(self.kernel)

    def gram(self, moments: InputMoments) -> Array:
        """Return what to fit by, ``[K, K]``: the covariance of the inputs if a bias takes the mean, else their Gram."""
        return moments.gram if self.bias is None else moments.gram - np.outer(moments.mean, moments.mean)


class Weights:
    """The constants of a model under edit: who reads them, and how to replace one for one reader."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._given = {value.name for value in model.graph.input}
        self._readers = _reads(model)

    def reads(self, name: str) -> int:
        """Return how often a tensor is read: by nodes, by nodes of subgraphs, and as an output."""
        return self._readers[name]

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """Return an initializer that callers cannot override, or ``None`` if the name is something else."""
        return None if name in self._given else self._tensors.get(name)

    def constant(self, name: str) -> Array | None:
        """Return the value of an initializer that callers cannot override, or ``None`` for other names."""
        tensor = self.tensor(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def replace(self, node: onnx.NodeProto, position: int, array: Array) -> None:
        """Give a node another constant: under the old name if nobody else reads it, else under a new one."""
        name = node.input[position]
        if self._readers[name] == 1 and name in self._tensors:
            self._tensors[name].CopyFrom(numpy_helper.from_array(array, name))
            return
        self._readers[name] -= 1
        node.input[position] = self.add(name, array)

    def add(self, wish: str, array: Array) -> str:
        """Add an initializer for one reader and return its name, which is the wish plus a number if need be."""
        name = self.free_name(wish)
        tensor = self.model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
        self._tensors[name] = tensor
        self._readers[name] = 1
        return name

    def remove(self, name: str) -> None:
        """Remove an initializer that nobody reads any more."""
        self.model.graph.initializer.remove(self._tensors.pop(name))
        del self._readers[name]

    def free_name(self, wish: str) -> str:
        """Return the wish, or the wish and a number, as a name that no tensor has."""
        taken = self._readers.keys() | self._tensors.keys() | self._given
        taken |= {name for node in nodes_of(self.model) for name in node.output}
        return free_name(wish, taken)


def editable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node of the main graph has a name, by which its moments are asked for."""
    twin = copy_of(model)
    taken = {node.name for node in twin.graph.node}
    for index, node in enumerate(twin.graph.node):
        wish = f"{node.op_type}_{index}"
        node.name = node.name or (wish if wish not in taken else f"{wish}_{node.output[0]}")
    return twin


def linear_layers(weights: Weights) -> tuple[list[LinearLayer], Counter[str]]:
    """Return the layers of the main graph that can be taken, in its order, and why others cannot: reason -> count."""
    layers, skipped = [], Counter[str]()
    for node in weights.model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        if len(node.input) < 2 or weights.tensor(node.input[1]) is None:
            continue
        try:
            layers.append(read_layer(weights, node))
        except Unsuited as exc:
            skipped[str(exc)] += 1
    return layers, skipped


def read_layer(weights: Weights, node: onnx.NodeProto) -> LinearLayer:
    """Return a MatMul, Gemm or Conv as a layer.

    Raises:
        Unsuited: If its weight is not a FLOAT constant of its own, if the node transposes or scales its input, if it
            has several groups or another node has its name, or if K is above 4096.
    """
    weight, settings, convolution = weights.tensor(node.input[1]), scalar_settings(node), node.op_type == "Conv"
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or (len(weight.dims) != 2 and not convolution):
        raise Unsuited("without a constant FP32 matrix")
    if weights.reads(node.input[1]) != 1:
        raise Unsuited("with a weight that is shared or an output")
    if sum(other.name == node.name for other in weights.model.graph.node) > 1:
        raise Unsuited("with a name that is not unique")
    if settings.get("group", 1) != 1:
        raise Unsuited("with several groups")
    if settings.get("transA") or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1:
        raise Unsuited("with a transposed or scaled input")
    outputs = weight.dims[0] if convolution or settings.get("transB") else weight.dims[1]
    inputs = math.prod(weight.dims) // max(outputs, 1)
    if inputs > LARGEST_INPUTS:
        raise Unsuited(f"with more than {LARGEST_INPUTS} inputs")
    kernel = tuple(weight.dims[2:]) if convolution else ()
    return LinearLayer(node, weight, inputs, outputs, kernel, *_bias_of(weights, node, outputs))


def write_layer(weights: Weights, layer: LinearLayer, matrix: Array, bias: Array | None = None) -> None:
    """Give a layer another matrix ``[K', N']`` in the layout of its old one, and another bias.

    Args:
        weights: Of the model under edit.
        layer: The layer; ``layer.bias`` must not be ``None`` if a bias is given.
        matrix: New weights, rounded to FP32.
        bias: New bias ``[N']``; ``None`` leaves the bias as it is.
    """
    weights.replace(layer.node, 1, stored(layer, matrix))
    if bias is not None:
        write_bias(weights, layer, bias)


def write_bias(weights: Weights, layer: LinearLayer, bias: Array) -> None:
    """Give a layer another bias ``[N']``, and an input for it where it had none."""
    reader, position = layer.bias_reader, layer.bias_position
    if reader is None:
        raise ValueError(f"node '{layer.node.name}' can have no bias")
    old = weights.constant(reader.input[position]) if position < len(reader.input) else None
    if old is not None:
        shape = (*(1,) * (old.ndim - 1), len(bias))
        weights.replace(reader, position, bias.astype(np.float32).reshape(shape))
        return
    del reader.input[position:]
    reader.input.append(weights.add(f"{reader.name}_bias", bias.astype(np.float32)))


def stored(layer: LinearLayer, matrix: Array) -> Array:
    """Return a matrix ``[K', N']`` in the layout in which the layer's node reads it, as FP32."""
    if layer.node.op_type == "Conv":
        channels = len(matrix) // layer.patch
        return np.ascontiguousarray(matrix.T.reshape(-1, channels, *layer.kernel), np.float32)
    return np.ascontiguousarray(matrix.T if scalar_settings(layer.node).get("transB") else matrix, np.float32)


def observed_moments(
    model: onnx.ModelProto, layers: Sequence[LinearLayer], context: PassContext
) -> Iterator[tuple[LinearLayer, InputMoments]]:
    """Yield each layer that saw a finite input with the moments of its inputs, in groups of bounded memory.

    Args:
        model: The model that is observed; it has nodes of the names of the layers.
        layers: The layers to observe.
        context: The calibration data and a folder.

    Raises:
        PassFailed: If the model does not run on the data.
    """
    for group in _groups(layers):
        moments = input_moments(model, [layer.node.name for layer in group], context.calibration, context.work)
        yield from ((layer, moments[layer.node.name]) for layer in group if layer.node.name in moments)


def require_calibration(context: PassContext) -> None:
    """Require calibration data.

    Raises:
        PassFailed: If there is none.
    """
    if not context.calibration:
        raise PassFailed("no calibration data; give --calibration DATA.npz")


def listed(reasons: Mapping[str, int]) -> str:
    """Return reasons with their counts in one line, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def ridge(gram: Array, cross: Array, old: Array, strength: float) -> Array:
    """Return the weights that give the wanted outputs with least squared error, drawn toward the old ones.

    ``W' = (G + l I)^-1 (C + l W)`` minimizes ``E |x W' - y|^2 + l |W' - W|^2``.

    Source: A. Hoerl, R. Kennard, Ridge regression, Technometrics 12 (1970), with the prior at W instead of 0.

    Args:
        gram: ``G = E x x^T``, float64 ``[K, K]``; may be singular.
        cross: ``C = E x y^T``, float64 ``[K, N]``.
        old: ``W``, float64 ``[K, N]``.
        strength: ``l`` as a multiple of the mean diagonal of ``G``; at least 1e-6 is taken.

    Returns:
        ``W'``, float64 ``[K, N]``; ``W`` itself where all inputs are 0.
    """
    pull = _pull(gram, strength)
    if pull == 0:
        return old.copy()
    solution: Array = np.linalg.solve(gram + pull * np.eye(len(gram)), cross + pull * old)
    return solution


def refit_kept(gram: Array, weight: Array, kept: Array, strength: float) -> Array:
    """Return the weights of the inputs that are kept, so that the outputs change least when the others are gone.

    ``W'_k = (G_kk + l I)^-1 (G_k: W + l W_k)``: ``ridge`` for the inputs ``x_k`` and the old outputs ``x W``. A large
    ``l`` gives ``W_k``, which is dropping without a refit.

    Args:
        gram: ``G``, float64 ``[K, K]``.
        weight: ``W``, float64 ``[K, N]``.
        kept: Indices of the inputs to keep, ascending, ``[k]``.
        strength: ``l`` as a multiple of the mean diagonal of ``G_kk``.

    Returns:
        ``W'_k``, float64 ``[k, N]``.
    """
    return ridge(gram[np.ix_(kept, kept)], gram[kept] @ weight, weight[kept], strength)


def ridge_strength(gram: Array, rows: int) -> float:
    """Return how far few rows are to be trusted, as a ridge relative to the mean diagonal of their Gram matrix.

    The Gram matrix of n rows is best replaced by ``(1 - r) G + r m I``, ``m`` the mean diagonal, with
    ``r = ((1 - 2/K) tr(G^2) + tr(G)^2) / ((n + 1 - 2/K) (tr(G^2) - tr(G)^2 / K))``, at most 1; this is
    ``G + r / (1 - r) m I`` but for its scale.

    Source: Y. Chen et al., Shrinkage algorithms for MMSE covariance estimation (OAS), IEEE Trans. Signal
    Processing 58 (2010).

    Args:
        gram: ``G``, float64 ``[K, K]``.
        rows: n, at least 1.

    Returns:
        ``r / (1 - r)``, from 1e-6 to 1e3.
    """
    size, squares, square = len(gram), float(np.sum(gram * gram)), float(np.trace(gram)) ** 2
    spread = (rows + 1 - 2 / size) * (squares - square / size)
    if spread <= 0:
        return _LARGEST_RIDGE
    share = min(((1 - 2 / size) * squares + square) / spread, 1.0)
    return float(np.clip(share / max(1 - share, 1e-9), _LEAST_RIDGE, _LARGEST_RIDGE))


def shrunk(gram: Array, strength: float) -> Array:
    """Return ``G + l I``, which is positive definite unless ``G`` is 0; ``strength`` as for ``ridge``."""
    return gram + _pull(gram, strength) * np.eye(len(gram))


def relative_output_error(weight: Array, candidate: Array, gram: Array) -> float:
    """Return ``tr(E^T G E) / tr(W^T G W)`` with ``E = W' - W``: squared error of the outputs over their energy.

    Args:
        weight: ``W``, float64 ``[K, N]``.
        candidate: ``W'``, float64 ``[K, N]``; removed inputs have rows of zeros.
        gram: ``G``, float64 ``[K, K]``.

    Returns:
        0 for no error; 0.01 is an SQNR of 20 dB. Infinite where outputs were 0 and no longer are.
    """
    error = candidate - weight
    lost, energy = float(np.sum(error * (gram @ error))), float(np.sum(weight * (gram @ weight)))
    if energy <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / energy


def _pull(gram: Array, strength: float) -> float:
    return max(strength, _LEAST_RIDGE) * float(np.trace(gram)) / max(len(gram), 1)


def _reads(model: onnx.ModelProto) -> Counter[str]:
    readers = Counter(value.name for value in model.graph.output)
    for node in nodes_of(model):
        readers.update(node.input)
        for attribute in node.attribute:
            for graph in (*attribute.graphs, attribute.g):
                readers.update(value.name for value in graph.output)
    return readers


def _groups(layers: Sequence[LinearLayer]) -> Iterator[list[LinearLayer]]:
    group: list[LinearLayer] = []
    total = 0
    for layer in layers:
        size = 8 * layer.inputs**2
        if group and total + size > _GRAM_BYTES:
            yield group
            group, total = [], 0
        group.append(layer)
        total += size
    if group:
        yield group


def _bias_of(weights: Weights, node: onnx.NodeProto, outputs: int) -> tuple[Array | None, onnx.NodeProto | None, int]:
    """Return the bias, its reader and its position there, or what says that none can be set."""
    reader, position = (node, 2) if node.op_type != "MatMul" else _add_behind(weights, node)
    if reader is None:
        return None, None, 2
    if len(reader.input) <= position or not reader.input[position]:
        return np.zeros(outputs), reader, position
    value = weights.constant(reader.input[position])
    if value is None or value.size not in (1, outputs) or value.size != (value.shape or (1,))[-1]:
        return None, None, 2
    return np.broadcast_to(value.reshape(-1), (outputs,)).astype(np.float64), reader, position


def _add_behind(weights: Weights, node: onnx.NodeProto) -> tuple[onnx.NodeProto | None, int]:
    """Return the Add of a constant that alone reads a MatMul, and which input the constant is."""
    if weights.reads(node.output[0]) != 1:
        return None, 2
    for reader in weights.model.graph.node:
        if node.output[0] in reader.input:
            position = 1 - list(reader.input).index(node.output[0])
            constant = reader.op_type == "Add" and weights.tensor(reader.input[position]) is not None
            return (reader, position) if constant else (None, 2)
    return None, 2


def scalar_settings(node: onnx.NodeProto) -> dict[str, int | float]:
    """Return the attributes that are one number."""
    scalars = (a for a in node.attribute if a.type in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT))
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in scalars}
