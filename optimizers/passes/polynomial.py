"""Arithmetic with constants as a polynomial: the same value however an exporter ordered its operators.

GELU alone is written as ``0.5 * x * (1 + f)``, ``x * (0.5 * (1 + f))``, ``(x * 0.5) * (f + 1)`` and so on; as a
polynomial in ``x`` and ``f`` all of them are ``0.5 x + 0.5 x f``.
"""

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from optimizers.passes.rules import private, scalar

Polynomial = dict[tuple[int, ...], float]
"""Exponents, one for each variable -> coefficient."""

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Pow"})
_MOST_TERMS = 8
_HIGHEST_POWER = 3
_RELATIVE = 1e-4  # exporters round constants to FP32 or even to six digits


def leaves(root: ir.Value) -> list[ir.Value]:
    """Return what the arithmetic above a value starts from, each once; constants are left out.

    Values that other nodes or callers read too count as leaves, since they must stay whatever is replaced.
    """
    found: list[ir.Value] = []
    pending = [root]
    while pending and len(found) <= _MOST_TERMS:
        value = pending.pop()
        node = _arithmetic(value) if value is root or private(value) else None
        if node is not None:
            pending.extend(operand for operand in node.inputs if operand is not None and scalar(operand) is None)
        elif not any(value is other for other in found):
            found.append(value)
    return found


def polynomial(root: ir.Value, variables: Sequence[ir.Value]) -> Polynomial | None:
    """Return a value as a polynomial in the given ones, or ``None`` when it is none, or a long one."""
    for index, variable in enumerate(variables):
        if root is variable:
            return {tuple(int(index == other) for other in range(len(variables))): 1.0}
    number = scalar(root, variables[0])
    if number is not None:
        return {(0,) * len(variables): number}
    node = _arithmetic(root)
    if node is None:
        return None
    operands = [polynomial(operand, variables) if operand is not None else None for operand in node.inputs]
    known = [operand for operand in operands if operand is not None]
    made = _computed(node.op_type, known) if len(known) == len(operands) else None
    return made if made is not None and len(made) <= _MOST_TERMS else None


def same(seen: Polynomial | None, wanted: Mapping[tuple[int, ...], float]) -> bool:
    """Whether two polynomials have the same terms, with coefficients equal to 1e-4 of their value."""
    return (
        seen is not None
        and seen.keys() == wanted.keys()
        and all(math.isclose(value, wanted[term], rel_tol=_RELATIVE) for term, value in seen.items())
    )


def _arithmetic(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type in _ARITHMETIC and node.domain in ("", "ai.onnx") else None


def _computed(op_type: str, operands: Sequence[Polynomial]) -> Polynomial | None:
    left, right = operands[0], operands[-1]
    if op_type == "Neg":
        return {term: -value for term, value in left.items()}
    if op_type == "Add":
        return _sum(left, right, 1.0)
    if op_type == "Sub":
        return _sum(left, right, -1.0)
    if op_type == "Mul":
        return _product(left, right)
    number = next(iter(right.values())) if len(right) == 1 and not any(next(iter(right))) else 0.0
    if op_type == "Div":
        return {term: value / number for term, value in left.items()} if number else None
    if number != round(number) or not 1 <= number <= _HIGHEST_POWER:
        return None
    power = left
    for _ in range(round(number) - 1):
        power = _product(power, left)
    return power


def _sum(left: Polynomial, right: Polynomial, sign: float) -> Polynomial:
    terms = {term: left.get(term, 0.0) + sign * right.get(term, 0.0) for term in left.keys() | right.keys()}
    return {term: value for term, value in terms.items() if value}


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    made: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            term = tuple(i + j for i, j in zip(a, b, strict=True))
            made[term] = made.get(term, 0.0) + x * y
    return made
