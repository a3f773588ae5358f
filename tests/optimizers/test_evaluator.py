"""The user's metric: found in the current folder, called, and every way it can go wrong in one line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from optimizers import evaluator
from optimizers.errors import CalibrationError
from optimizers.evaluator import difference_low, evaluated, load_evaluator

OUTPUTS = {"y": np.eye(3, dtype=np.float32)}
LABELS = np.arange(3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_function_in_the_current_folder_is_loaded_and_called(folder: Path):
    (folder / "own_metrics.py").write_text(
        "def accuracy(outputs, labels):\n    return (outputs['y'].argmax(axis=1) == labels).mean()\n"
    )
    path = list(sys.path)
    evaluate = load_evaluator("own_metrics:accuracy")
    assert evaluated(evaluate, OUTPUTS, LABELS) == 1.0
    assert evaluated(evaluate, OUTPUTS, LABELS[::-1]) == pytest.approx(1 / 3)
    assert sys.path == path


def test_dotted_and_installed_modules_are_loaded(folder: Path):
    (folder / "package").mkdir()
    (folder / "package" / "metrics.py").write_text("def two(outputs, labels):\n    return 2\n")
    assert evaluated(load_evaluator("package.metrics:two"), OUTPUTS, None) == 2.0
    assert load_evaluator("math:fsum") is __import__("math").fsum


@pytest.mark.parametrize("name", ["metrics", "metrics:", ":f", ""])
def test_other_spellings_are_refused(name: str):
    with pytest.raises(CalibrationError, match="it must be module:function"):
        load_evaluator(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot import broken_metrics from .*: ModuleNotFoundError: No module named 'broken_metrics'"),
        ("import no_such_library", "cannot import .*: No module named 'no_such_library'"),
        ("def f(:", "cannot import .*: SyntaxError: "),
        ("import sys; sys.exit(3)", "cannot import .*: SystemExit: 3"),
        ("1 / 0", "cannot import .*: ZeroDivisionError: division by zero"),
        ("x = 1", r"broken_metrics \(.*broken_metrics.py\) has no 'f'"),
        ("f = 1", "'f' is a int, not a function"),
    ],
)
def test_module_that_cannot_be_used_is_refused_in_one_line(folder: Path, text: str | None, said: str):
    if text is not None:
        (folder / "broken_metrics.py").write_text(text)
    path = list(sys.path)
    with pytest.raises(CalibrationError, match=said) as caught:
        load_evaluator("broken_metrics:f")
    assert "\n" not in str(caught.value)
    assert sys.path == path


def returning(value: object):
    def metric(outputs, labels):
        return value

    return metric


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), 0.5])
def test_any_kind_of_number_will_do(value: object):
    assert evaluated(returning(value), OUTPUTS, LABELS) == 0.5


@pytest.mark.parametrize("value", [None, "0.5", b"1", 1j, np.ones(2), [0.5]])
def test_anything_but_a_number_is_refused(value: object):
    with pytest.raises(CalibrationError, match="metric gave no number: "):
        evaluated(returning(value), OUTPUTS, LABELS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_numbers_that_cannot_be_compared_are_refused(value: float):
    with pytest.raises(CalibrationError, match="it must return a finite number"):
        evaluated(returning(value), OUTPUTS, LABELS)


def test_what_it_raises_is_the_reason():
    def metric(outputs, labels):
        return outputs["z"]

    with pytest.raises(CalibrationError, match=r"metric gave no number: KeyError: 'z'"):
        evaluated(metric, OUTPUTS, LABELS)


def test_it_cannot_spoil_the_outputs():
    def metric(outputs, labels):
        outputs["y"] *= 0
        return 1.0

    outputs = {"y": np.eye(3, dtype=np.float32)}
    with pytest.raises(CalibrationError, match="read-only"):
        evaluated(metric, outputs, LABELS)
    assert np.array_equal(outputs["y"], OUTPUTS["y"])
    assert outputs["y"].flags.writeable


def accuracy(outputs, labels):
    return np.mean(outputs["y"].argmax(axis=1) == labels)


def answers(count: int, wrong: int) -> dict[str, np.ndarray]:
    """Answers to ``count`` samples of class 0, the first ones wrong."""
    classes = np.repeat([1, 0], [wrong, count - wrong])
    return {"y": np.eye(2, dtype=np.float32)[classes]}


def test_difference_is_resampled_in_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluator, "_RESAMPLING_S", 60.0)
    labels = np.zeros(400, np.int64)
    # 200 samples that both get wrong are no noise: the spread is that of the 40 on which they differ.
    low = difference_low(accuracy, answers(400, 200), answers(400, 240), labels)
    assert low == pytest.approx(-0.1 - 1.96 * np.sqrt(0.1 * 0.9 / 400), abs=0.005)
    assert difference_low(accuracy, answers(400, 200), answers(400, 200), labels) == 0.0
    assert difference_low(accuracy, answers(400, 240), answers(400, 200), labels) > 0.05


def test_metric_that_some_resamples_do_not_allow_has_no_interval():
    def needs_all(outputs, labels):
        return 1.0 if len(np.unique(labels)) == 3 else float("nan")

    assert difference_low(needs_all, OUTPUTS, OUTPUTS, LABELS) is None


def test_metric_that_takes_too_long_has_no_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluator, "_RESAMPLING_S", 0.0)
    assert difference_low(accuracy, answers(9, 1), answers(9, 2), np.zeros(9, np.int64)) is None
