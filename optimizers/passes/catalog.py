"""Which passes there are: the exact ones in the order in which they run, and every pass by name, for recipes."""

from collections.abc import Mapping
from typing import Any

import msgspec

from optimizers.errors import RecipeError
from optimizers.passes import Pass
from optimizers.passes.adaround import AdaRound
from optimizers.passes.bf16 import Bf16
from optimizers.passes.bias_correction import BiasCorrection
from optimizers.passes.cpu_build import CpuBuild
from optimizers.passes.equalize import Equalize
from optimizers.passes.fold import Fold
from optimizers.passes.fp16 import Fp16
from optimizers.passes.fusion import FAMILIES, Fuse, OrtBasic
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.low_rank import LowRank
from optimizers.passes.opset import RaiseOpset
from optimizers.passes.prune import PruneChannels
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.session_fusions import SessionFusions
from optimizers.passes.simplify import Simplify
from optimizers.passes.smoothquant import SmoothQuant
from optimizers.passes.sparsity import Sparsity24
from optimizers.passes.weight_only import WeightOnly

EXACT: tuple[Pass, ...] = (
    RaiseOpset(),
    Sanitize(),
    Fold(),
    Simplify(),
    *(Fuse((family,)) for family in FAMILIES),
    OrtBasic(),
    SessionFusions(),
)
"""Passes that keep FP32 arithmetic; each takes the result of the one before."""

PREPARING = frozenset({"opset", "sanitize"})
"""Exact passes that the others build on: their result is kept for those even where it is slower by itself."""

MUST_GAIN = frozenset({"session-fusions"})
"""Exact passes that are kept only where they make the model faster."""

_CLASSES: tuple[type[Any], ...] = (
    RaiseOpset,
    Sanitize,
    Fold,
    Simplify,
    Fuse,
    OrtBasic,
    SessionFusions,
    CpuBuild,
    SmoothQuant,
    Equalize,
    AdaRound,
    BiasCorrection,
    Fp16,
    Bf16,
    Int8Dynamic,
    Int8Static,
    WeightOnly,
    LowRank,
    PruneChannels,
    Sparsity24,
)
_KEY = "pass"

BY_NAME: dict[str, type[Any]] = {made().spec.name: made for made in _CLASSES}
"""Every pass; all settings have defaults."""

_NAMES = {made: name for name, made in BY_NAME.items()}


def settings_of(step: Pass) -> dict[str, Any]:
    """Return a pass as plain values: its name under ``pass``, and those settings that differ from their defaults."""
    return {_KEY: _NAMES.get(type(step), step.spec.name), **changed_settings(step)}


def changed_settings(step: Pass) -> dict[str, Any]:
    """Return the settings of a pass that differ from their defaults; none for a pass without settings."""
    if not isinstance(step, msgspec.Struct):
        return {}
    plain = type(step)()
    return {
        name: msgspec.to_builtins(getattr(step, name))
        for name in step.__struct_fields__
        if getattr(step, name) != getattr(plain, name)
    }


def step_of(settings: Mapping[str, Any]) -> Pass:
    """Make a pass from plain values, as ``settings_of`` returns them.

    Raises:
        RecipeError: If the pass, or one of its settings, is unknown or out of range.
    """
    name = settings.get(_KEY)
    made = BY_NAME.get(name) if isinstance(name, str) else None
    if made is None:
        raise RecipeError(f"{name!r} is no pass; passes are {', '.join(sorted(BY_NAME))}")
    given = {key: value for key, value in settings.items() if key != _KEY}
    known = getattr(made, "__struct_fields__", ())
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise RecipeError(f"pass {name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    try:
        step: Pass = msgspec.convert(given, made) if known else made()
    except msgspec.ValidationError as exc:
        raise RecipeError(f"pass {name}: {exc}") from exc
    return step


def label_of(step: Pass) -> str:
    """Return a pass as people write it, e.g. ``int8-static(method=mse)``; long lists are counted."""
    name = step.spec.name
    shown = [f"{key}={_shown(value)}" for key, value in changed_settings(step).items()]
    tells_all = name != _NAMES.get(type(step), name)  # such as ``fusion-conv``
    return name if tells_all or not shown else f"{name}({', '.join(shown)})"


def _shown(value: object) -> str:
    return f"[{len(value)}]" if isinstance(value, (list, tuple)) else str(value)
