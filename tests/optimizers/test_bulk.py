"""The variant for large batches: when there is one, and from how many rows on."""

import numpy as np
import pytest

from optimizers.bulk import find_bulk, gains_from, promises_bulk, with_bulk
from optimizers.measurement import Comparison, Race, Sample
from optimizers.pareto import Policy
from optimizers.search import Candidate, Decision, Gate, Verdict
from server.artifact import Fidelity

GATE = Gate(min_agreement=0.99, max_accuracy_drop=0.01)
ROWS = (1, 8, 32)
FIRST = Candidate("fp32", exact=True)


def race_of(**times_ms: tuple[float, float, float]) -> Race:
    """A race with the given times at ``ROWS``, with a little noise that is common to a round."""
    noise = np.random.default_rng(0).uniform(1, 1.2, 20)
    return Race(
        {
            (name, rows): [Sample(i, float(ms * n), float(ms * n)) for i, n in enumerate(noise)]
            for name, times in times_ms.items()
            for rows, ms in zip(ROWS, times, strict=True)
        }
    )


def lossy(name: str = "int8", agreement: float = 1.0, failure: str = "", provider: str = "cpu") -> Candidate:
    fidelity = Fidelity(512, agreement, agreement - 0.01, "top1", 0.999, 0.99, 30.0)
    return Candidate(name, provider, failure=failure, fidelity=fidelity)


def test_candidate_that_wins_for_many_rows_takes_those():
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 4.0, 8.0))
    bulk = find_bulk(FIRST, [lossy()], GATE, race, Policy())
    assert bulk is not None
    assert (bulk.name, bulk.from_rows) == ("int8", 32)


def test_it_takes_all_sizes_from_which_on_it_always_wins():
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 2.0, 8.0))
    assert gains_from("int8", "fp32", ROWS, race).from_rows == 8


def test_a_win_in_the_middle_only_is_none():
    assert gains_from("int8", "fp32", ROWS, race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 2.0, 16.0))) is None


@pytest.mark.parametrize(
    "candidate",
    [
        lossy(agreement=0.98),
        lossy(failure="crashed"),
        lossy(provider="cuda"),
        Candidate("int8"),
    ],
    ids=["unfaithful", "failed", "elsewhere", "without evidence"],
)
def test_candidate_that_may_not_serve_is_none(candidate: Candidate):
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 4.0, 8.0))
    assert find_bulk(FIRST, [candidate], GATE, race, Policy()) is None


def test_gain_below_the_least_is_none():
    race = race_of(fp32=(1.0, 4.0, 10.0), int8=(2.0, 4.0, 9.5))
    assert find_bulk(FIRST, [lossy()], GATE, race, Policy()) is None


def test_best_of_several_is_chosen_by_the_largest_batch():
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 2.0, 8.0), pruned=(2.0, 4.0, 4.0))
    assert find_bulk(FIRST, [lossy(), lossy("pruned")], GATE, race, Policy()).name == "pruned"


def test_batches_beyond_the_wanted_p99_do_not_count():
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 4.0, 8.0))
    assert find_bulk(FIRST, [lossy()], GATE, race, Policy(slo_ms=10_000)) is None
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 2.0, 16.0))
    assert find_bulk(FIRST, [lossy()], GATE, race, Policy(slo_ms=10_000)).from_rows == 8


@pytest.mark.parametrize("objective", ["memory", "size"])
def test_speed_is_no_reason_when_something_else_is_wanted(objective: str):
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 4.0, 8.0))
    assert find_bulk(FIRST, [lossy()], GATE, race, Policy(objective)) is None


def test_it_is_served_behind_the_first_choice_with_a_reason():
    race = race_of(fp32=(1.0, 4.0, 16.0), int8=(2.0, 4.0, 8.0))
    decision = Decision({"int8": Verdict(False, "slower")}, {}, ("fp32",))
    served = with_bulk(decision, gains_from("int8", "fp32", ROWS, race))
    assert served.kept == ("fp32", "int8")
    assert served.verdicts["int8"].reason.startswith("faithful, and serves batches of 32 rows and more: 2.00x")


@pytest.mark.parametrize(
    ("at_one", "at_32", "promising"), [(0.8, 1.5, True), (0.8, 1.0, False), (1.3, 0.8, False), (1.3, 1.0, True)]
)
def test_promise_is_a_gain_at_the_largest_batch(at_one: float, at_32: float, promising: bool):
    pair = [Comparison(r, s, s - 0.02, s + 0.02, 20, 1.0) for r, s in ((1, at_one), (32, at_32))]
    assert promises_bulk(pair) is promising
