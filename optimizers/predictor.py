"""A learned guess of which form will be fast here, from the measurements of earlier runs on this host.

It orders the candidates, so that a short time budget is spent on the promising ones; it never replaces a measurement.
For each family of candidates, a ridge regression maps a few features of a model to the logarithm of the family's
speed-up over the best exact form.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from server.tensors import Array

LEAST_EXPERIENCE = 3
"""Measurements of a family below which it keeps its usual place."""

Features = tuple[float, ...]
"""What is known of a model before anything was tried, see ``features_of``."""

_RIDGE = 1.0
_WORTH = math.log(1.1)
_MOST_LINES = 2000


class Experience(msgspec.Struct, frozen=True):
    """One measurement of an earlier run.

    Attributes:
        family: Of the candidate, e.g. ``int8-static``.
        features: Of the model, see ``features_of``.
        speedup: Over the best exact form.
    """

    family: str
    features: Features
    speedup: float


def features_of(ops: Mapping[str, int], size_bytes: int, baseline_ms: float) -> Features:
    """Describe a model by what decides over the gain of a precision.

    Args:
        ops: Node count per operator.
        size_bytes: Of the exact form.
        baseline_ms: Of one row in the exact form.

    Returns:
        Size, time, node count (decimal logarithms), and the shares of convolutions and of matrix products.
    """
    nodes = max(sum(ops.values()), 1)
    products = sum(ops.get(op, 0) for op in ("MatMul", "Gemm", "Attention", "FusedMatMul"))
    return (
        math.log10(max(size_bytes, 1)),
        math.log10(max(baseline_ms, 1e-3)),
        math.log10(nodes),
        ops.get("Conv", 0) / nodes,
        products / nodes,
    )


def predict(experiences: Sequence[Experience], family: str, features: Sequence[float]) -> float | None:
    """Return the expected logarithm of a family's speed-up, or nothing without enough experience.

    Source: ridge regression in closed form, ``w = (X^T X + l I)^-1 X^T (y - mean(y))`` on standardized features.
    """
    known = [e for e in experiences if e.family == family and len(e.features) == len(features)]
    if len(known) < LEAST_EXPERIENCE:
        return None
    x: Array = np.array([e.features for e in known], np.float64)
    y = np.log(np.maximum([e.speedup for e in known], 1e-6))
    centre, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-3)
    z = (x - centre) / scale
    weights = np.linalg.solve(z.T @ z + _RIDGE * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    # A model unlike all known ones is not extrapolated beyond what was ever seen.
    guess = y.mean() + ((np.asarray(features) - centre) / scale) @ weights
    return float(np.clip(guess, y.min(), y.max()))


def in_order(families: Sequence[str], experiences: Sequence[Experience], features: Sequence[float]) -> list[str]:
    """Order families: those expected to pay first, the best one leading; then the unknown; then those that never paid.

    Args:
        families: In their usual order, which stays among the unknown.
        experiences: Of earlier runs on this host.
        features: Of the model at hand.
    """
    guesses = {family: predict(experiences, family, features) for family in families}

    def rank(family: str) -> tuple[int, float]:
        guess = guesses[family]
        if guess is None:
            return 1, 0.0
        return (0 if guess > _WORTH else 2), -guess

    return sorted(families, key=rank)


def read_experiences(file: Path) -> list[Experience]:
    """Return what earlier runs left; lines that cannot be read are left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_bytes().splitlines()[-_MOST_LINES:]:
        try:
            found.append(msgspec.json.decode(line, type=Experience))
        except msgspec.MsgspecError:
            continue  # a line that an interrupted run did not finish
    return found


def add_experiences(file: Path, experiences: Sequence[Experience]) -> None:
    """Append measurements, so that one line is written at a time."""
    with file.open("ab") as out:
        for experience in experiences:
            out.write(msgspec.json.encode(experience) + b"\n")
