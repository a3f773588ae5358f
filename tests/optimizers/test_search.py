"""Gate and choice: what is refused, with which words, and what is served in which order."""

import numpy as np
import pytest

from optimizers.measurement import Comparison, Race, Sample
from optimizers.pareto import Policy, Standing
from optimizers.search import (
    Candidate,
    Gate,
    Knobs,
    choose_knobs,
    decide,
    deciding_rows,
    in_words,
    judge,
    speed_of,
)
from server.artifact import Fidelity

PLAIN = Candidate("plain", exact=True)
GATE = Gate(min_agreement=0.99, max_accuracy_drop=0.01)


def evidence(agreement: float = 1.0, accuracy: float | None = None, original: float | None = None) -> Fidelity:
    return Fidelity(512, agreement, agreement - 0.01, "top1", 0.999, 0.99, 30.0, accuracy, original)


def speed(value: float, rows: int = 1, margin: float = 0.03, cpu: float = 1.0) -> Comparison:
    return Comparison(rows, value, value - margin, value + margin, 20, cpu)


def race_of(times_ms: dict[str, tuple[float, float]]) -> Race:
    """A race in which batch 1 and batch 8 take the given times, with a little noise that is common to a round."""
    noise = np.random.default_rng(0).uniform(1, 1.2, 20)
    return Race(
        {
            (name, rows): [Sample(i, float(ms * n), float(ms * n)) for i, n in enumerate(noise)]
            for name, pair in times_ms.items()
            for rows, ms in zip((1, 8), pair, strict=True)
        }
    )


def test_failure_of_a_pass_is_the_reason():
    verdict = judge(Candidate("fp16", failure="onnxruntime crashed"), GATE, ())
    assert (verdict.kept, verdict.reason) == (False, "onnxruntime crashed")


def test_agreement_below_the_gate_is_refused_with_numbers():
    verdict = judge(Candidate("int8-static", fidelity=evidence(0.941)), GATE, [speed(2.0)])
    assert not verdict.kept
    assert verdict.reason == "agreement 0.941 < 0.99 (n=512, 95 % lower bound 0.931)"


def test_agreement_at_the_gate_is_enough():
    assert judge(Candidate("int8", fidelity=evidence(0.99)), GATE, [speed(2.0)]).kept


def test_accuracy_drop_beyond_the_budget_is_refused():
    candidate = Candidate("int8", fidelity=evidence(1.0, accuracy=0.90, original=0.92))
    assert judge(candidate, GATE, [speed(2.0)]).reason.startswith("accuracy 0.900 is 0.020 below the original's 0.920")
    assert judge(Candidate("int8", fidelity=evidence(1.0, 0.91, 0.92)), GATE, [speed(2.0)]).kept


def test_lossy_candidate_that_is_not_faster_is_refused_with_numbers():
    slow = judge(Candidate("int8", fidelity=evidence()), GATE, [speed(0.93)])
    assert (slow.kept, slow.reason) == (False, "not faster than exact FP32: 0.93x (0.90-0.96) at batch 1")
    assert not judge(Candidate("int8", fidelity=evidence()), GATE, [speed(1.01)]).kept


def test_small_gain_is_no_reason_to_give_up_exactness():
    small = judge(Candidate("int8", fidelity=evidence()), GATE, [speed(1.01), speed(1.12, 8)])
    assert not small.kept
    assert small.reason.startswith("not faster enough than exact FP32: 1.06x on average < 1.1x; 1.01x (0.98-1.04)")


def test_nothing_is_proven_without_data():
    assert "no data" in judge(Candidate("int8"), GATE, [speed(2.0)]).reason


def test_exact_candidate_need_not_be_faster_but_not_slower():
    assert judge(Candidate("fp32", exact=True, fidelity=evidence()), GATE, [speed(1.0)]).kept
    slower = judge(Candidate("fp32", exact=True, fidelity=evidence()), GATE, [speed(0.8)])
    assert slower.reason.startswith("slower than the best exact form so far: 0.80x")


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.5, 1.0), "faster"), ((1.5, 0.8), "slower"), ((1.0, 1.0), "indistinguishable"), ((1.0, 2.0), "faster")],
)
def test_speed_of_two_batch_sizes(values: tuple[float, float], expected: str):
    assert speed_of([speed(value, rows) for value, rows in zip(values, (1, 8), strict=True)]) == expected


def test_deciding_batch_sizes_are_those_measured():
    assert deciding_rows((1, 2, 4, 8)) == (1, 8)
    assert deciding_rows((1,)) == (1,)
    assert deciding_rows((2, 4)) == (2,)


def test_fastest_faithful_candidate_comes_first_and_fp32_last():
    candidates = [
        Candidate("fp32", exact=True, fidelity=evidence()),
        Candidate("int8-dynamic", fidelity=evidence()),
        Candidate("int8-static", fidelity=evidence()),
        Candidate("fp16", fidelity=evidence()),
        Candidate("int4", fidelity=evidence(0.5)),
    ]
    race = race_of(
        {
            "plain": (10, 80),
            "fp32": (10, 79),
            "int8-dynamic": (6, 50),
            "int8-static": (5, 40),
            "fp16": (12, 90),
            "int4": (1, 8),
        }
    )
    decision = decide(PLAIN, candidates, GATE, race)
    assert decision.kept == ("int8-static", "int8-dynamic", "fp32")
    assert decision.verdicts["fp16"].reason.startswith("not faster")
    assert decision.verdicts["int4"].reason.startswith("agreement")


def test_lossy_candidates_must_beat_the_best_exact_form_not_the_untouched_one():
    candidates = [Candidate("int8", fidelity=evidence()), Candidate("fp32", exact=True, fidelity=evidence())]
    decision = decide(PLAIN, candidates, GATE, race_of({"plain": (10, 80), "fp32": (5, 40), "int8": (6, 48)}))
    assert decision.kept == ("fp32",)
    assert "0.83x" in decision.verdicts["int8"].reason


def test_untouched_model_is_served_when_fusion_made_it_slower_or_wrong():
    race = race_of({"plain": (10, 80), "fp32": (15, 90)})
    slower = decide(PLAIN, [Candidate("fp32", exact=True, fidelity=evidence())], GATE, race)
    assert slower.kept == ("plain",)
    wrong = decide(PLAIN, [Candidate("fp32", exact=True, failure="NaN")], GATE, race)
    assert wrong.kept == ("plain",)


MORE = Knobs(threads=4)


def test_more_threads_are_taken_only_when_faster_for_little_more_work():
    assert choose_knobs("fp32", Knobs(), {MORE: [speed(1.8, cpu=1.1)]}).knobs == MORE
    costly = choose_knobs("fp32", Knobs(), {MORE: [speed(1.8, cpu=1.1), speed(1.8, 8, cpu=1.6)]})
    assert costly.knobs == Knobs()
    assert "1.60x of the CPU time per row, more than 1.25x" in costly.reason
    assert choose_knobs("fp32", Knobs(), {MORE: [speed(1.0)]}).knobs == Knobs()
    assert choose_knobs("fp32", Knobs(), {MORE: [speed(1.8), speed(0.7, 8)]}).knobs == Knobs()
    assert choose_knobs("fp32", Knobs(), {}).reason == "1 thread: nothing else was measured"


def test_the_fastest_of_the_affordable_settings_is_taken():
    basic = Knobs(graph_level="basic")
    choice = choose_knobs(
        "fp32", Knobs(), {MORE: [speed(1.9, cpu=2.0)], basic: [speed(1.2)], Knobs(4, True): [speed(1.1)]}
    )
    assert choice.knobs == basic
    assert choice.reason.startswith("1 thread, graph level basic chosen; 4 threads: 1.90x")


def test_for_latency_the_fastest_setting_is_taken_whatever_it_costs():
    spinning = Knobs(4, spinning=True)
    tried = {MORE: [speed(1.5, cpu=1.2)], spinning: [speed(1.7, cpu=2.0)]}
    assert choose_knobs("fp32", Knobs(), tried, "latency").knobs == spinning
    assert choose_knobs("fp32", Knobs(), tried, "throughput").knobs == MORE
    assert choose_knobs("fp32", Knobs(), {MORE: [speed(1.0)]}, "latency").knobs == Knobs()


def placed(name: str, p99_ms: float, size_bytes: int = 100, agreement: float = 1.0, rate: float = 100.0) -> Standing:
    return Standing(name, p99_ms, rate, 8, size_bytes, agreement, size_bytes)


def test_wanted_p99_refuses_what_is_too_slow_and_leaves_the_exact_form():
    race = race_of({"plain": (10, 80), "int8": (6, 50)})
    candidates = [Candidate("int8", fidelity=evidence(), standing=placed("int8", 7.0))]
    decision = decide(PLAIN, candidates, GATE, race, Policy(slo_ms=5.0))
    assert decision.verdicts["int8"].reason == "p99 of one row is 7.00 ms; wanted are 5 ms"
    assert decision.kept == ("plain",)
    assert decide(PLAIN, candidates, GATE, race, Policy(slo_ms=8.0)).kept == ("int8", "plain")


def test_smallest_is_chosen_for_size_even_when_it_is_slower():
    race = race_of({"plain": (10, 80), "int8": (6, 50), "int4": (12, 95)})
    candidates = [
        Candidate("int8", fidelity=evidence(), standing=placed("int8", 6, 25)),
        Candidate("int4", fidelity=evidence(), standing=placed("int4", 12, 14)),
    ]
    plain = Candidate("plain", exact=True, standing=placed("plain", 10, 100))
    decision = decide(plain, candidates, GATE, race, Policy("size"))
    assert decision.kept[0] == "int4"
    assert "7.14x better in size" in decision.verdicts["int4"].reason
    assert decide(plain, candidates, GATE, race, Policy("latency")).kept[0] == "int8"


def test_proven_candidate_that_adds_nothing_is_not_served():
    race = race_of({"plain": (10, 80), "best": (5, 40), "also": (6, 50)})
    candidates = [
        Candidate("best", fidelity=evidence(), standing=placed("best", 5, 25, 0.999, 200)),
        Candidate("also", fidelity=evidence(), standing=placed("also", 6, 30, 0.995, 160)),
    ]
    plain = Candidate("plain", exact=True, standing=placed("plain", 10, 100))
    decision = decide(plain, candidates, GATE, race)
    assert decision.kept == ("best", "plain")
    assert decision.verdicts["also"].proven
    assert decision.verdicts["also"].reason.startswith("another one is at least as good in everything; faithful")
    assert decision.pareto == ("plain", "best")


def test_build_for_this_cpu_must_beat_the_portable_form_and_never_is_the_last_resort():
    bound = Candidate("host", exact=True, host_bound=True, fidelity=evidence())
    fp32 = Candidate("fp32", exact=True, fidelity=evidence())
    faster = decide(PLAIN, [bound, fp32], GATE, race_of({"plain": (10, 80), "fp32": (10, 80), "host": (8, 60)}))
    assert faster.kept == ("host", "fp32")
    same = decide(PLAIN, [bound, fp32], GATE, race_of({"plain": (10, 80), "fp32": (10, 80), "host": (9.8, 79)}))
    assert same.kept == ("fp32",)
    assert "not 5 % faster than the portable form" in same.verdicts["host"].reason


def test_policy_is_said_in_words():
    text = in_words(Policy("throughput", 20))
    assert text.startswith(
        "the one with the most rows per second of the faithful candidates whose p99 at one row is at"
    )
