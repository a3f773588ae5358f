"""2:4 sparsity: two of every four weights are zero, which tensor cores of NVIDIA GPUs multiply twice as fast."""

from typing import ClassVar

import numpy as np
import onnx

from optimizers.errors import PassFailed
from optimizers.passes import PassContext, PassResult, PassSpec
from optimizers.passes.refit import (
    LinearLayer,
    Weights,
    editable,
    linear_layers,
    listed,
    observed_moments,
    relative_output_error,
    require_calibration,
    ridge_strength,
    shrunk,
    write_layer,
)
from optimizers.passes.settle import settle
from server.tensors import Array

GROUP, KEPT = 4, 2
_BLOCK = 128  # rows that are updated at once, a multiple of GROUP: the rest follows in one product


class Sparsity24:
    """Set 2 of every 4 weights of MatMul, Gemm and Conv to zero, along the inputs, and let the others make up for them.

    For TensorRT only: it multiplies such weights in half the time on NVIDIA GPUs since Ampere, if told to
    (``BuilderFlag.SPARSE_WEIGHTS``) and where it finds that faster; everywhere else zeros cost as much as other
    numbers. The pattern follows TensorRT's documentation; that it pays was not verified on a GPU.

    The groups of a Conv are neighbouring input channels at one place of the kernel. Going through the inputs in order,
    the two weights of a group go that have the least ``W_kn^2 / U_kk^2``, where ``(G + l I)^-1 = U^T U``; this is
    ``W_kn^2 G_kk`` where the inputs are uncorrelated. The error of each is made up for by the weights that are still to
    come: ``W_k+1: -= U_k,k+1: W_kn / U_kk``. Where a layer has a bias or can be given one, ``G`` is the covariance of
    the inputs, and the bias takes what the mean output loses.

    Source: E. Frantar, D. Alistarh, SparseGPT, arXiv 2301.00774; A. Mishra et al., Accelerating sparse deep neural
    networks, arXiv 2104.08378.
    """

    spec: ClassVar[PassSpec] = PassSpec("sparsity-2-4", 1, "lossy", needs=frozenset({"calibration"}), target="tensorrt")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Raises:
            PassFailed: If there is no calibration data, if the model does not run on it, or if no weight can be made
                sparse, with the reasons.
        """
        require_calibration(context)
        twin = editable(model)
        weights = Weights(twin)
        layers, skipped = linear_layers(weights)
        divisible = [layer for layer in layers if layer.inputs // layer.patch % GROUP == 0]
        if len(divisible) < len(layers):
            skipped[f"whose inputs are no multiple of {GROUP}"] = len(layers) - len(divisible)
        dense = [layer for layer in divisible if not is_sparse(by_place(layer.matrix, layer.patch))]
        if divisible and not dense:
            return PassResult(model, changed=False, note=f"{len(divisible)} layers are 2:4 sparse already")
        plans = []
        for layer, moments in observed_moments(twin, dense, context):
            gram, weight = layer.gram(moments), layer.matrix
            matrix = sparse_weight(layer, shrunk(gram, ridge_strength(gram, moments.rows)))
            bias = None if layer.bias is None else layer.bias + moments.mean @ (weight - matrix)
            plans.append((layer, matrix.astype(np.float32), bias, relative_output_error(weight, matrix, gram)))
        if not plans:
            raise PassFailed(f"no weight can be made sparse: {listed(skipped) or 'no layer has a constant weight'}")
        for layer, matrix, bias, _ in plans:
            write_layer(weights, layer, matrix, bias)
        settle(twin, model)
        note = f"{len(plans)} layers, output error at most {max(error for *_, error in plans):.2%}"
        counts = {"sparse": len(plans), "skipped": skipped.total()}
        return PassResult(
            twin, changed=True, counts=counts, note=f"{note}; skipped: {listed(skipped)}" if skipped else note
        )


def sparse_weight(layer: LinearLayer, hessian: Array) -> Array:
    """Return the sparse weight of a layer, float64 ``[K, N]``; ``hessian`` in the order of its own weight."""
    order = by_place(np.arange(layer.inputs), layer.patch)
    matrix = np.empty((layer.inputs, layer.outputs))
    matrix[order] = two_of_four(layer.matrix[order], hessian[np.ix_(order, order)])
    return matrix


def by_place(rows: Array, patch: int) -> Array:
    """Return rows ``[C * patch, ...]`` reordered to ``[patch * C, ...]``, so that neighbours are input channels."""
    return rows.reshape(-1, patch, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def is_sparse(weight: Array) -> bool:
    """Whether every 4 rows of ``[K, N]``, K a multiple of 4, have at most 2 non-zeros in each column."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    return bool((np.count_nonzero(groups, axis=1) <= KEPT).all())


def two_of_four(weight: Array, hessian: Array) -> Array:
    """Return a weight with at most 2 non-zeros in every 4 rows of each column, fitted to keep the outputs.

    Args:
        weight: ``W``, float64 ``[K, N]``, K a multiple of 4.
        hessian: ``G + l I``, float64 ``[K, K]``, positive definite unless 0.

    Returns:
        The sparse weight, float64 ``[K, N]``.
    """
    scale = float(np.trace(hessian)) / len(hessian)
    root = np.linalg.cholesky(np.linalg.inv(hessian / scale)).T if scale > 0 else np.eye(len(hessian))
    sparse = weight.copy()
    for start in range(0, len(sparse), _BLOCK):
        end = min(start + _BLOCK, len(sparse))
        errors = _prune_block(sparse[start:end], root[start:end, start:end])
        sparse[end:] -= root[start:end, end:].T @ errors
    return sparse


def _prune_block(block: Array, root: Array) -> Array:
    """Prune some rows in place, and return ``W_kn / U_kk`` of what went, by which later rows are to change."""
    errors = np.zeros_like(block)
    for row in range(len(block)):
        if row % GROUP == 0:
            group = slice(row, row + GROUP)
            saliency = (block[group] / np.diag(root)[group, None]) ** 2
            least = np.argsort(saliency, axis=0, kind="stable")[: GROUP - KEPT]
            gone = np.zeros((GROUP, block.shape[1]), bool)
            np.put_along_axis(gone, least, values=True, axis=0)
        errors[row] = np.where(gone[row % GROUP], block[row], 0.0) / root[row, row]
        block[row:] -= np.outer(root[row, row:], errors[row])
        block[row][gone[row % GROUP]] = 0.0
    return errors
