"""Phases of each shape, arrivals at their rates, and when steps are past saturation."""

import itertools
import math
import random
from typing import Any

import pytest

from loadtests.shapes import (
    MOST_STEPS,
    WARM_UP,
    Course,
    Phase,
    ShapeError,
    is_saturated,
    next_arrival,
    phases_of,
    users_for,
)
from loadtests.tallies import OK, REFUSALS, Tally


def course(shape: str, **changes: Any) -> Course:
    values = {"seconds": 20.0, "rate_per_s": 10.0, "factor": 2.0, "step_s": 5, "warm_up_s": 2}
    return Course(shape, **{**values, **changes})


@pytest.mark.parametrize("shape", ["closed-loop", "arrival-rate", "steps", "spike", "soak"])
def test_phases_follow_one_another(shape: str):
    phases = phases_of(course(shape, rate_per_s=0.0 if shape == "closed-loop" else 10.0))
    assert (phases[0].name, phases[0].start_s, phases[0].judged) == (WARM_UP, 0.0, False)
    assert all(before.end_s == after.start_s for before, after in itertools.pairwise(phases))
    assert phases[-1].end_s == 22.0
    assert all(phase.end_s == int(phase.end_s) for phase in phases)


def test_steps_grow_and_only_the_first_is_judged():
    phases = phases_of(course("steps"))[1:]
    assert [phase.rate_per_s for phase in phases] == [10, 20, 40, 80]
    assert [phase.judged for phase in phases] == [True, False, False, False]
    assert [phase.may_refuse for phase in phases] == [False, True, True, True]


def test_steps_without_an_end_go_on_until_saturation():
    assert len(phases_of(course("steps", seconds=0.0, warm_up_s=0))) == MOST_STEPS


def test_a_spike_returns_to_the_rate_before_it():
    before, spike, after = phases_of(course("spike", warm_up_s=0))
    assert (before.rate_per_s, spike.rate_per_s, after.rate_per_s) == (10, 20, 10)
    assert [phase.may_refuse for phase in (before, spike, after)] == [False, True, False]
    assert all(phase.judged for phase in (before, spike, after))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (course("steps", rate_per_s=0.0), "'steps' needs --rate"),
        (course("closed-loop"), "closed loop has no --rate"),
        (course("spike", factor=1.0), "rates must grow"),
        (course("soak", seconds=0.0), "must last a second"),
    ],
)
def test_shapes_without_what_they_need_are_refused(wrong: Course, text: str):
    with pytest.raises(ShapeError, match=text):
        phases_of(wrong)


def arrivals(phases: list[Phase], share: float = 1.0) -> list[float]:
    draw, found, at_s = random.Random(3).expovariate, [], 0.0
    while (at_s := next_arrival(at_s, phases, share, draw)) < math.inf:
        found.append(at_s)
    return found


def test_arrivals_keep_each_phases_rate():
    phases = [Phase("a", 0.0, 100.0, 20.0), Phase("b", 100.0, 200.0, 80.0)]
    found = arrivals(phases)
    assert found == sorted(found)
    assert sum(at_s < 100 for at_s in found) == pytest.approx(2000, rel=0.1)
    assert sum(at_s >= 100 for at_s in found) == pytest.approx(8000, rel=0.1)
    assert len(arrivals(phases, share=0.5)) == pytest.approx(5000, rel=0.1)


def test_a_slow_phase_does_not_delay_the_next_one():
    found = arrivals([Phase("idle", 0.0, 10.0, 1e-6), Phase("busy", 10.0, 11.0, 1000.0)])
    assert 10.0 <= found[0] < 10.1
    assert len(found) == pytest.approx(1000, rel=0.2)


def test_users_cover_the_highest_rate():
    assert users_for([Phase("a", 0, 1, 100.0), Phase("b", 1, 2, 400.0)], 0.5) == 200
    assert users_for([Phase("a", 0, 1, 1.0)], 0.5) == 32
    assert users_for([Phase("a", 0, 1, 1e6)], 10.0) == 1000


def tally(good: int, refused: int) -> Tally:
    made = Tally()
    for _ in range(good):
        made.add(OK, 1.0, in_time=True)
    for _ in range(refused):
        made.add(REFUSALS[429], 0.0, in_time=False)
    return made


def test_two_steps_below_nine_tenths_are_past_saturation():
    assert not is_saturated(tally(95, 5), [tally(80, 20)])
    assert is_saturated(tally(80, 20), [tally(100, 0), tally(80, 20)])
