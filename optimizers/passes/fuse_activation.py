"""Fusions into activations: GELU in both its forms, and HardSwish.

Each is ``x`` times something of ``x``. The rules start at the last product or sum, find ``x`` and the nonlinear part
``f`` above it, and compare polynomials, so that the order of the operators does not matter.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from optimizers.passes.polynomial import leaves, polynomial, same
from optimizers.passes.rules import Rule, made_by, private, producer, refused, scalar

_HALF_OF_BOTH: Mapping[tuple[int, ...], float] = {(1, 0): 0.5, (1, 1): 0.5}
_TANH_SLOPE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715


class _Activation(Rule):
    """What the rules share: ``root`` is arithmetic over one value ``x`` and one nonlinear value ``f`` of it."""

    last = "Mul"
    nonlinear: tuple[str, ...] = ()
    product: ClassVar[Mapping[tuple[int, ...], float]] = {}

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        """The last operator of what is replaced."""
        return getattr(op, self.last)(a, b, _outputs=["root"])

    def check(self, _context: Any, root: ir.Value, **_: Any) -> MatchResult:
        """The values above are those of the formula, and nobody else reads the ones in between."""
        found = self.operands(root)
        if found is None:
            return refused(f"it is no product of one value and its {' or '.join(self.nonlinear)}")
        x, f = found
        if not private(f):
            return refused(f"'{f.name}' has another reader")
        if not same(polynomial(root, (x, f)), self.product):
            return refused("the constants around the nonlinear part are others, or a value between has another reader")
        return MatchResult() if self.inner(f, x) else refused("the argument of the nonlinear part is another one")

    def operands(self, root: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Return ``x`` and ``f``, or ``None`` when the arithmetic does not start from two such values."""
        found = leaves(root)
        nonlinear = [value for value in found if any(producer(value, op_type) for op_type in self.nonlinear)]
        others = [value for value in found if not any(value is other for other in nonlinear)]
        return (others[0], nonlinear[0]) if (len(others), len(nonlinear)) == (1, 1) else None

    def inner(self, f: ir.Value, x: ir.Value) -> bool:
        """Whether the nonlinear part is the one of the formula."""
        raise NotImplementedError

    def rewrite(self, op: Any, root: ir.Value, **_: Any) -> Any:
        """Make the one operator."""
        found = self.operands(root)
        fused = self.fused(op, found[0] if found else root)
        fused.producer().name = made_by(root).name
        return fused

    def fused(self, op: Any, x: ir.Value) -> Any:
        """Return the new operator on ``x``."""
        raise NotImplementedError


class Gelu(_Activation):
    """``0.5 x (1 + erf(x / sqrt(2))) = Gelu(x)``."""

    nonlinear = ("Erf",)
    product: ClassVar[Mapping[tuple[int, ...], float]] = _HALF_OF_BOTH

    def inner(self, f: ir.Value, x: ir.Value) -> bool:
        """Whether the argument of Erf is ``x / sqrt(2)``."""
        argument = _argument(f)
        return _is_free(argument, x) and same(polynomial(argument, (x,)), {(1,): math.sqrt(0.5)})

    def fused(self, op: Any, x: ir.Value) -> Any:
        """Return the new operator on ``x``."""
        return op.Gelu(x)


class GeluOfSum(Gelu):
    """``0.5 x + 0.5 x erf(x / sqrt(2)) = Gelu(x)``."""

    last = "Add"


class GeluOfQuotient(Gelu):
    """``x (1 + erf(x / sqrt(2))) / 2 = Gelu(x)``."""

    last = "Div"


class GeluTanh(_Activation):
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = Gelu(x, approximate="tanh")``."""

    nonlinear = ("Tanh",)
    product: ClassVar[Mapping[tuple[int, ...], float]] = _HALF_OF_BOTH

    def inner(self, f: ir.Value, x: ir.Value) -> bool:
        """Whether the argument of Tanh is that polynomial."""
        argument = _argument(f)
        cubic: Mapping[tuple[int, ...], float] = {(1,): _TANH_SLOPE, (3,): _TANH_SLOPE * _TANH_CUBE}
        return _is_free(argument, x) and same(polynomial(argument, (x,)), cubic)

    def fused(self, op: Any, x: ir.Value) -> Any:
        """Return the new operator on ``x``."""
        return op.Gelu(x, approximate="tanh")


class HardSwish(_Activation):
    """``x clip(x + 3, 0, 6) / 6 = HardSwish(x)``."""

    nonlinear = ("Clip",)
    product: ClassVar[Mapping[tuple[int, ...], float]] = {(1, 1): 1 / 6}

    def inner(self, f: ir.Value, x: ir.Value) -> bool:
        """Whether the nonlinear part is ``clip(x + 3, 0, 6)``."""
        node = made_by(f)
        if len(node.inputs) < 3 or (scalar(node.inputs[1]), scalar(node.inputs[2])) != (0.0, 6.0):
            return False
        argument = _argument(f)
        return _is_free(argument, x) and same(polynomial(argument, (x,)), {(1,): 1.0, (0,): 3.0})

    def fused(self, op: Any, x: ir.Value) -> Any:
        """Return the new operator on ``x``."""
        return op.HardSwish(x)


class HardSwishOfQuotient(HardSwish):
    """``(x clip(x + 3, 0, 6)) / 6 = HardSwish(x)``."""

    last = "Div"


class HardSwishOfHardSigmoid(HardSwish):
    """``x HardSigmoid(x, alpha=1/6, beta=1/2) = HardSwish(x)``."""

    nonlinear = ("HardSigmoid",)
    product: ClassVar[Mapping[tuple[int, ...], float]] = {(1, 1): 1.0}

    def inner(self, f: ir.Value, x: ir.Value) -> bool:
        """Whether the nonlinear part is ``max(0, min(1, x / 6 + 1/2))``."""
        attributes = made_by(f).attributes
        slope, offset = attributes.get_float("alpha", 0.2), attributes.get_float("beta", 0.5)
        return _argument(f) is x and math.isclose(slope, 1 / 6, rel_tol=1e-5) and offset == 0.5


GELU_RULES: dict[str, list[RewriteRule]] = {
    "Gelu": [*Gelu.build(), *GeluOfSum.build(), *GeluOfQuotient.build()],
    "Gelu(tanh)": GeluTanh.build(),
}
"""Name of the fusion -> its rules; their result exists from opset 20 on."""

HARDSWISH_RULES: dict[str, list[RewriteRule]] = {
    "HardSwish": [*HardSwish.build(), *HardSwishOfQuotient.build(), *HardSwishOfHardSigmoid.build()],
}
"""Name of the fusion -> its rules; their result exists from opset 14 on."""


def _argument(f: ir.Value) -> ir.Value:
    value = made_by(f).inputs[0]
    if value is None:
        raise ValueError(f"'{f.name}' has no argument")
    return value


def _is_free(argument: ir.Value, x: ir.Value) -> bool:
    """Whether nothing between ``x`` and the argument is read elsewhere."""
    return private(argument) and all(value is x for value in leaves(argument))
