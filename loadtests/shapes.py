"""Shapes of load: how the rate of arrivals goes over a test. Pure; all times are seconds since the test began."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.tallies import Tally

WARM_UP = "warm-up"
"""Name of the phase that nobody judges."""
SHAPES = ("closed-loop", "arrival-rate", "steps", "spike", "soak")
MOST_STEPS = 60
_SOAK_PARTS = 10
_ENOUGH = 0.9
"""Share of the requests of a step that must be good, or the step is past saturation."""
_STEPS_PAST_SATURATION = 2


class ShapeError(Exception):
    """The options describe no shape."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a test.

    Attributes:
        name: What it is called in tables.
        start_s: When it begins.
        end_s: When it is over.
        rate_per_s: Requests per second over all users; 0 is a closed loop.
        judged: Whether the objective must hold in it.
        may_refuse: Whether refusals are as they should be in it.
    """

    name: str
    start_s: float
    end_s: float
    rate_per_s: float
    judged: bool = True
    may_refuse: bool = False

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Course:
    """What the options say of a shape.

    Attributes:
        shape: One of ``SHAPES``.
        seconds: How long the test is, without its warm-up; 0 lets steps go on until the server is saturated.
        rate_per_s: Requests per second, those of the first step, and those around a spike; 0 is a closed loop.
        factor: Rate of the next step, or of the spike, as a multiple.
        step_s: Length of a step in whole seconds.
        warm_up_s: Whole seconds before, at the first rate, that are not judged.
    """

    shape: str
    seconds: float
    rate_per_s: float
    factor: float
    step_s: int
    warm_up_s: int


def phases_of(course: Course) -> list[Phase]:
    """Return the phases of a test in order.

    Raises:
        ShapeError: If a shape lacks what it needs.
    """
    if course.shape not in ("closed-loop", "soak") and course.rate_per_s <= 0:
        raise ShapeError(f"the shape '{course.shape}' needs --rate, in requests per second")
    if course.shape == "closed-loop" and course.rate_per_s:
        raise ShapeError("a closed loop has no --rate; take --shape arrival-rate")
    if course.shape in ("steps", "spike") and course.factor <= 1:
        raise ShapeError(f"--factor is {course.factor:g}; rates must grow by it")
    if course.shape != "steps" and course.seconds < 1:
        raise ShapeError("the test must last a second at least; give -t")
    rows = list(_rows(course))
    warm = [(WARM_UP, float(course.warm_up_s), rows[0][2], False, True)] if course.warm_up_s else []
    phases, at_s = [], 0.0
    for name, seconds, rate, judged, may_refuse in [*warm, *rows]:
        phases.append(Phase(name, at_s, at_s + seconds, rate, judged, may_refuse))
        at_s += seconds
    return phases


def _rows(course: Course) -> Sequence[tuple[str, float, float, bool, bool]]:
    rate, seconds = course.rate_per_s, course.seconds
    if course.shape == "steps":
        count = int(seconds // course.step_s) if seconds else MOST_STEPS
        rates = [rate * course.factor**step for step in range(min(max(count, 1), MOST_STEPS))]
        # Only the first must hold: the others look for the rate at which it ends.
        return [(f"{rate:.4g}/s", course.step_s, rate, not step, bool(step)) for step, rate in enumerate(rates)]
    if course.shape == "spike":
        before, spike = max(1, round(seconds / 4)), max(1, round(seconds / 4))
        after = max(1.0, seconds - before - spike)
        high = rate * course.factor
        return [
            ("before", before, rate, True, False),
            ("spike", spike, high, True, True),
            ("after", after, rate, True, False),
        ]
    if course.shape == "soak":
        cuts = [round(seconds * part / _SOAK_PARTS) for part in range(_SOAK_PARTS + 1)]
        parts = [end - start for start, end in itertools.pairwise(cuts) if end > start]
        return [(f"part {part}", length, rate, True, False) for part, length in enumerate(parts, 1)]
    return [(course.shape, seconds, rate, True, False)]


def next_arrival(after_s: float, phases: Sequence[Phase], share: float, draw: Callable[[float], float]) -> float:
    """Return when the next request is due; all processes together make a Poisson process of the phases' rates.

    Args:
        after_s: Of its last one.
        phases: Of the test.
        share: Of the rates that this process sends.
        draw: Draws from the exponential distribution of a rate, such as ``random.expovariate``.

    Returns:
        Seconds since the start of the test; infinite when the test is over before.
    """
    at_s = after_s
    for phase in phases:
        if at_s < phase.end_s:
            # Exponential gaps have no memory, so what reaches over the end of a phase is drawn anew from there.
            at_s = max(at_s, phase.start_s) + draw(phase.rate_per_s * share)
            if at_s < phase.end_s:
                return at_s
            at_s = phase.end_s
    return math.inf


def expovariate(rate: float) -> float:
    """Draw the gap to the next arrival, in seconds."""
    return random.expovariate(rate)


def users_for(phases: Sequence[Phase], patience_s: float) -> int:
    """Return how many users, with one request under way each, keep the highest rate up until answers take so long."""
    highest = max(phase.rate_per_s for phase in phases)
    return min(max(32, round(highest * patience_s)), 1000)


def is_saturated(step: Tally, past: Sequence[Tally]) -> bool:
    """Whether a step, after those of lower rates, shows that rates beyond it need no look."""
    steps = [*past, step]
    return sum(tally.good < _ENOUGH * tally.asked for tally in steps) >= _STEPS_PAST_SATURATION
