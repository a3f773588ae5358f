"""The exact passes are kept one by one: right, and not slower than what they were given."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimizers.building import Built
from optimizers.exact import build_exact
from optimizers.measurement import Race, Sample
from optimizers.passes import Pass, PassContext, PassResult, copy_of
from optimizers.passes.catalog import MUST_GAIN, PREPARING
from server.errors import InferenceFailed
from tests.optimizers.test_building import Bench, Burden, Unburden, without_processes
from tests.optimizers.test_isolation import Damage, Nothing, Refuse, Rename, Step


class FixedBatch(Step):
    """Fixes the batch to 1, which no sample that runs alone reveals."""

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        twin = copy_of(model)
        twin.graph.initializer.append(numpy_helper.from_array(np.array([1, 64], np.int64), "shape"))
        twin.graph.node[0].input[0] = "fixed"
        twin.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["fixed"]))
        return PassResult(twin, changed=True)


@pytest.fixture
def bench(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    without_processes(monkeypatch)
    made = Bench(mlp, tmp_path, rows=(1, 8))
    yield made
    made.close()


def build(bench: Bench, *steps: Pass) -> Built:
    return build_exact(bench.line, bench.track, steps, 0, lambda *_: None)


def test_passes_that_are_right_and_not_slower_make_the_fp32_form(bench: Bench):
    fp32 = build(bench, Nothing(), Burden(name="sanitize"), Unburden())
    assert (fp32.name, fp32.precision, fp32.exact, fp32.failure) == ("fp32-fused", "fp32", True, "")
    assert fp32.passes == ("sanitize(name=sanitize)", "unburden")
    nothing, _, unburden = bench.line.records
    assert (nothing.status, nothing.speed) == ("unchanged", ())
    assert unburden.status == "applied"
    assert [speed.verdict for speed in unburden.speed] == ["faster", "faster"]
    assert [speed.rows for speed in unburden.speed] == [1, 8]


def test_pass_whose_result_is_slower_is_left_out_with_numbers(bench: Bench):
    fp32 = build(bench, Burden())
    assert fp32.chain == ()
    assert fp32.form == bench.original
    (record,) = bench.line.records
    assert record.status == "slower"
    ratio = r"0\.\d\dx \(0\.\d\d-0\.\d\d\)"
    assert re.fullmatch(
        rf"left out: 0\.\d\dx the speed of the form before it \({ratio} at batch 1, {ratio} at batch 8\)", record.reason
    )
    assert [speed.verdict for speed in record.speed] == ["slower", "slower"]


def test_next_pass_takes_what_was_kept_and_not_what_was_left_out(bench: Bench):
    fp32 = build(bench, Burden(), Refuse(), Damage(), Burden(1, name="sanitize"))
    assert [(record.name, record.status, record.after) for record in bench.line.records] == [
        ("burden", "slower", ()),
        ("refuse", "refused", ()),
        ("damage", "refused", ()),
        ("sanitize(pairs=1, name=sanitize)", "applied", ()),
    ]
    assert [node.op_type for node in onnx.load(fp32.model).graph.node].count("Neg") == 2


def test_pass_that_others_build_on_is_kept_even_where_it_is_slower(bench: Bench):
    assert "sanitize" in PREPARING
    fp32 = build(bench, Burden(name="sanitize"))
    assert fp32.passes == ("sanitize(name=sanitize)",)
    (record,) = bench.line.records
    assert (record.status, record.reason) == ("applied", "")
    assert {speed.verdict for speed in record.speed} == {"slower"}


def test_pass_that_must_gain_is_left_out_at_equal_speed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def tie(labels: Sequence[str], sizes: Sequence[int], *_: object) -> Race:
        return Race({(label, rows): [Sample(i, 1e-3, 1e-3) for i in range(9)] for label in labels for rows in sizes})

    monkeypatch.setattr(bench.track, "race", tie)
    (name,) = MUST_GAIN
    fp32 = build(bench, Burden(1, name=name), Burden(1, name="any"))
    assert fp32.passes == ("any(pairs=1, name=any)",)
    assert bench.line.records[0].reason == (
        "left out: 1.00x the speed of the form before it (1.00x (1.00-1.00) at batch 1, 1.00x (1.00-1.00) at batch 8)"
    )


def test_pass_that_must_gain_is_kept_when_it_does(bench: Bench):
    (name,) = MUST_GAIN
    fp32 = build(bench, Burden(name="sanitize"), Unburden(name=name))
    assert fp32.passes[1:] == (f"{name}(name={name})",)


def test_result_that_does_not_run_in_batches_is_refused(bench: Bench):
    fp32 = build(bench, FixedBatch(), Rename())
    (fixed, rename) = bench.line.records
    assert fixed.status == "refused"
    assert fixed.reason.startswith("does not run: ")
    assert rename.after == ()
    assert "fixedbatch" not in fp32.passes


def test_without_any_pass_the_original_is_the_fp32_form(bench: Bench):
    assert build(bench).form == bench.original


def test_progress_names_the_pass(bench: Bench):
    seen: list[tuple[str, float]] = []
    build_exact(bench.line, bench.track, (Nothing(), Refuse()), 0, lambda stage, share: seen.append((stage, share)))
    assert seen == [("pass nothing", 0.0), ("pass refuse", 0.5)]


def test_no_session_is_left_but_that_of_the_original(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Two are open at a time: the best form so far, and the one that it is raced against."""
    counts: list[int] = []
    race = bench.track.race

    def counted(*arguments: Any) -> Race:
        counts.append(len(bench.track._sessions))
        return race(*arguments)

    monkeypatch.setattr(bench.track, "race", counted)
    build(bench, Burden(name="sanitize"), FixedBatch(), Unburden(), Burden(2))
    assert counts == [3, 3, 3]
    assert list(bench.track._sessions) == ["original"]


def test_result_whose_race_fails_is_refused_and_its_session_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Race:
        raise InferenceFailed("out of memory")

    monkeypatch.setattr(bench.track, "race", fail)
    assert build(bench, Rename()).form == bench.original
    assert bench.line.records[0].reason == "does not run: out of memory"
    assert list(bench.track._sessions) == ["original"]
