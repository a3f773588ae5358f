"""Low-rank factorization: one large layer becomes two smaller ones, chosen by what real inputs make of it."""

from collections import Counter
from typing import Annotated

import msgspec
import numpy as np
import onnx
from msgspec import Meta
from onnx import helper

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
    relative_output_error,
    require_calibration,
    shrunk,
    write_bias,
)
from optimizers.passes.settle import settle
from server.tensors import Array

LARGEST_SHARE = 0.75
"""Of the multiplications of a layer: two products of nearly its size are slower than the layer itself."""

_ROUNDING = 1e-12  # share of the energy that the rounding of weights to FP32 stays below


class Factors(msgspec.Struct, frozen=True):
    """Two layers in the place of one.

    Attributes:
        first: ``A``, FP32 ``[K, r]``.
        second: ``B``, FP32 ``[r, N]``.
        bias: FP32 ``[N]``; ``None`` leaves it as it is.
        error: Squared error of the outputs over their energy, on the calibration data.
    """

    first: Array
    second: Array
    bias: Array | None
    error: float


class LowRank(msgspec.Struct, frozen=True):
    """Factorize MatMul, Gemm and Conv weights ``W[K, N]`` into ``A[K, r] B[r, N]``, where that saves a quarter or more.

    A Conv becomes one with r kernels of the same size, and a 1x1 Conv. The outputs ``y = x W`` are projected onto
    their r principal directions: with ``V`` the leading eigenvectors of ``W^T G W``, ``A = W V`` and ``B = V^T``. This
    is the truncated singular value decomposition of ``G^(1/2) W``, and thus the least output error that any weight of
    rank r has over the calibration data. Where a layer has a bias or can be given one, ``G`` is the covariance of the
    inputs, and the bias takes what the mean output loses.

    The second factor keeps the name of the node and of its output. The error on n rows is corrected for how many
    directions were fitted to them (``least_rank``); without that, as many directions as there are rows would seem to be
    all that a layer needs.

    Source: C. Eckart, G. Young, The approximation of one matrix by another of lower rank (1936); on outputs as in
    X. Zhang et al., Accelerating very deep convolutional networks, arXiv 1505.06798, section 3.1.

    Attributes:
        energy: Share of the energy of a layer's outputs that must remain; r is the smallest rank that keeps it.
        share: Instead of ``energy``, the share of a layer's multiplications that may remain.
    """

    energy: Annotated[float, Meta(gt=0, le=1)] = 0.99
    share: Annotated[float, Meta(gt=0, lt=LARGEST_SHARE)] | None = None

    @property
    def spec(self) -> PassSpec:
        """Declare the pass."""
        return PassSpec("low-rank", 1, "lossy", needs=frozenset({"calibration"}))

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data, if the model does not run on it, or if no layer has a rank
                that is low enough, with the reasons.
        """
        require_calibration(context)
        twin = editable(model)
        weights = Weights(twin)
        layers, skipped = linear_layers(weights)
        plans, shares = [], []
        for layer, moments in observed_moments(twin, layers, context):
            try:
                rank, directions = self._rank(layer, moments)
            except Unsuited as exc:
                skipped[str(exc)] += 1
                continue
            shares.append(_cost(layer, rank))
            if shares[-1] < LARGEST_SHARE:
                plans.append((layer, factorize(layer, moments, directions[:, :rank])))
            else:
                skipped[f"that would keep {LARGEST_SHARE:.0%} or more of the multiplications"] += 1
        if not plans:
            raise PassFailed(self._refusal(shares, skipped))
        for layer, factors in plans:
            _replace(weights, layer, factors)
        settle(twin, model)
        counts = {"factorized": len(plans), "skipped": skipped.total()}
        return PassResult(twin, changed=True, counts=counts, note=_note(plans, skipped))

    def _rank(self, layer: LinearLayer, moments: InputMoments) -> tuple[int, Array]:
        """Return the rank that the settings ask for, and the principal directions of the outputs.

        Raises:
            Unsuited: If the inputs never vary, or if not even rank 1 saves enough.
        """
        gram = layer.gram(moments)
        energies, directions = principal_outputs(layer.matrix, shrunk(gram, 0.0))
        if self.share is None:
            free = moments.rows - (layer.bias is not None)  # the mean took one
            return least_rank(energies, self.energy, max(free, 1)), directions
        rank = int(self.share * layer.inputs * layer.outputs / (layer.inputs + layer.outputs))
        if rank == 0:
            raise Unsuited(f"too small for {self.share:.0%} of the multiplications")
        return rank, directions

    def _refusal(self, shares: list[float], skipped: Counter[str]) -> str:
        if not shares and not skipped:
            return "no MatMul, Gemm or Conv has a constant weight"
        wanted = f"at {self.energy:g} of the energy" if self.share is None else f"at a share of {self.share:g}"
        least = f"; the best would keep {min(shares):.0%} of its multiplications" if shares else ""
        return f"no layer has a rank low enough {wanted}: {listed(skipped)}{least}"


def principal_outputs(weight: Array, gram: Array) -> tuple[Array, Array]:
    """Return the energies and the directions of the principal components of the outputs ``y = x W``.

    The eigenvectors of ``W^T G W``; for more outputs than inputs, the right singular vectors of ``L^T W`` with
    ``G = L L^T``, which are the same.

    Args:
        weight: ``W``, float64 ``[K, N]``.
        gram: ``G``, float64 ``[K, K]``, positive definite.

    Returns:
        Energies, largest first, ``[m]`` with m = min(K, N), and orthonormal directions as columns, ``[N, m]``.

    Raises:
        Unsuited: If ``G`` is not positive definite, that is, if the inputs never vary.
    """
    inputs, outputs = weight.shape
    try:
        root = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError as exc:
        raise Unsuited("with inputs that never vary") from exc
    scaled = root.T @ weight
    if outputs <= inputs:
        energies, directions = np.linalg.eigh(scaled.T @ scaled)
        return energies[::-1].clip(min=0), directions[:, ::-1]
    energies, directions = np.linalg.eigh(scaled @ scaled.T)
    return energies[::-1].clip(min=0), np.linalg.qr(scaled.T @ directions[:, ::-1])[0]


def least_rank(energies: Array, share: float, rows: int) -> int:
    """Return the smallest rank, at least 1, whose expected error on other rows is below ``1 - share`` of the energy.

    The energy that r directions leave out of the n rows that they were fitted to is divided by ``(1 - r / n)^2``.

    Source: G. Golub, M. Heath, G. Wahba, Generalized cross-validation, Technometrics 21 (1979).

    Args:
        energies: Of the principal directions, largest first, ``[m]``.
        share: From 0 to 1; the rounding of FP32 does not count.
        rows: n, how many rows the energies come from.

    Returns:
        The rank; m if none suffices, e.g. because there are too few rows.
    """
    lost = np.cumsum(energies[::-1])[::-1]  # lost[r]: what rank r leaves out
    freedom = np.clip(1 - np.arange(len(lost)) / rows, 0, None) ** 2
    enough = np.flatnonzero(lost <= (1 - share + _ROUNDING) * lost[0] * freedom)
    return max(int(enough[0]), 1) if enough.size else len(energies)


def factorize(layer: LinearLayer, moments: InputMoments, directions: Array) -> Factors:
    """Return the factors of a layer whose outputs are projected onto orthonormal directions ``[N, r]``."""
    weight = layer.matrix
    first, second = (weight @ directions).astype(np.float32), directions.T.astype(np.float32)
    product = first.astype(np.float64) @ second
    bias = None if layer.bias is None else (layer.bias + moments.mean @ (weight - product)).astype(np.float32)
    return Factors(first, second, bias, relative_output_error(weight, product, layer.gram(moments)))


def _cost(layer: LinearLayer, rank: int) -> float:
    """Return the multiplications of both factors as a share of those of the layer."""
    return rank * (layer.inputs + layer.outputs) / (layer.inputs * layer.outputs)


def _replace(weights: Weights, layer: LinearLayer, factors: Factors) -> None:
    """Put the first factor before the node of a layer, and the second into it."""
    node, graph = layer.node, weights.model.graph
    old = node.input[1]
    if factors.bias is not None:
        write_bias(weights, layer, factors.bias)
    first, second = factors.first, factors.second
    if node.op_type == "Conv":
        first = first.T.reshape(-1, len(first) // layer.patch, *layer.kernel)
        second = second.T.reshape(*second.T.shape, *(1 for _ in layer.kernel))
    inner = weights.free_name(f"{node.output[0]}_rank_{len(factors.second)}")
    before = helper.make_node(node.op_type, [node.input[0], ""], [inner], f"{node.name}_first_factor")
    if node.op_type == "Conv":  # strides, pads and dilations belong to the first factor
        before.attribute.extend(attribute for attribute in node.attribute)
    del node.attribute[:]
    before.input[1] = weights.add(f"{old}_first_factor", first)
    node.input[0] = inner
    node.input[1] = weights.add(f"{old}_second_factor", second)
    weights.remove(old)
    index = next(index for index, other in enumerate(graph.node) if other.output[0] == node.output[0])
    graph.node.insert(index, before)


def _note(plans: list[tuple[LinearLayer, Factors]], skipped: Counter[str]) -> str:
    before = sum(layer.inputs * layer.outputs for layer, _ in plans)
    after = sum(factors.first.size + factors.second.size for _, factors in plans)
    worst = max(factors.error for _, factors in plans)
    note = f"{after / before:.0%} of the weights of {len(plans)} layers remain, output error at most {worst:.2%}"
    return f"{note}; skipped: {listed(skipped)}" if skipped else note
