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

_LOSSY: dict[str, dict[str, Pass]] = {
    "fp16": {"fp16": Fp16()},
    "int8": {
        "int8-dynamic": Int8Dynamic(),
        "int8-static": Int8Static(),
        "int8-static-percentile": Int8Static(method="percentile"),
    },
}


def lossy(precisions: Collection[str]) -> dict[str, Pass]:
    """Return variant name -> pass for the wanted precisions; each takes the result of the exact passes.

    Args:
        precisions: ``fp32`` (which needs no pass), ``fp16``, ``int8``.
    """
    return {name: step for key, steps in _LOSSY.items() if key in precisions for name, step in steps.items()}
