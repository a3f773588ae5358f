"""The user's own metric: ``--evaluator module:function``.

``function(outputs, labels)`` takes a dict of output name -> array (axis 0 = samples, not to be written to; positions
that a mask hides are zero) and the labels, INT64 ``[samples]``, or ``None``. It returns one finite number, higher is
better, and the same one for the same outputs. It is also called on resamples, for the interval of a difference.
"""

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from optimizers.errors import CalibrationError
from server.tensors import Array, Tensors

MOST_RESAMPLES = 1000
LEAST_RESAMPLES = 100
"""Fewer say too little about the outermost fortieth, where an interval of 95 % ends."""

_RESAMPLING_S = 0.5

Evaluate = Callable[[Tensors, Array | None], float]
"""Outputs and labels -> a metric, higher is better."""


def load_evaluator(name: str) -> Evaluate:
    """Import a function, from installed modules and from the current folder, which is searched first.

    Args:
        name: ``module:function``; the module may be dotted.

    Raises:
        CalibrationError: If the name is none of that form, the module cannot be imported, or it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise CalibrationError(f"--evaluator is {name!r}; it must be module:function, e.g. metrics:f1")
    try:
        with _current_folder_first():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:  # the user's code may raise anything, and a script may exit
        raise CalibrationError(
            f"--evaluator {name}: cannot import {module_name} from {Path.cwd()}: {_said(exc)}"
        ) from exc
    function = getattr(module, function_name, None)
    if function is None:
        raise CalibrationError(f"--evaluator {name}: {module_name} ({_file(module)}) has no '{function_name}'")
    if not callable(function):
        raise CalibrationError(f"--evaluator {name}: '{function_name}' is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def evaluated(evaluate: Evaluate, outputs: Tensors, labels: Array | None) -> float:
    """Call the user's function with arrays that it cannot write to.

    Raises:
        CalibrationError: If it raises, or returns anything but a finite number.
    """
    name = getattr(evaluate, "__qualname__", type(evaluate).__name__)
    try:
        value = evaluate({key: _read_only(array) for key, array in outputs.items()}, labels)
        if isinstance(value, str | bytes):
            raise TypeError(f"it returned {value!r}")
        number = float(value)
    except Exception as exc:
        raise CalibrationError(f"the evaluator {name} gave no number: {_said(exc)}") from exc
    if not math.isfinite(number):
        raise CalibrationError(f"the evaluator {name} returned {number}; it must return a finite number")
    return number


def difference_low(evaluate: Evaluate, reference: Tensors, candidate: Tensors, labels: Array | None) -> float | None:
    """Return the lower end of the 95 % interval of the candidate's metric minus the original's, by paired bootstrap.

    As many resamples are drawn as half a second allows, at most 1000; each is the same samples for both.

    Args:
        evaluate: The user's function.
        reference: Name -> the original's output, axis 0 = samples, at least one.
        candidate: The candidate's.
        labels: Integer class per sample.

    Returns:
        ``None`` when a resample gives no number (one class is missing, for instance), or when fewer than 100 resamples
        fit into the time.
    """
    samples = len(next(iter(reference.values())))
    rng, end_s = np.random.default_rng(0), time.monotonic() + _RESAMPLING_S
    differences: list[float] = []
    while len(differences) < MOST_RESAMPLES and time.monotonic() < end_s:
        drawn = rng.integers(0, samples, samples)
        expected = None if labels is None else labels[drawn]
        sides = ({name: array[drawn] for name, array in side.items()} for side in (reference, candidate))
        try:
            before, after = (evaluated(evaluate, side, expected) for side in sides)
        except CalibrationError:
            return None
        differences.append(after - before)
    return float(np.quantile(differences, 0.025)) if len(differences) >= LEAST_RESAMPLES else None


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Only while the module is imported: a file onnx.py beside it must not replace a library later on."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _said(exc: BaseException) -> str:
    first = (str(exc).strip().splitlines() or [""])[0]
    return f"{type(exc).__name__}: {first}" if first else type(exc).__name__


def _file(module: object) -> str:
    return str(getattr(module, "__file__", "built in"))
