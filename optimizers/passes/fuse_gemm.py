"""Fusions into Gemm: a product of matrices and what follows it."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from optimizers.passes.rules import Rule, axis_size, constant, made_by, rank, refused, tensor_like, weight, weight_name

_DEFAULT_EPSILON = 1e-5  # of BatchNormalization


class MatMulAdd(Rule):
    """``MatMul(A, B) + C = Gemm(A, B, C)`` for matrices ``A [M, K]`` and ``B [K, N]`` and a bias for each column."""

    def pattern(self, op: Any, a: Any, b: Any, c: Any) -> Any:
        """The last operators of what is replaced."""
        return op.Add(op.MatMul(a, b, _outputs=["product"]), c)

    def check(self, _context: Any, a: ir.Value, b: ir.Value, c: ir.Value, **_: Any) -> MatchResult:
        """Both factors are matrices, and the bias has one element, or one for each column."""
        if rank(a) != 2 or rank(b) != 2:
            return refused(f"the factors have {rank(a)} and {rank(b)} axes; Gemm takes matrices")
        array = constant(b)
        if array is None or array.dtype.kind != "f":
            return refused(f"'{b.name}' is not a constant weight of floats")
        columns = axis_size(b, 1)
        sizes = None if c.shape is None else list(c.shape)
        if sizes not in ([columns], [1, columns], [1], [1, 1], []):
            return refused(f"the bias has shape {sizes}, the product has {columns} columns")
        return MatchResult()

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, c: ir.Value, product: ir.Value) -> Any:
        """Make the one operator."""
        fused = op.Gemm(a, b, c)
        fused.producer().name = made_by(product).name
        return fused


class GemmBatchNormalization(Rule):
    """``BN(alpha A B + beta C) = Gemm(A, s B, s (beta C - mean) + shift)`` with ``s = gamma / sqrt(var + epsilon)``."""

    def pattern(self, op: Any, x: Any) -> Any:
        """The last operators of what is replaced."""
        product = op.Gemm(x, _allow_other_inputs=True, _outputs=["product"])
        return op.BatchNormalization(product, _allow_other_inputs=True, _outputs=["normalized"])

    def check(self, _context: Any, product: ir.Value, normalized: ir.Value, **_: Any) -> MatchResult:
        """All weights and statistics are constant, and the statistics are not those of the batch."""
        norm, gemm = made_by(normalized), made_by(product)
        if norm.attributes.get_int("training_mode", 0) or len(norm.outputs) > 1:
            return refused("BatchNormalization in training mode computes its own statistics")
        if any(constant(value) is None for value in (*norm.inputs[1:], *gemm.inputs[1:])):
            return refused("a weight or a statistic is not constant")
        bias = constant(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
        if bias is not None and bias.ndim == 2 and bias.shape[0] != 1:
            return refused(f"the bias has shape {list(bias.shape)}, which is not one element per column")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, product: ir.Value, normalized: ir.Value) -> Any:
        """Make the one operator."""
        norm, gemm = made_by(normalized), made_by(product)
        gamma, shift, mean, variance = (weight(value) for value in norm.inputs[1:5])
        scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", _DEFAULT_EPSILON))
        columns = weight(gemm.inputs[1])
        transposed = gemm.attributes.get_int("transB", 0)
        old = weight(gemm.inputs[2]).reshape(-1) if len(gemm.inputs) > 2 else 0.0
        bias = (gemm.attributes.get_float("beta", 1.0) * old - mean) * scale + shift
        kept = {name: value for name, value in gemm.attributes.items() if name != "beta"}
        name = product.name
        fused = op.Gemm(
            x,
            op.initializer(
                tensor_like(columns * (scale[:, None] if transposed else scale), gemm.inputs[1]),
                weight_name(gemm, f"{name}_weight"),
            ),
            op.initializer(tensor_like(bias, gemm.inputs[1]), weight_name(gemm, f"{name}_bias")),
            **kept,
        )
        fused.producer().name = gemm.name
        return fused


GEMM_RULES: dict[str, list[RewriteRule]] = {
    "MatMul+Add": MatMulAdd.build(commuted=True),
    "Gemm+BatchNormalization": GemmBatchNormalization.build(),
}
"""Name of the fusion -> its rules."""
