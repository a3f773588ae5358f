"""The promises of the comparison."""

import msgspec
import pytest

from benchmarks.serving.bars import bars
from tests.benchmarks.serving.examples import rate, summary


def seen(found, text: str):
    (bar,) = [bar for bar in found if text in bar.text]
    return bar


def test_small_models_are_held_against_the_same_messages() -> None:
    rows = [
        summary("tiny", "slipstream", "json", 16, 0.1),
        summary("tiny", "slipstream", "binary", 16, 0.1),
        summary("tiny", "bare", "json", 16, 0.04),
        summary("tiny", "bare", "binary", 16, 0.1),
        summary("tiny", "plain FastAPI", "json", 16, 1.0),
        summary("tiny", "Triton", "binary", 16, 0.2),
        summary("wide", "slipstream", "json", 64, 1.0),
        summary("wide", "plain FastAPI", "json", 64, 5.0),
    ]
    found = bars(rows, [])
    assert seen(found, "tiny, json, 16 clients: CPU per request, of bare's").seen == pytest.approx(2.5)
    assert not seen(found, "tiny, json, 16 clients: CPU per request, of bare's").kept
    assert seen(found, "tiny, binary, 16 clients: CPU per request, of bare's").kept
    assert seen(found, "tiny, json, 16 clients: CPU per request, of plain").seen == pytest.approx(0.1)
    assert seen(found, "of Triton's").seen == pytest.approx(0.5)
    assert seen(found, "wide, json, 64 clients").allowed == 0.25
    assert len(found) == 5


def test_one_client_is_held_against_one_run_at_a_time() -> None:
    rows = [
        summary("cnn", "raw", "arrays", 1, 9.0, p50_ms=10.0),
        summary("cnn", "raw", "arrays", 2, 9.0, p50_ms=70.0, rows=8),
        summary("cnn", "slipstream", "binary", 1, 9.5, p50_ms=10.4),
    ]
    (bar,) = bars(rows, [])
    assert (bar.seen, bar.allowed, bar.kept) == (pytest.approx(0.4), 0.5, True)


def test_round_in_which_one_failed_leaves_the_medians() -> None:
    row = summary("cnn", "slipstream", "binary", 1, 9.5, p50_ms=10.4)
    three = msgspec.structs.replace(row, cpu_rounds_ms=[9.5] * 3, p50_rounds_ms=[10.4] * 3)
    found = bars([summary("cnn", "raw", "arrays", 1, 9.0, p50_ms=10.0), three], [])
    assert found[0].seen == pytest.approx(0.4)
    busy = summary("cnn", "slipstream", "binary", 16, 12.0)
    found = bars([summary("cnn", "raw", "arrays", 2, 8.0), msgspec.structs.replace(busy, cpu_rounds_ms=[9.0] * 3)], [])
    assert found[0].seen == pytest.approx(1.5)


def test_large_models_are_held_against_raw_and_against_the_best_peer_of_each_figure() -> None:
    rows = [
        summary("cnn", "raw", "arrays", 2, 8.0, rows=8),
        summary("cnn", "slipstream", "binary", 16, 10.0, per_s=200.0, p99_ms=80.0),
        summary("cnn", "slipstream optimized", "binary", 16, 5.0, per_s=999.0, p99_ms=1.0),
        summary("cnn", "bare", "binary", 16, 0.1, per_s=9999.0, p99_ms=0.1),
        summary("cnn", "Triton", "binary", 16, 10.0, per_s=190.0, p99_ms=90.0),
        summary("cnn", "plain FastAPI", "json", 16, 10.0, per_s=100.0, p99_ms=40.0),
    ]
    found = bars(rows, [])
    assert seen(found, "of raw session.run's at its best batch").seen == pytest.approx(1.25)
    fastest, steadiest = seen(found, "requests/s of the best peer (Triton)"), seen(found, "(plain FastAPI)")
    assert (fastest.seen, fastest.kept) == (pytest.approx(0.95), True)
    assert (steadiest.seen, steadiest.kept) == (pytest.approx(2.0), False)
    assert len(found) == 3


def test_open_loop_compares_goodput_and_the_p99_of_those_that_keep_up() -> None:
    rows = [summary("cnn", "slipstream", "binary", 16, 1.0)]
    rates = [
        rate("slipstream", 1, 99.0, 20.0),
        rate("Triton", 1, 100.0, 10.0),
        rate("MLServer", 1, 20.0, 1.0),  # its p99 is of the few that it answered in time
        rate("slipstream", 2, 90.0),
        rate("Triton", 2, 95.0),
        rate("slipstream", 3, 50.0),
        rate("Triton", 3, -1.0),
    ]
    found = bars(rows, rates)
    at_once = [bar for bar in found if ", 1 of the reference" in bar.text]
    assert [(bar.seen, bar.kept) for bar in at_once] == [
        (pytest.approx(100 / 99), False),
        (pytest.approx(2.0), False),
    ]
    assert seen(found, ", 2 of the reference: goodput").seen == pytest.approx(95 / 90)
    assert not [bar for bar in found if ", 3 of the reference" in bar.text]


def test_what_was_not_measured_is_not_judged() -> None:
    assert bars([summary("tiny", "slipstream", "json", 16, 0.1)], []) == []
