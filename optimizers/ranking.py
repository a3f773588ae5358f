"""The sensitivity of a candidate's layers, prepared for drawing. Pure, from the records."""

import math
import tomllib
from collections.abc import Sequence

import msgspec

from optimizers.records import CandidateRecord, Report
from optimizers.sensitivity import LayerSensitivity

MOST_LAYERS = 25
NOT_COMPARABLE = 1e300
"""Errors beyond this stand for outputs that could not be compared: JSON knows no infinity."""

_LEAST_BAR = 2.0


class LayerBar(msgspec.Struct, frozen=True):
    """One layer of a ranking.

    Attributes:
        layer: The layer.
        width: Of its bar in percent; the scale is logarithmic.
        macs_share: Share of the multiply-accumulates of all ranked layers, 0 to 1.
        kept: Whether it stays in float in the candidate.
        comparable: Whether its error is a number.
    """

    layer: LayerSensitivity
    width: float
    macs_share: float
    kept: bool
    comparable: bool


class Ranking(msgspec.Struct, frozen=True):
    """The layers of one candidate.

    Attributes:
        candidate: Its name.
        bars: The most sensitive layers, at most ``MOST_LAYERS``.
        hidden: How many more there are, and ``hidden_kept`` how many of those stay in float.
        kept: How many layers stay in float in the candidate.
        named: Whether it is known which ones.
        ends: The errors at both ends of the scale.
    """

    candidate: str
    bars: tuple[LayerBar, ...]
    hidden: int
    hidden_kept: int
    kept: int
    named: bool
    ends: tuple[float, float]


def ranking(report: Report, name: str) -> Ranking:
    """Prepare the sensitivity of a candidate's layers for drawing."""
    layers = report.sensitivity[name]
    keep = kept_layers(report, name)
    errors = [layer.error for layer in layers if 0 < layer.error < NOT_COMPARABLE]
    ends = _decades(errors)
    total = max(sum(layer.macs for layer in layers), 1)
    bars = tuple(
        LayerBar(
            layer,
            _layer_width(layer.error, ends),
            layer.macs / total,
            keep is not None and layer.node in keep,
            layer.error < NOT_COMPARABLE,
        )
        for layer in layers
    )
    record = next((record for record in report.candidates if record.name == name), None)
    counted = len(keep) if keep is not None else _counted(record)
    hidden = bars[MOST_LAYERS:]
    return Ranking(
        name, bars[:MOST_LAYERS], len(hidden), sum(bar.kept for bar in hidden), counted, keep is not None, ends
    )


def kept_layers(report: Report, name: str) -> tuple[str, ...] | None:
    """Return the names of the layers that a served candidate keeps in float; ``None`` where they are not recorded.

    The chain as text only counts them; the recipe names them, for served variants.
    """
    for plan in tomllib.loads(report.replay).get("variants", ()):
        if plan["name"] == name:
            return tuple(str(node) for step in plan["passes"] for node in step.get("keep", ()))
    return None


def _decades(errors: Sequence[float]) -> tuple[float, float]:
    """Return the powers of ten around all errors, at least one decade apart."""
    if not errors:
        return (0.1, 1.0)
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    return (10.0**low, 10.0 ** max(high, low + 1))


def _layer_width(error: float, ends: tuple[float, float]) -> float:
    if error <= 0:
        return 0.0
    share = math.log(min(error, ends[1]) / ends[0]) / math.log(ends[1] / ends[0])
    return max(100 * share, _LEAST_BAR)


def _counted(record: CandidateRecord | None) -> int:
    """Return how many layers a chain keeps in float, as its text counts them."""
    passes = record.passes if record is not None else ()
    counts = [label.partition("keep=[")[2].partition("]")[0] for label in passes]
    return sum(int(count) for count in counts if count.isdigit())
