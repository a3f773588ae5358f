"""Which thresholds hold where."""

from typing import Any

import pytest

from loadtests.objectives import Objective
from loadtests.shapes import WARM_UP, Phase
from loadtests.tallies import FAILED, OK, REFUSALS, UNANSWERED, Tally


def phase(name: str = "p", **changes: Any) -> Phase:
    return Phase(name, 0.0, 10.0, 10.0, **changes)


def counted(ok: int = 100, ms: float = 10.0, **outcomes: int) -> Tally:
    tally = Tally()
    for _ in range(ok):
        tally.add(OK, ms, in_time=ms <= 50)
    names = {"refused": REFUSALS[429], "failed": FAILED, "unanswered": UNANSWERED}
    for name, count in outcomes.items():
        tally.outcomes[names[name]] += count
    return tally


def missed(tally: Tally, objective: Objective, **changes: Any) -> str:
    return "; ".join(objective.missed([(phase(**changes), tally)]))


def test_what_is_kept_is_not_missed():
    assert not missed(counted(), Objective(max_p99_ms=11, min_goodput_per_s=10))


@pytest.mark.parametrize(
    ("tally", "objective", "text"),
    [
        (counted(), Objective(max_p99_ms=9), "p: p99 is 9.959 ms, allowed are 9"),
        (counted(failed=1), Objective(), "p: error rate is 0.0099"),
        (counted(unanswered=1), Objective(), "p: error rate is 0.0099"),
        (counted(refused=5), Objective(), "p: refused share is 0.0476"),
        (counted(ms=60), Objective(min_goodput_per_s=1), "goodput is 0.0/s, wanted are 1"),
        (counted(ok=0, refused=5), Objective(max_refused_share=1), "no request was answered"),
    ],
)
def test_each_threshold_can_be_missed(tally: Tally, objective: Objective, text: str):
    assert text in missed(tally, objective)


def test_allowed_shares_are_allowed():
    assert not missed(counted(failed=1, refused=5), Objective(max_error_rate=0.02, max_refused_share=0.05))


def test_steps_beyond_the_first_may_refuse_and_be_slow_but_not_err():
    beyond = {"judged": False, "may_refuse": True}
    assert not missed(counted(refused=500, unanswered=5), Objective(max_p99_ms=9), **beyond)
    assert "error rate" in missed(counted(failed=5), Objective(), **beyond)


def test_refusals_in_a_spike_are_as_they_should_be():
    assert not missed(counted(refused=500), Objective(), may_refuse=True)
    assert "p99" in missed(counted(refused=500), Objective(max_p99_ms=9), may_refuse=True)


def test_the_warm_up_does_not_count():
    objective = Objective(max_p99_ms=50)
    warm = (phase(WARM_UP, judged=False, may_refuse=True), counted(ms=500, failed=9))
    assert not objective.missed([warm, (phase(), counted())])
    assert objective.missed([warm]) == ["no request was answered"]


def test_the_highest_rate_that_holds_ends_before_the_first_miss():
    objective = Objective(max_p99_ms=50)
    steps = [(phase(), counted(ok=50)), (phase(), counted(ok=80)), (phase(), counted(refused=9)), (phase(), counted())]
    assert objective.highest_held(steps) == 8.0
    assert objective.highest_held(steps[2:]) == 0.0


def test_in_time_is_the_requests_own_deadline_or_the_objective():
    assert Objective(slo_ms=20, max_p99_ms=50).is_in_time(20, 0)
    assert not Objective(slo_ms=20, max_p99_ms=50).is_in_time(30, 0)
    assert Objective(slo_ms=20).is_in_time(30, 40)
    assert not Objective().is_in_time(50, 40)
    assert Objective().is_in_time(1e9, 0)
