"""What the original is asked: over which samples, how often, and what follows from its answers."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from optimizers import asking
from optimizers.asking import GOLDEN_SAMPLES, Original, Parts, Place, ask, parts_of
from optimizers.calibration import LABELS_KEY, Samples
from optimizers.errors import CalibrationError, RecipeError
from optimizers.evidence import run_singly
from optimizers.graph import load_model, signature_of
from optimizers.isolation import SERVING, Form
from optimizers.recipe import Recipe
from optimizers.store import Store
from server.artifact import digest_of
from server.errors import InferenceFailed
from server.host import HostFacts
from server.providers import CPU
from server.session import Session
from tests.models import save_batch_mixing, save_mlp, save_strings

RECIPE = Recipe(calibration_samples=10, search_samples=20, holdout_samples=30, batch_rows=(1, 4))
CLOSE = {"y": "close"}
HOST = HostFacts("a CPU", ("avx2",), 2)


class Desk:
    """One model, its samples, and a store."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.store = Store(folder / "store")
        self.runs = 0

    def parts(self, count: int | None = 60, recipe: Recipe = RECIPE, labels: bool = False, inputs: str = "a") -> Parts:
        """Read ``count`` samples, each of which is filled with its own number; ``None`` gives no data."""
        signature = signature_of(load_model(self.model))
        self.runs += 1
        place = Place(self.folder / f"samples{self.runs}", "source", inputs)
        if count is None:
            return parts_of(recipe, signature, None, None, place)
        (spec,) = signature.inputs
        x = np.repeat(np.arange(count, dtype=np.float32)[:, None], spec.shape[1], axis=1)
        np.savez(self.folder / "data.npz", **{spec.name: x})
        np.savez(self.folder / "labels.npz", **{LABELS_KEY: np.arange(count)})
        file = self.folder / "labels.npz" if labels else None
        return parts_of(recipe, signature, self.folder / "data.npz", file, place)

    def ask(self, parts: Parts, recipe: Recipe = RECIPE, host: HostFacts = HOST) -> Original:
        signature = signature_of(load_model(self.model))
        return ask(Form(self.model, digest_of(self.model)), signature, parts, recipe, self.store, host)


@pytest.fixture
def desk(mlp: Path, tmp_path: Path) -> Desk:
    return Desk(mlp, tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many samples each question to the original had."""
    counts: list[int] = []

    def counted(session: Session, singles: tuple, workers: int = 1) -> dict:
        counts.append(len(singles))
        return run_singly(session, singles, workers)

    monkeypatch.setattr(asking, "run_singly", counted)
    return counts


def numbers(samples: Samples | None) -> list[int]:
    """Which samples these are."""
    assert samples is not None
    return [int(batch["x"][0, 0]) for batch in samples.batches(1)]


def test_parts_are_disjoint_and_of_the_wanted_sizes(desk: Desk):
    parts = desk.parts()
    drawn = [numbers(part) for part in (parts.calibration, parts.search, parts.held_out)]
    assert [len(part) for part in drawn] == [10, 20, 30]
    assert sorted(chain(*drawn)) == list(range(60))
    assert parts.no_proof == ""
    assert (parts.record.origin, parts.record.sha256, parts.record.labels) == ("data.npz", "a", False)
    assert (parts.record.samples, parts.record.calibration) == (60, 10)
    assert (parts.record.search, parts.record.held_out) == (20, 30)


def test_same_seed_draws_the_same_parts_and_another_one_others(desk: Desk):
    other = Recipe(calibration_samples=10, search_samples=20, holdout_samples=30, seed=1)
    first, again, another = desk.parts(), desk.parts(), desk.parts(recipe=other)
    assert numbers(first.held_out) == numbers(again.held_out) != numbers(another.held_out)
    assert first.digest == again.digest != another.digest


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(calibration_samples=11, search_samples=20, holdout_samples=30),
        Recipe(calibration_samples=10, search_samples=21, holdout_samples=30),
        Recipe(calibration_samples=10, search_samples=20, holdout_samples=31),
    ],
)
def test_digest_depends_on_sizes_and_files(recipe: Recipe, desk: Desk):
    first = desk.parts().digest
    assert desk.parts(recipe=recipe).digest != first
    assert desk.parts(inputs="b").digest != first


def test_labels_go_with_their_samples(desk: Desk):
    parts = desk.parts(labels=True)
    assert parts.record.labels
    for part in (parts.search, parts.held_out):
        assert part.labels is not None
        assert part.labels.tolist() == numbers(part)
    original = desk.ask(parts)
    assert original.held_out.labels is not None
    assert original.held_out.labels.tolist() == numbers(parts.held_out)


def test_samples_are_made_up_without_data_and_prove_nothing(desk: Desk):
    parts = desk.parts(None)
    assert parts.calibration is None
    assert (parts.search.count, parts.held_out.count) == (0, 32)
    assert parts.no_proof == "no proof possible: no samples; give --calibration DATA.npz"
    assert parts.record.origin == "made up: no --calibration was given"
    assert parts.record.held_out == 32
    original = desk.ask(parts)
    assert original.search is None
    assert len(original.held_out.singles) == 32
    assert original.batching.batchable


def test_too_few_samples_prove_nothing(desk: Desk):
    parts = desk.parts(20)
    assert parts.no_proof == f"no proof possible: {parts.held_out.count} samples, at least 16 are needed"


def test_data_that_do_not_fit_are_refused(desk: Desk, tmp_path: Path):
    np.savez(tmp_path / "bad.npz", x=np.zeros((20, 63), np.float32))
    signature = signature_of(load_model(desk.model))
    with pytest.raises(CalibrationError, match="63"):
        parts_of(RECIPE, signature, tmp_path / "bad.npz", None, Place(tmp_path / "samples", "source", "inputs"))


def test_answers_are_those_of_the_original(desk: Desk):
    parts = desk.parts()
    original = desk.ask(parts)
    session = Session(desk.model, CPU, SERVING)
    assert original.search is not None
    for answered, samples in ((original.held_out, parts.held_out), (original.search, parts.search)):
        expected = session.run(samples.batch(0, samples.count))["y"]
        np.testing.assert_allclose(answered.reference["y"], expected, rtol=1e-5, atol=1e-5)
        assert [int(single["x"][0, 0]) for single in answered.singles] == numbers(samples)
    assert original.held_out.decision == "top1"
    assert original.batching.batchable
    assert original.batching.max_rows == 4


def test_original_is_not_asked_twice(desk: Desk, asked: list[int], monkeypatch: pytest.MonkeyPatch):
    parts = desk.parts()
    first = desk.ask(parts)
    assert asked == [30, 20]
    monkeypatch.setattr(asking, "prove_batching", None)  # calling it would fail
    monkeypatch.setattr(asking, "prove_padding", None)
    again = desk.ask(parts)
    assert asked == [30, 20]
    assert (again.batching, again.padding) == (first.batching, first.padding)
    for name, array in first.held_out.reference.items():
        np.testing.assert_array_equal(again.held_out.reference[name], array)
    assert again.search is not None
    assert first.search is not None
    np.testing.assert_array_equal(again.search.reference["y"], first.search.reference["y"])


@pytest.mark.parametrize("change", ["model", "samples", "rows", "host"])
def test_another_question_is_asked(change: str, desk: Desk, asked: list[int], tmp_path: Path):
    parts = desk.parts()
    desk.ask(parts)
    recipe, host = RECIPE, HOST
    if change == "model":
        desk.model = save_mlp(tmp_path / "other.onnx", seed=1)
    elif change == "samples":
        parts = desk.parts(inputs="b")
    elif change == "rows":
        recipe = Recipe(batch_rows=(1, 2))
    else:
        host = HostFacts("another CPU", ("avx2",), 2)
    desk.ask(parts, recipe, host)
    assert asked == [30, 20, 30, 20]


def test_interrupted_questions_go_on(desk: Desk, asked: list[int], monkeypatch: pytest.MonkeyPatch):
    """What was answered before the interruption is not asked again."""
    parts = desk.parts()
    prove = asking.prove_batching

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asking, "prove_batching", interrupted)
    with pytest.raises(KeyboardInterrupt):
        desk.ask(parts)
    monkeypatch.setattr(asking, "prove_batching", prove)
    assert desk.ask(parts).batching.batchable
    assert asked == [30, 20]


def test_golden_is_a_request_of_the_first_held_out_samples(desk: Desk):
    original = desk.ask(desk.parts())
    golden, held_out = original.golden, original.held_out
    assert len(golden.inputs["x"]) == GOLDEN_SAMPLES
    np.testing.assert_array_equal(golden.inputs["x"][3], held_out.singles[3]["x"][0])
    np.testing.assert_array_equal(golden.outputs["y"], held_out.reference["y"][:GOLDEN_SAMPLES])


def test_golden_of_a_model_that_must_not_be_batched_is_one_sample(tmp_path: Path):
    desk = Desk(save_batch_mixing(tmp_path / "m.onnx"), tmp_path)
    original = desk.ask(desk.parts(None))
    assert not original.batching.batchable
    assert len(original.golden.inputs["x"]) == 1
    np.testing.assert_array_equal(original.golden.outputs["y"], np.zeros((1, 4), np.float32))


def test_text_is_asked_again_because_it_is_not_kept(tmp_path: Path, asked: list[int]):
    desk = Desk(save_strings(tmp_path / "m.onnx"), tmp_path)
    parts = desk.parts(None)
    for runs in (1, 2):
        original = desk.ask(parts)
        assert len(asked) == runs
        assert original.held_out.reference["same"].tolist() == [b"text"] * 32


def test_original_that_fails_on_a_sample_ends_the_run(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    parts = desk.parts()

    def fail(*_: object) -> None:
        raise InferenceFailed("out of memory")

    monkeypatch.setattr(Session, "run", fail)
    with pytest.raises(InferenceFailed, match="out of memory"):
        desk.ask(parts)
    assert not list(desk.store.folder.glob("*/*"))


def test_recipe_names_the_decision_and_evidence_of_another_one_is_not_reused(desk: Desk):
    named = Recipe(calibration_samples=10, search_samples=20, holdout_samples=30, batch_rows=(1, 4), decisions=CLOSE)
    parts = desk.parts(recipe=named)
    original = desk.ask(parts, named)
    assert original.search is not None
    assert original.held_out.decision == original.search.decision == "close of y"
    assert parts.digest != desk.parts().digest


def test_decision_that_fits_no_output_is_refused(desk: Desk):
    with pytest.raises(RecipeError, match="its outputs are y; kinds of decisions are top1"):
        desk.parts(recipe=Recipe(decisions={"z": "close"}))
    recipe = Recipe(decisions={"y": "pixels"}, batch_rows=(1, 4))
    with pytest.raises(RecipeError, match=r"'pixels' does not fit the output 'y'; .* y \[30, 10\]: top1, "):
        desk.ask(desk.parts(), recipe)
