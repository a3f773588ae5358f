"""Recipes: what to build and what a variant must prove, as a TOML file.

::

    precisions = ["fp32", "fp16", "int8"]
    devices = ["cpu", "cuda"]
    min_agreement = 0.99
    max_accuracy_drop = 0.01
    slo_ms = 20.0
    batch_rows = [1, 2, 4, 8, 16, 32]
    calibration_samples = 128
    holdout_samples = 512
    seed = 0
"""

import hashlib
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from optimizers.errors import RecipeError

Precision = Literal["fp32", "fp16", "int8"]
Target = Literal["cpu", "cuda", "tensorrt"]

MOST_ROWS = 1024
"""Largest batch that a recipe may ask for."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to build and what to require.

    Attributes:
        precisions: What to try; ``int8`` stands for its dynamic and its static form.
        devices: Where to serve; one that does not work on this host is left out.
        min_agreement: Least share of held-out samples on which a variant decides as the original, 0 to 1.
        max_accuracy_drop: Largest loss of task accuracy against labels, 0 to 1.
        slo_ms: Wanted p99 latency of one request in milliseconds; ``None`` asks for the fastest.
        batch_rows: Batch sizes to measure, ascending, from 1.
        calibration_samples: Samples for activation ranges.
        holdout_samples: Samples for the comparison with the original; no pass sees them.
        seed: Seed of the split and of the order of measurements.
    """

    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    devices: tuple[Target, ...] = ("cpu", "cuda")
    min_agreement: float = 0.99
    max_accuracy_drop: float = 0.01
    slo_ms: float | None = None
    batch_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    calibration_samples: int = 128
    holdout_samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _require(bool(self.precisions), "precisions", self.precisions, "at least one of fp32, fp16, int8")
        _require(bool(self.devices), "devices", self.devices, "at least one of cpu, cuda, tensorrt")
        _require(0 < self.min_agreement <= 1, "min_agreement", self.min_agreement, "above 0 and at most 1")
        _require(0 <= self.max_accuracy_drop < 1, "max_accuracy_drop", self.max_accuracy_drop, "from 0 to below 1")
        _require(self.slo_ms is None or self.slo_ms > 0, "slo_ms", self.slo_ms, "above 0 milliseconds")
        rows = self.batch_rows
        _require(
            bool(rows) and list(rows) == sorted(set(rows)) and rows[0] >= 1 and rows[-1] <= MOST_ROWS,
            "batch_rows",
            rows,
            f"ascending, each from 1 to {MOST_ROWS}",
        )
        _require(self.calibration_samples >= 1, "calibration_samples", self.calibration_samples, "at least 1")
        _require(self.holdout_samples >= 1, "holdout_samples", self.holdout_samples, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")

    def digest(self) -> str:
        """Return the SHA-256 of the recipe's values in hexadecimal; order and layout of the file do not matter."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; keys that are left out have their defaults.

    Raises:
        RecipeError: If the file cannot be read, is not TOML, or has an unknown key, a value of another type or out of
            range.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Recipe)
    except OSError as exc:
        raise RecipeError(f"cannot read the recipe {path}: {exc.strerror}") from exc
    except (RecipeError, msgspec.ValidationError, ValueError) as exc:
        raise RecipeError(f"{path}: {exc}; known keys are {', '.join(Recipe.__struct_fields__)}") from exc


def _require(holds: bool, key: str, seen: object, allowed: str) -> None:
    if not holds:
        raise RecipeError(f"{key} is {seen}; it must be {allowed}")
