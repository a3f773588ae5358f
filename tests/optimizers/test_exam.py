"""The exam: singles and batches, the worse counts, and what was found out once is not asked again."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from optimizers.building import Built
from optimizers.errors import PassFailed
from optimizers.evaluator import Evaluate
from optimizers.evidence import HeldOut
from optimizers.exam import Exam
from optimizers.fidelity import decision_for
from server.artifact import SessionOptions
from server.tensors import Array, Tensors
from tests.optimizers.test_building import Bench


class Twin:
    """Answers as the original does, but that single requests or batches get something added."""

    def __init__(self, bench: Bench, single: float = 0.0, batch: float = 0.0) -> None:
        self._original = bench.track.session("original")
        self._single, self._batch = single, batch
        self.runs = 0

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        self.runs += 1
        rows = len(inputs["x"])
        shift = np.zeros(10, np.float32)
        shift[0] = self._single if rows == 1 else self._batch
        return {"y": self._original.run(inputs)["y"] + shift}


@pytest.fixture
def bench(mlp: Path, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(mlp, tmp_path, rows=(1, 8))
    yield made
    made.close()


def built_of(bench: Bench) -> Built:
    return Built("a", "int8", "cpu", exact=False, form=bench.original)


@pytest.mark.parametrize(("single", "batch"), [(5.0, 0.0), (0.0, 5.0)], ids=["singles", "batches"])
def test_worse_of_singles_and_batches_counts(single: float, batch: float, bench: Bench):
    fidelity = bench.exam.fidelity(built_of(bench), Twin(bench, single, batch))
    assert fidelity.agreement < 0.8
    assert fidelity.samples == bench.exam.count == 60


def test_batches_do_not_count_where_rows_must_not_share_a_run(bench: Bench):
    alone = replace(bench.exam, rows=1)
    assert alone.fidelity(built_of(bench), Twin(bench, batch=5.0)).agreement == 1.0
    fidelity, answers = alone.glance(Twin(bench, batch=5.0))
    assert fidelity.agreement == 1.0
    np.testing.assert_array_equal(answers["y"], bench.samples.reference["y"])


def test_glance_looks_at_full_batches_only_where_rows_may_share_a_run(bench: Bench):
    session = Twin(bench, batch=5.0)
    fidelity, answers = bench.exam.glance(session)
    assert session.runs == 8, "60 samples in batches of 8"
    assert fidelity.agreement < 0.8
    np.testing.assert_allclose(answers["y"][:, 0], bench.samples.reference["y"][:, 0] + 5, rtol=1e-5)
    assert bench.exam.glance(Twin(bench, single=5.0))[0].agreement == 1.0


class Padded:
    """Answers ``[rows, positions, 2]``, with garbage behind the end of each sequence."""

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        mask = inputs["attention_mask"][..., None].astype(np.float32)
        return {"y": np.array([1.0, 2.0], np.float32) * mask + np.float32(9e3) * (1 - mask)}


def test_glance_sees_nothing_of_positions_that_the_mask_hides(bench: Bench):
    single = {"attention_mask": np.array([[1, 1, 1, 0, 0]])}
    reference = np.tile(np.array([1, 2], np.float32), (20, 5, 1))
    samples = HeldOut((single,) * 20, {"y": reference}, decision_for({"y": reference}))
    fidelity, answers = replace(bench.exam, samples=samples, rows=1).glance(Padded())
    assert fidelity.agreement == 1.0
    np.testing.assert_array_equal(answers["y"][:, 3:], 0)
    np.testing.assert_array_equal(answers["y"][:, :3], reference[:, :3])


def test_what_was_found_out_is_not_asked_again(bench: Bench):
    first = bench.exam.fidelity(built_of(bench), Twin(bench, 5.0))
    silent = Twin(bench)
    assert bench.exam.fidelity(built_of(bench), silent) == first
    assert silent.runs == 0


@pytest.mark.parametrize("change", ["model", "options", "provider", "part", "samples", "rows", "host"])
def test_what_was_found_out_of_something_else_does_not_count(change: str, bench: Bench):
    exam, built = bench.exam, built_of(bench)
    first = exam.fidelity(built, Twin(bench, 5.0))
    exams = {"part": {"name": "held-out"}, "samples": {"digest": "b"}, "rows": {"rows": 4}, "host": {"host": "b"}}
    forms = {"model": {"sha256": "b"}, "options": {"options": SessionOptions(config={"a": "1"})}}
    if change in exams:
        exam = replace(exam, **exams[change])
    elif change in forms:
        built = replace(built, form=replace(built.form, **forms[change]))
    else:
        built = replace(built, provider="cuda")
    assert exam.fidelity(built, Twin(bench)).agreement == 1.0 > first.agreement


def test_failure_is_raised_and_not_kept(bench: Bench):
    with pytest.raises(PassFailed, match="NaN"):
        bench.exam.fidelity(built_of(bench), Twin(bench, float("nan")))
    assert bench.exam.fidelity(built_of(bench), Twin(bench)).agreement == 1.0


def test_own_metric_takes_the_place_of_the_accuracy(bench: Bench):
    def share(outputs: Mapping[str, Array], labels: Array | None) -> float:
        return float(np.mean(outputs["y"][:, 0] > 1))

    judged: Evaluate = share
    fidelity = replace(bench.exam, evaluate=judged).fidelity(built_of(bench), Twin(bench, -0.5))
    assert fidelity.accuracy_original == share(bench.samples.reference, None)
    assert fidelity.accuracy is not None
    assert fidelity.accuracy < fidelity.accuracy_original


def test_few_samples_are_the_first_ones_with_their_labels(bench: Bench):
    labels = np.arange(60)
    exam: Exam = replace(bench.exam, samples=replace(bench.samples, labels=labels))
    few = exam.few(7)
    assert few.singles == bench.samples.singles[:7]
    np.testing.assert_array_equal(few.reference["y"], bench.samples.reference["y"][:7])
    assert few.labels is not None
    assert few.labels.tolist() == labels[:7].tolist()
    assert bench.exam.few(7).labels is None
    assert len(bench.exam.few(1000).singles) == 60
