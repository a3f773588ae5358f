"""Recipes: what to build and what a variant must prove, as a TOML file.

::

    precisions = ["fp32", "fp16", "int8"]
    compressions = ["low-rank", "prune-channels"]
    devices = ["cpu", "cuda"]
    portable = false
    objective = "latency"
    min_agreement = 0.99
    max_accuracy_drop = 0.01
    slo_ms = 20.0
    batch_rows = [1, 2, 4, 8, 16, 32]
    calibration_samples = 128
    search_samples = 256
    holdout_samples = 512
    seed = 0
    stages = 1
    stage_bytes = 0

The table ``decisions`` names outputs and how two answers of each are compared, where the guess does not fit::

    [decisions]
    logits = "top1"
    boxes = "near"

The table ``uint8_inputs`` names float inputs that clients send as pictures of bytes, and how they are normalized::

    [uint8_inputs.image]
    scale = 0.00392156862745098
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    channels_last = true

A recipe with variants makes exactly these, without a search, and proves them as usual. The optimizer writes such a
recipe beside every report::

    [[variants]]
    name = "int8-static"
    precision = "int8-static"
    passes = [{ pass = "sanitize" }, { pass = "simplify" }, { pass = "int8-static", method = "mse" }]
"""

import hashlib
import math
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import tomli_w

from optimizers.errors import RecipeError

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Compression = Literal["low-rank", "prune-channels", "sparsity-2-4"]
Objective = Literal["latency", "throughput", "memory", "size"]
Target = Literal["cpu", "cuda", "tensorrt"]

DECISIONS = ("top1", "binary", "nearest_neighbour", "tokens", "pixels", "maps", "near", "close")
"""How two answers of a model can be compared, see ``decisions``."""

MOST_ROWS = 1024
"""Largest batch that a recipe may ask for."""


MOST_STAGES = 16
"""Most stages that a model may be cut into."""


class Uint8Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a UINT8 input becomes the float input of the original: ``(scale * pixel - mean) / std``.

    Attributes:
        scale: Factor of every pixel; 1/255 makes 0 to 1 of 0 to 255.
        mean: One for all channels, or one per channel; of scaled pixels.
        std: One for all channels, or one per channel; of scaled pixels, not 0.
        channel_axis: Axis of the channels in the original's input; ``None`` means the only axis of their number.
        channels_last: Whether clients send the channels as the last axis, as cameras and decoders give them.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_axis: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        _require(math.isfinite(self.scale) and self.scale != 0, "scale", self.scale, "a finite number other than 0")
        for key, values in (("mean", self.mean), ("std", self.std)):
            _require(bool(values) and all(map(math.isfinite, values)), key, values, "one or more finite numbers")
        _require(0 not in self.std, "std", self.std, "without 0")
        counts = {len(self.mean), len(self.std)}
        _require(
            len(counts - {1}) <= 1, "std", f"{len(self.std)} numbers", f"as many as mean, {len(self.mean)}, or one"
        )


class VariantPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One variant to make, without a search.

    Attributes:
        name: Its name.
        precision: As the manifest shows it, e.g. ``int8-static``.
        passes: Each pass as a table: its name under ``pass``, and its settings.
        exact: Whether the passes keep FP32 arithmetic and all weights.
    """

    name: str
    precision: str
    passes: tuple[dict[str, Any], ...]
    exact: bool = False


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to build and what to require.

    Attributes:
        precisions: What to try; ``int8`` stands for its dynamic, static and weight-only forms, ``int4`` for weights.
        compressions: What else to try: factorized weights, removed channels, 2 of 4 weights (GPUs only).
        devices: Where to serve; one that does not work on this host is left out.
        min_agreement: Least share of held-out samples on which a variant decides as the original, 0 to 1.
        max_accuracy_drop: Largest loss of task accuracy against labels, 0 to 1.
        portable: Whether no variant may be bound to this kind of CPU, for artifacts that travel.
        objective: What the first choice is the best in.
        slo_ms: Wanted p99 latency of one request in milliseconds; ``None`` sets no limit.
        batch_rows: Batch sizes to measure, ascending, from 1.
        calibration_samples: Samples for activation ranges.
        search_samples: Samples that decide what is tried next.
        holdout_samples: Samples for the comparison with the original; no pass sees them.
        seed: Seed of the split and of the order of measurements.
        decisions: Output -> one of ``DECISIONS``; empty means to tell it from the original's answers.
        variants: Exactly what to make; empty means to search.
        uint8_inputs: Float input -> how it is made of the UINT8 input that takes its place.
        stages: Into how many stages, for as many devices, the first choice is cut; 1 leaves it whole.
        stage_bytes: Weights that a device holds; 0 sets no limit.
    """

    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int4")
    compressions: tuple[Compression, ...] = ("low-rank", "prune-channels")
    devices: tuple[Target, ...] = ("cpu", "cuda")
    portable: bool = False
    objective: Objective = "latency"
    min_agreement: float = 0.99
    max_accuracy_drop: float = 0.01
    slo_ms: float | None = None
    batch_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    calibration_samples: int = 128
    search_samples: int = 256
    holdout_samples: int = 512
    seed: int = 0
    decisions: dict[str, str] = {}
    variants: tuple[VariantPlan, ...] = ()
    uint8_inputs: dict[str, Uint8Input] = {}
    stages: int = 1
    stage_bytes: int = 0

    def __post_init__(self) -> None:
        _require(
            bool(self.precisions), "precisions", self.precisions, f"at least one of {', '.join(get_args(Precision))}"
        )
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
        _require(self.search_samples >= 0, "search_samples", self.search_samples, "at least 0")
        _require(self.holdout_samples >= 1, "holdout_samples", self.holdout_samples, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        _require(1 <= self.stages <= MOST_STAGES, "stages", self.stages, f"from 1 to {MOST_STAGES}")
        _require(self.stage_bytes >= 0, "stage_bytes", self.stage_bytes, "at least 0")
        for output, kind in self.decisions.items():
            _require(
                kind in DECISIONS, f"the decision of output '{output}'", repr(kind), f"one of {', '.join(DECISIONS)}"
            )
        names = [variant.name for variant in self.variants]
        _require(len(set(names)) == len(names), "variants", names, "of different names")

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


def write_recipe(recipe: Recipe) -> str:
    """Return a recipe as TOML, which ``read_recipe`` reads back; what has no value is left out."""
    plain = msgspec.to_builtins(recipe)
    optional = ("slo_ms", "decisions", "variants", "uint8_inputs")
    return tomli_w.dumps({key: value for key, value in plain.items() if value or key not in optional})


def _require(holds: bool, key: str, seen: object, allowed: str) -> None:
    if not holds:
        raise RecipeError(f"{key} is {seen}; it must be {allowed}")
