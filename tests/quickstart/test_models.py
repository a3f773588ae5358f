"""The cache of prepared models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.quickstart import encoder, minilm
from deploy.quickstart.models import MODELS, QuickstartModel, ensure, optimize_arguments
from deploy.quickstart.packages import Package, QuickstartError

MODEL = QuickstartModel(
    "m", "a model", (Package("carrier", "1", "0" * 64, 3),), lambda folder, scratch: None, (minilm,)
)


def counting(calls: list[int]) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, scratch: Path) -> None:
        calls.append(1)
        (scratch / "left-over").write_text("x")
        (folder / "model.onnx").write_text(f"made {len(calls)}")

    return prepare


def test_second_time_nothing_is_made(tmp_path: Path) -> None:
    calls: list[int] = []
    said: list[str] = []
    model = dataclasses.replace(MODEL, prepare=counting(calls))
    folder = ensure(model, tmp_path / "cache", said.append)
    assert ensure(model, tmp_path / "cache", said.append) == folder == tmp_path / "cache" / "m"
    assert len(calls) == 1
    assert "carrier==1 (3 MB)" in said[0]
    assert "cached" in said[-1]
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_change_of_code_makes_the_files_again(tmp_path: Path) -> None:
    calls: list[int] = []
    model = dataclasses.replace(MODEL, prepare=counting(calls))
    ensure(model, tmp_path, lambda _: None)
    folder = ensure(dataclasses.replace(model, sources=(encoder,)), tmp_path, lambda _: None)
    assert (folder / "model.onnx").read_text() == "made 2"


def test_failure_leaves_no_folder_behind(tmp_path: Path) -> None:
    def fail(folder: Path, scratch: Path) -> None:
        (folder / "model.onnx").write_text("half")
        raise QuickstartError("no network")

    with pytest.raises(QuickstartError, match="no network"):
        ensure(dataclasses.replace(MODEL, prepare=fail), tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_labels_and_budget_are_passed_when_there_are_any(tmp_path: Path) -> None:
    assert optimize_arguments(MODEL, tmp_path, Path("models")) == [
        *("optimize", str(tmp_path / "model.onnx"), "--repository", "models", "--name", "m"),
        *("--calibration", str(tmp_path / "data.npz")),
        *MODEL.effort,
    ]
    (tmp_path / "labels.npz").touch()
    model = dataclasses.replace(MODEL, budget=("--x", "1"), effort=())
    arguments = optimize_arguments(model, tmp_path, Path("models"))
    assert arguments[-4:] == ["--labels", str(tmp_path / "labels.npz"), "--x", "1"]


def test_every_package_is_pinned_by_digest() -> None:
    for package in (package for model in MODELS for package in model.packages):
        assert len(package.sha256) == 64
        assert package.version in package.requirement
