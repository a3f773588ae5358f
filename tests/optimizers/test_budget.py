"""The time budget: what is left, and what does not start any more."""

import math

import pytest

from optimizers.budget import SPENT, Budget


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(clock: Clock) -> Budget:
    made = Budget(60.0, clock)
    made.begin()
    return made


def test_what_is_left_is_what_has_not_passed_and_is_not_reserved(budget: Budget, clock: Clock):
    assert budget.left_s() == 60.0
    clock.now_s = 110.0
    assert (budget.elapsed_s, budget.left_s()) == (10.0, 50.0)
    budget.reserve("a", 20.0)
    budget.reserve("b", 5.0)
    assert budget.left_s() == 25.0
    budget.reserve("a", 1.0)
    assert budget.left_s() == 44.0
    budget.reserve("a", 0.0)
    assert budget.left_s() == 45.0
    clock.now_s = 200.0
    assert budget.left_s() == -45.0


def test_work_that_does_not_fit_is_refused_in_words(budget: Budget):
    budget.reserve("proof", 40.0)
    assert budget.refusal() == budget.refusal(20.0) == ""
    assert budget.refusal(20.1) == "would not finish within the time budget (needs about 21 s)"
    budget.reserve("proof", 60.0)
    assert budget.refusal() == budget.refusal(1.0) == SPENT == "the time budget is spent"


def test_mandatory_work_is_never_refused(clock: Clock):
    budget = Budget(1.0, clock)
    budget.reserve("proof", 10.0)
    clock.now_s = 1e6
    assert budget.left_s() == math.inf
    assert budget.refusal(1e9) == ""
    budget.begin()
    assert budget.refusal() == SPENT


def test_run_without_a_limit_is_never_late():
    budget = Budget()
    budget.begin()
    budget.reserve("proof", 1e6)
    assert budget.refusal(1e12) == ""
