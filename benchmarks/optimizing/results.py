"""What one comparison leaves on record, and the rules that judge it."""

import re
from typing import Literal

import msgspec

from optimizers.intervals import wilson
from optimizers.records import Speed
from optimizers.search import Gate
from server.artifact import Fidelity, LatencyTable

ORIGINAL = "original, ORT defaults"
ORIGINAL_ONE = "original, 1 thread"
OURS = "ours, as served"
OURS_DEFAULTS = "ours, ORT's threads"

Kept = Literal["shown", "kept", "not shown", "broken"]
"""A promise on unseen samples: its 95 % interval lies above it; only its estimate does; only its upper end; nothing."""

_NUMBER = re.compile(r"\b\d")


class Row(msgspec.Struct, frozen=True):
    """One contender.

    Attributes:
        name: As in the table.
        notes: What made it, and how it is opened.
        failure: Why it takes no part; empty when it does.
        wall_s: Seconds that its making took.
        cpu_s: CPU seconds that its making took.
        size_bytes: Size of its file.
        latency: Per batch size.
        cpu_ms: CPU milliseconds of the process per row, for each batch size of ``latency``.
        ours: Speed of ours, as served, against it, per batch size; empty for ours.
        fidelity: On unseen samples, against the original.
        agreement_high: Upper end of the agreement's 95 % interval.
        promise: Whether it keeps there what our optimizer promises.
    """

    name: str
    notes: tuple[str, ...] = ()
    failure: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    size_bytes: int = 0
    latency: LatencyTable | None = None
    cpu_ms: tuple[float, ...] = ()
    ours: tuple[Speed, ...] = ()
    fidelity: Fidelity | None = None
    agreement_high: float = 1.0
    promise: Kept | None = None


class Judged(msgspec.Struct, frozen=True):
    """A candidate's verdict in our optimizer's report."""

    candidate: str
    verdict: str
    reason: str


class Comparison(msgspec.Struct, frozen=True):
    """One model.

    Attributes:
        model: Its name.
        about: One line about it.
        gate: What our optimizer promises.
        seen: Samples that everybody got.
        unseen: Samples that nobody got.
        repeated: Samples in neither, as they equal one that was seen.
        headline: Our optimizer's own.
        chosen: The variant that it serves first; empty when it did not finish.
        best_rows: Its best batch size; 1 where rows may not share a run.
        rows: The contenders.
        judged: Every candidate's verdict.
    """

    model: str
    about: str
    gate: Gate
    seen: int
    unseen: int
    repeated: int
    headline: str
    chosen: str
    best_rows: int
    rows: tuple[Row, ...]
    judged: tuple[Judged, ...] = ()

    def row(self, name: str) -> Row:
        """Return a contender.

        Raises:
            KeyError: If there is none of that name.
        """
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(name)
        return found[0]

    @property
    def verdicts(self) -> tuple[Judged, ...]:
        """What was judged; the baselines are not."""
        return tuple(judged for judged in self.judged if judged.verdict != "baseline")

    @property
    def unnumbered(self) -> tuple[str, ...]:
        """Candidates whose verdict comes without a number; the 16 of BF16 is none."""
        return tuple(judged.candidate for judged in self.verdicts if not _NUMBER.search(judged.reason))

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is not as it must be: no result, a broken promise, or slower than a contender that keeps the promise."""
        ours = self.row(OURS)
        if ours.failure:
            return (f"{self.model}: {OURS} failed: {ours.failure}",)
        found = [f"{self.model}: the promise is broken on unseen samples"] if ours.promise == "broken" else []
        for row in self.rows:
            # The original answers as itself; a peer that breaks the promise solves an easier problem.
            if row.name not in (OURS, OURS_DEFAULTS) and row.promise != "broken":
                found += [
                    f"{self.model}: slower than {row.name} at batch {speed.rows}: {described(speed)}"
                    for speed in row.ours
                    if speed.verdict == "slower" and speed.rows in (1, self.best_rows)
                ]
        return tuple(found)


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` writes."""

    header: dict[str, str]
    comparisons: tuple[Comparison, ...]


def promise_kept(fidelity: Fidelity, gate: Gate) -> Kept:
    """Tell whether a promise holds on unseen samples; of agreement and accuracy the worse counts.

    The accuracy's loss has an upper end only, whose distance from the estimate stands for that of the lower end.

    Args:
        fidelity: On unseen samples.
        gate: The promise.
    """
    low, high = fidelity.agreement_low, agreement_high(fidelity)
    found = [_kept(low, fidelity.agreement, high, gate.min_agreement)]
    if fidelity.accuracy is not None and fidelity.accuracy_original is not None:
        drop = fidelity.accuracy_original - fidelity.accuracy
        most = drop if fidelity.accuracy_drop_high is None else fidelity.accuracy_drop_high
        found.append(_kept(-most, -drop, -(2 * drop - most), -gate.max_accuracy_drop))
    order: tuple[Kept, ...] = ("shown", "kept", "not shown", "broken")
    return max(found, key=order.index)


def agreement_high(fidelity: Fidelity) -> float:
    """Return the upper end of the agreement's 95 % interval."""
    return wilson(round(fidelity.agreement * fidelity.samples), fidelity.samples)[1]


def described(speed: Speed) -> str:
    """Return a speed-up with its interval, e.g. ``1.52x (1.48-1.55)``."""
    return f"{speed.speedup:.2f}x ({speed.low:.2f}-{speed.high:.2f})"


def _kept(low: float, value: float, high: float, promised: float) -> Kept:
    if low >= promised:
        return "shown"
    if value >= promised:
        return "kept"
    return "not shown" if high >= promised else "broken"
