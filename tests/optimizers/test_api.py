"""The optimizer as a function: arrays or files in, typed evidence out."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import optimizers
from optimizers import Recipe, Result, Task, optimize, pipeline
from optimizers.calibration import LABELS_KEY
from optimizers.errors import CalibrationError, ModelError, OptimizerError
from optimizers.recipe import VariantPlan
from server.errors import SlipstreamError
from server.providers import CPU
from server.session import Session
from tests.optimizers.test_building import without_processes

RECIPE = Recipe(
    precisions=("fp32",), compressions=(), devices=("cpu",), batch_rows=(1,), variants=(VariantPlan("a", "fp32", ()),)
)
"""One variant without any pass: what is tested here is how things go in and out."""


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)
    monkeypatch.setattr("optimizers.trial.session_memory", lambda *_: None)


@pytest.fixture
def samples() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32)


def task_of(model: Path | str, folder: Path, **fields: object) -> Task:
    plain = {"name": "mlp", "recipe": RECIPE, "time_budget_s": 0.1}
    return Task(model=model, repository=folder / "models", **{**plain, **fields})


def test_artifact_and_its_evidence_come_back(mlp: Path, tmp_path: Path, samples: np.ndarray):
    result = optimize(task_of(mlp, tmp_path, calibration={"x": samples}))
    assert isinstance(result, Result)
    assert result.artifact.folder == tmp_path / "models" / "mlp" / "1"
    # "a" is the same file: on a busy machine it may seem faster.
    assert result.chosen.name == result.report.chosen
    assert result.chosen.name in ("fp32", "a")
    assert (result.artifact.folder / result.chosen.file).is_file()
    assert result.candidates.keys() == {"original", "original-1thread", "a"}
    assert result.candidates["original"].verdict == "baseline"
    assert result.report.data.samples == 60
    assert result.report.headline.startswith(f"{result.chosen.name} is served")
    assert result.report.command == "optimizers.optimize(...)"


def test_stages_are_told(mlp: Path, tmp_path: Path):
    seen: list[tuple[str, float]] = []
    optimize(task_of(mlp, tmp_path), lambda stage, share: seen.append((stage, share)))
    assert seen[0] == ("load", 0.0)
    assert seen[-1] == ("done", 1.0)


def test_files_and_paths_as_text_do_as_well(mlp: Path, tmp_path: Path, samples: np.ndarray):
    session = Session(mlp, CPU, pipeline.Form(mlp, "").options)
    np.savez(tmp_path / "data.npz", x=samples)
    np.savez(tmp_path / "labels.npz", **{LABELS_KEY: session.run({"x": samples})["y"].argmax(axis=1)})
    task = task_of(str(mlp), tmp_path, calibration=str(tmp_path / "data.npz"), labels=tmp_path / "labels.npz")
    result = optimize(replace(task, repository=str(tmp_path / "models")))
    assert result.report.data.origin == "data.npz"
    fidelity = result.candidates["a"].fidelity
    assert fidelity is not None
    assert fidelity.accuracy == fidelity.accuracy_original == 1.0


def test_labels_as_an_array_judge_by_accuracy(mlp: Path, tmp_path: Path, samples: np.ndarray):
    wrong = np.full(60, 11)
    fidelity = optimize(task_of(mlp, tmp_path, calibration={"x": samples}, labels=wrong)).candidates["a"].fidelity
    assert fidelity is not None
    assert fidelity.accuracy == fidelity.accuracy_original == 0.0


def test_same_task_does_nothing_the_second_time(
    mlp: Path, tmp_path: Path, samples: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    labels = np.zeros(60, np.int64)
    task = task_of(mlp, tmp_path, calibration={"x": samples}, labels=labels)
    first = optimize(task)
    monkeypatch.setattr(pipeline, "load_model", None)  # calling it would fail
    again = optimize(replace(task, calibration={"x": samples.copy()}, labels=labels.copy()))
    assert again.artifact == first.artifact
    assert again.report == first.report


def test_other_arrays_make_the_next_version(mlp: Path, tmp_path: Path, samples: np.ndarray):
    optimize(task_of(mlp, tmp_path, calibration={"x": samples}))
    assert optimize(task_of(mlp, tmp_path, calibration={"x": samples + 1})).artifact.version == "2"


def test_evaluator_judges(mlp: Path, tmp_path: Path, samples: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "judge.py").write_text("def score(outputs, labels):\n    return float(len(outputs['y']))\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = optimize(task_of(mlp, tmp_path, calibration={"x": samples}, evaluator="judge:score"))
    fidelity = result.candidates["a"].fidelity
    assert fidelity is not None
    assert fidelity.accuracy == fidelity.samples == result.report.data.held_out


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"name": "a/b"}, OptimizerError, "the name"),
        ({"calibration": {"wrong": np.zeros((20, 64), np.float32)}}, CalibrationError, "wrong"),
        ({"calibration": {"x": np.full((20, 64), np.nan, np.float32)}}, CalibrationError, "NaN"),
        ({"calibration": "missing.npz"}, OptimizerError, r"missing\.npz"),
        ({"evaluator": "no_such_module:score"}, OptimizerError, "no_such_module"),
        ({"calibration": {"x": np.array([object()])}}, CalibrationError, "cannot save x"),
        ({"labels": np.zeros(60, np.int64)}, CalibrationError, "labels were given without calibration"),
    ],
)
def test_what_cannot_be_used_is_refused(fields: dict, error: type[Exception], reason: str, mlp: Path, tmp_path: Path):
    with pytest.raises(error, match=reason):
        optimize(task_of(mlp, tmp_path, **fields))
    assert not list(tmp_path.glob("models/mlp/*"))


def test_labels_of_another_count_are_refused(mlp: Path, tmp_path: Path, samples: np.ndarray):
    with pytest.raises(CalibrationError, match="59"):
        optimize(task_of(mlp, tmp_path, calibration={"x": samples}, labels=np.zeros(59, np.int64)))


def test_file_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        optimize(task_of(tmp_path / "bad.onnx", tmp_path))


def test_original_that_does_not_run_is_an_error_of_the_server(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise SlipstreamError("out of memory")

    monkeypatch.setattr(Session, "run", fail)
    with pytest.raises(SlipstreamError, match="out of memory"):
        optimize(task_of(mlp, tmp_path))


def test_package_offers_the_function_and_its_types():
    assert optimizers.__all__ == ["Recipe", "Result", "Task", "optimize"]
    assert optimizers.optimize is importlib.import_module("optimizers.api").optimize
    with pytest.raises(AttributeError, match="no attribute 'Optimizer'"):
        optimizers.Optimizer  # noqa: B018
