"""Tables, files and plots of a result."""

import csv
import json
import math
import re
from pathlib import Path

import pytest

from loadtests.plots import draw
from loadtests.report import Line, Result, generator_line, save, summary, table
from loadtests.tallies import FAILED, OK, REFUSALS, Tally


def line(name: str, ok: int, **outcomes: int) -> Line:
    tally = Tally()
    for number in range(ok):
        tally.add(OK, 10.0 + number, in_time=number < 5)
    for outcome, count in outcomes.items():
        tally.outcomes[{"refused": REFUSALS[429], "failed": FAILED}[outcome]] += count
    return Line(name, 2.0, 5.0, tally)


def result(*missed: str) -> Result:
    lines = [line("0", 4), line("1", 10, refused=4), line("2", 0, failed=3)]
    return Result("steps of m", lines, [line("m", 14)], lines, missed, [0.5, 0.2], ["something found"])


def test_columns_in_which_nothing_was_counted_are_left_out():
    text = table([line("a", 4), line("b", 10, refused=4)])
    head, first, second = (re.split(r"  +", row) for row in text.splitlines())
    assert head == ["phase", "asked/s", "good/s", "p50 ms", "p90 ms", "p99 ms", "refused 429"]
    assert first[:3] == ["a", "2.0", "2.0"]
    assert second[:3] == ["b", "7.0", "2.5"]
    assert second[-1] == "4"


def test_summary_ends_with_the_verdict():
    assert summary(result()).endswith("PASSED: every threshold is kept")
    assert "something found" in summary(result())
    assert summary(result("this", "that")).endswith("FAILED: this\nFAILED: that")


def test_a_busy_generator_warns():
    assert generator_line([0.5, 0.95]) == (
        "load generator: 2 processes, the busiest took 95% of a core; that is all it can: these latencies are its own, "
        "take more processes or fewer requests"
    )
    assert "is all it can" not in generator_line([0.5])


def test_files_hold_the_figures(tmp_path: Path):
    save(result("this"), tmp_path / "new" / "run")
    document = json.loads((tmp_path / "new" / "run.json").read_text())
    assert document["missed"] == ["this"]
    assert document["phases"][1]["refused_429"] == 4
    assert document["phases"][1]["good_per_s"] == 2.5
    assert document["phases"][2]["p99_ms"] is None
    rows, seconds = (
        list(csv.DictReader((tmp_path / "new" / f"run-{name}.csv").read_text().splitlines()))
        for name in ("phases", "timeline")
    )
    assert [row["answered_per_s"] for row in rows] == ["2.0", "5.0", "0.0"]
    assert len(seconds) == 3


@pytest.mark.parametrize("by_rate", [True, False])
@pytest.mark.parametrize("deadline_ms", [20.0, math.inf])
def test_plots_name_what_they_show(tmp_path: Path, by_rate: bool, deadline_ms: float):
    draw(result(), by_rate=by_rate, deadline_ms=deadline_ms, path=tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    for name in ("good (goodput)", "late", "refused", "failed or unanswered", "p99", "steps of m"):
        assert f">{name}</text>" in text
    assert ("in time: 20 ms" in text) == math.isfinite(deadline_ms)
    assert ("requests asked per second" in text) == by_rate
