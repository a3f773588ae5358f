"""Which passes there are, in the order in which they run."""

from collections.abc import Collection

from optimizers.passes import Pass
from optimizers.passes.fp16 import Fp16
from optimizers.passes.fusion import Fuse, OrtBasic
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.opset import RaiseOpset
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.simplify import Simplify

EXACT: tuple[Pass, ...] = (RaiseOpset(), Sanitize(), Simplify(), Fuse(), OrtBasic())
"""Passes that keep FP32 arithmetic; each takes the result of the one before."""

_LOSSY: dict[str, tuple[Pass, ...]] = {
    "fp16": (Fp16(),),
    "int8": (Int8Dynamic(), Int8Static(), Int8Static("int8-static-percentile", method="percentile")),
}


def lossy(precisions: Collection[str]) -> dict[str, Pass]:
    """Return variant name -> pass for the wanted precisions; each takes the result of the exact passes.

    Args:
        precisions: ``fp32`` (which needs no pass), ``fp16``, ``int8``.
    """
    return {step.name: step for precision, steps in _LOSSY.items() if precision in precisions for step in steps}
