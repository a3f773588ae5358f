"""Figures, tables and plots of the comparison."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest

from benchmarks.open_loop import OpenOutcome
from benchmarks.serving.plots import save_plots
from benchmarks.serving.results import Comparison, offered, reference_of
from benchmarks.serving.tables import cheapest, gain, markdown
from tests.benchmarks.serving.examples import comparison, rate, summary


def test_goodput_counts_what_came_in_time() -> None:
    outcome = OpenOutcome(100, {"ok": 4, "queue_full": 96}, [10.0, 250.0, 250.1, 900.0], 2.0, 1.0, 0.5, 3.0)
    found = offered(rate("Triton", 1, 0.0), outcome)
    assert (found.goodput, found.in_time) == (pytest.approx(1.0), pytest.approx(0.02))
    assert (found.p50_ms, found.p99_ms) == (250.0, 900.0)
    assert (found.server_cores, found.generator_cores, found.late_ms) == (0.5, 0.25, 3.0)
    assert found.answered == {"ok": 4, "queue_full": 96}


def test_rate_without_a_good_answer_has_no_latency() -> None:
    found = offered(rate("Triton", 1, 0.0), OpenOutcome(5, {"503": 5}, [], 1.0, 0.1, 0.1, 0.0))
    assert (found.goodput, found.p50_ms, found.p99_ms) == (0.0, None, None)


def test_reference_is_the_best_of_the_others() -> None:
    rows = [
        summary("cnn", "raw", "arrays", 2, 1.0, per_s=900.0),
        summary("cnn", "bare", "binary", 16, 1.0, per_s=800.0),
        summary("cnn", "slipstream", "binary", 16, 1.0, per_s=300.0),
        summary("cnn", "Triton", "json", 16, 1.0, per_s=100.0),
        summary("cnn", "Triton", "binary", 64, 1.0, per_s=200.0),
        summary("tiny", "Triton", "binary", 64, 1.0, per_s=999.0),
    ]
    assert reference_of(rows, "cnn", ["slipstream"], ["bare"]) == (200.0, "Triton, binary, 64 clients")
    assert reference_of(rows[:3], "cnn", ["slipstream"], ["bare"])[0] == 300.0
    with pytest.raises(ValueError, match="no server of cnn"):
        reference_of(rows[:2], "cnn", ["slipstream"], ["bare"])


def test_page_says_what_was_kept_missed_skipped_and_not_measured() -> None:
    page = markdown(comparison())
    assert "| first | 1 | 2 | kept |" in page
    assert "| second | 3 | 2 | MISSED |" in page
    assert "not offered: hopeless" in page
    assert "- Ray Serve, cnn: not installed" in page
    assert "1 is 100 requests/s (Triton, binary, 16 clients)" in page
    assert "| cnn | Triton | 2.0 | 10 | 5 | 0.010 |" in page  # the median start
    assert "| slipstream | binary | 16 | 100 | 1 | 2 | 9 | [9-9] | 1.12 | right, 1e-07 |" in page
    assert "| batching | cnn | CPU ms | 2 | 6 | 2.00x |" in page


def test_tables_have_as_many_cells_in_every_line() -> None:
    tables, last = [[]], ""
    for line in markdown(comparison()).splitlines():
        if line.startswith("|"):
            tables[-1].append(line.count("|"))
        elif last.startswith("|"):
            tables.append([])
        last = line
    assert len(tables) > 4
    assert all(len(set(counts)) == 1 for counts in tables if counts)


def test_gain_is_of_the_rounds_in_pairs() -> None:
    ablated = comparison().ablations[0]
    assert gain(ablated) == pytest.approx(2.0)
    assert gain(msgspec.structs.replace(ablated, more_is_better=True)) == pytest.approx(0.5)
    nothing = gain(msgspec.structs.replace(ablated, without=[0.0, 0.0, 0.0]))
    assert nothing != nothing


def test_cheapest_messages_are_found() -> None:
    rows = comparison().summaries
    assert cheapest(rows, "cnn", "Triton", 16).case.kind == "binary"
    assert cheapest(rows, "cnn", "Triton", 64) is None


def test_results_can_be_read_back() -> None:
    written = msgspec.json.encode(comparison())
    assert msgspec.json.decode(written, type=Comparison) == comparison()


def test_plots_are_svg_whose_ink_follows_the_page(tmp_path: Path) -> None:
    paths = save_plots(comparison(), tmp_path)
    assert [path.name for path in paths] == [
        "cnn-p99-poisson.svg",
        "cnn-goodput-poisson.svg",
        "cnn-p99-bursts.svg",
        "cnn-goodput-bursts.svg",
        "cnn-cpu.svg",
    ]
    for path in paths:
        text = path.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "prefers-color-scheme:dark" in text
        assert "currentColor" in text
        assert "#123456" not in text
        assert "slipstream" in text
