"""The optimizer as a function, for notebooks and pipelines: arrays or files in, typed evidence out."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from optimizers import pipeline
from optimizers.calibration import LABELS_KEY
from optimizers.errors import CalibrationError
from optimizers.recipe import Recipe
from optimizers.records import CandidateRecord, Report
from optimizers.report import read_report
from optimizers.request import OptimizeRequest
from server.artifact import Artifact, Variant
from server.tensors import Array


class Result(msgspec.Struct, frozen=True):
    """What a run made, and everything that it found out.

    Attributes:
        artifact: The folder and its manifest.
        report: As in ``report.json``.
    """

    artifact: Artifact
    report: Report

    @property
    def chosen(self) -> Variant:
        """The variant that is served first."""
        return self.artifact.variants[0]

    @property
    def candidates(self) -> dict[str, CandidateRecord]:
        """Every candidate with its evidence and its verdict, by name."""
        return {record.name: record for record in self.report.candidates}


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to optimize and where to put it.

    Attributes:
        model: The ONNX file.
        repository: Folder of models; created when missing.
        name: Name to serve under.
        calibration: DATA.npz, or input name -> array with axis 0 = samples; without it only exact variants are made.
        labels: LABELS.npz, or one integer per sample.
        evaluator: ``module:function`` that judges outputs.
        recipe: What to build and what to require.
        time_budget_s: Seconds for the whole run, of which its mandatory part is never cut.
    """

    model: Path | str
    repository: Path | str
    name: str
    calibration: Path | str | Mapping[str, Array] | None = None
    labels: Path | str | Array | None = None
    evaluator: str = ""
    recipe: Recipe = Recipe()
    time_budget_s: float = 300.0


def optimize(task: Task, observe: Callable[[str, float], None] = lambda _stage, _share: None) -> Result:
    """Optimize a model, prove every variant against it on this host, and write a servable artifact.

    Blocks for seconds to minutes. The same task twice does nothing the second time.

    Args:
        task: What to optimize.
        observe: Called with the current stage and the share that is done, 0 to 1.

    Raises:
        OptimizerError: If the model, the data, the recipe or the evaluator cannot be used.
        SlipstreamError: If the original itself cannot be opened or fails on the samples.
    """
    if task.labels is not None and task.calibration is None:
        raise CalibrationError("labels were given without calibration; labels belong to samples")
    with tempfile.TemporaryDirectory() as folder:
        request = OptimizeRequest(
            model=Path(task.model),
            repository=Path(task.repository),
            name=task.name,
            calibration=_data(task.calibration, Path(folder)),
            labels=_labels(task.labels, Path(folder)),
            evaluator=task.evaluator,
            recipe=task.recipe,
            time_budget_s=task.time_budget_s,
            command="optimizers.optimize(...)",
        )
        artifact = pipeline.optimize(request, observe)
    return Result(artifact, read_report(artifact.folder))


def _data(given: Path | str | Mapping[str, Array] | None, folder: Path) -> Path | None:
    if given is None or isinstance(given, (Path, str)):
        return None if given is None else Path(given)
    return _saved(folder / "data.npz", given)


def _labels(given: Path | str | Array | None, folder: Path) -> Path | None:
    if given is None or isinstance(given, (Path, str)):
        return None if given is None else Path(given)
    return _saved(folder / "labels.npz", {LABELS_KEY: given})


def _saved(path: Path, arrays: Mapping[str, Array]) -> Path:
    try:
        np.savez(path, allow_pickle=False, **arrays)
    except ValueError as exc:
        raise CalibrationError(f"cannot save {', '.join(arrays)}: {exc}; give arrays of numbers, or of text") from exc
    return path
