"""Every error that the optimizer raises; each carries a ``code``.

::

    OptimizerError                optimizer
    ├── ModelError                invalid_model          no valid ONNX file, or an opset or IR version above the ceiling
    ├── CalibrationError          invalid_calibration    DATA.npz or LABELS.npz does not fit the model
    ├── RecipeError               invalid_recipe         unknown key or value out of range
    ├── PassFailed                pass_failed            one pass cannot be applied; the run continues without it
    └── EngineBuildError          engine_build           TensorRT refused the model, the profile, or is not installed

A tensor type that cannot be served is ``server.errors.UnsupportedModel``. A message names the value seen, the value
allowed, and the fix.
"""

from typing import ClassVar


class OptimizerError(Exception):
    """Root of the tree."""

    code: ClassVar[str] = "optimizer"


class ModelError(OptimizerError):
    """The file is no valid ONNX model, or its opset or IR version is beyond what this tool can write."""

    code = "invalid_model"


class CalibrationError(OptimizerError):
    """The calibration data or the labels do not fit the model."""

    code = "invalid_calibration"


class RecipeError(OptimizerError):
    """The recipe has an unknown key or a value out of range."""

    code = "invalid_recipe"


class PassFailed(OptimizerError):
    """A pass cannot be applied to this model on this host; the message is the reason that the report shows."""

    code = "pass_failed"


class EngineBuildError(OptimizerError):
    """No TensorRT engine was built."""

    code = "engine_build"
