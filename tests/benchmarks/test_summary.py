"""Percentiles, medians, ratios and targets."""

import pytest

from benchmarks.summary import (
    Case,
    Measurement,
    Summary,
    cpu_ratio,
    p50_above_ms,
    percentile,
    summarize,
    table,
    targets,
)
from benchmarks.workloads import AnswerCheck


@pytest.mark.parametrize(
    ("share", "value"), [(0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100), (0.01, 1), (0.0001, 1), (0.07, 7)]
)
def test_percentile_is_the_nearest_rank(share: float, value: int) -> None:
    assert percentile([*range(100, 0, -1)], share) == value


def test_percentile_of_one_value() -> None:
    assert percentile([3.5], 0.99) == 3.5


def measurement(cpu_s: float, latencies: list[float], check: AnswerCheck | None = None) -> Measurement:
    return Measurement(len(latencies), 2.0, cpu_s, 0.1, latencies, check, {"int8": len(latencies)})


def test_rounds_are_joined_by_medians_and_pooled_latencies() -> None:
    rounds = [
        measurement(0.1, [1.0] * 10, AnswerCheck(1, 0, 0.1)),
        measurement(0.9, [2.0] * 10, AnswerCheck(0, 2, 0.3)),
        measurement(0.2, [2.0] * 10),
    ]
    found = summarize(Case("m", "slipstream", "json", 4), rounds)
    assert found.cpu_ms == pytest.approx(20.0)
    assert found.cpu_rounds_ms == pytest.approx([10.0, 90.0, 20.0])
    assert found.p50_rounds_ms == [1.0, 2.0, 2.0]
    assert (found.p50_ms, found.p99_ms) == (2.0, 2.0)
    assert found.rows_per_s == 5.0
    assert found.client_cpu_ms == pytest.approx(10.0)
    assert (found.failed, found.wrong, found.worst_error) == (1, 2, 0.3)
    assert found.variants == {"int8": 30}


def test_rows_of_a_raw_batch_share_its_cost() -> None:
    found = summarize(Case("m", "raw", "arrays", 2, rows=8), [measurement(0.8, [4.0] * 10)])
    assert found.cpu_ms == pytest.approx(10.0)
    assert found.rows_per_s == 40.0
    assert found.p50_ms == 4.0


def summary(case: Case, cpu_ms: float, p50_ms: float = 1.0) -> Summary:
    return Summary(case, 100.0, p50_ms, 2.0, cpu_ms, [cpu_ms], [p50_ms], 0.1, 0, 0, 0.0, {})


ROWS = [
    summary(Case("tiny", "slipstream", "json", 16), 0.1),
    summary(Case("tiny", "plain", "json", 16), 0.4),
    summary(Case("big", "raw", "arrays", 1, rows=1), 8.0, p50_ms=9.0),
    summary(Case("big", "raw", "arrays", 2, rows=1), 12.0, p50_ms=11.0),
    summary(Case("big", "raw", "arrays", 2, rows=8), 10.0, p50_ms=80.0),
    summary(Case("big", "slipstream", "binary", 1), 9.0, p50_ms=9.75),
    summary(Case("big", "slipstream", "binary", 16), 13.0, p50_ms=90.0),
]


def test_targets_compare_the_rows_that_they_name() -> None:
    found = targets(ROWS, {"tiny": 0.5})
    assert [(target.seen, target.kept) for target in found] == [
        (pytest.approx(0.25), True),
        (pytest.approx(1.3), False),  # against batch 8 with as many runs at a time as the server
        (pytest.approx(0.75), True),  # against batch 1, one run at a time
        (0.5, False),
    ]


def test_targets_without_their_rows_are_left_out() -> None:
    assert targets(ROWS[:1], {}) == []


def test_table_has_one_line_per_case_and_ratios() -> None:
    lines = table(ROWS).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert len({len(line) for line in lines}) == 1
    tiny = lines[1].split()
    assert tiny[:4] == ["tiny:", "slipstream", "json", "c=16"]
    assert "0.25" in tiny  # of the plain handler's
    assert "1.30" in lines[7].split()  # of raw


def test_rounds_are_compared_in_pairs() -> None:
    case = Case("m", "raw", "arrays", 1)
    ours = Summary(case, 1.0, 1.0, 1.0, 2.0, [2.0, 20.0, 3.0], [5.0, 50.0, 6.0], 0.0, 0, 0, 0.0, {})
    base = Summary(case, 1.0, 1.0, 1.0, 1.0, [1.0, 20.0, 2.0], [4.5, 49.0, 5.8], 0.0, 0, 0, 0.0, {})
    assert cpu_ratio(ours, base) == pytest.approx(1.5)
    assert p50_above_ms(ours, base) == pytest.approx(0.5)
