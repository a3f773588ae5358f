"""The graph-optimization stage: an ONNX model in, a proven artifact out.

::

    from optimizers import Recipe, Task, optimize

    result = optimize(Task(model="model.onnx", repository="models", name="mine", calibration={"x": samples}))
    print(result.report.headline, result.chosen.name)
"""

import importlib
from typing import TYPE_CHECKING, Any

import server  # noqa: F401  (turns onnxruntime's telemetry off before any module here imports it)

if TYPE_CHECKING:
    from optimizers.api import Result, Task, optimize
    from optimizers.recipe import Recipe

__all__ = ["Recipe", "Result", "Task", "optimize"]


def __getattr__(name: str) -> Any:
    """Import what is asked for; the passes' child processes import parts of this package and must start quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("optimizers.recipe" if name == "Recipe" else "optimizers.api"), name)
