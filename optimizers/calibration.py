"""Calibration samples: real inputs from ``DATA.npz``, checked against the model, and split into two disjoint parts.

``DATA.npz`` holds one array per model input under the input's name; axis 0 counts the samples. An array with as many
axes as the input holds one row per sample (axis 0 of the input is the batch); an array with one axis more holds one
complete tensor per sample (a recurrent state, a scalar). ``LABELS.npz`` holds ``labels``: one integer per sample.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from optimizers.errors import CalibrationError
from server.tensors import NUMPY_DTYPE, Array, Signature, TensorSpec

LEAST_SAMPLES = 16
"""Fewer samples prove nothing: with 16 equal decisions the share of unequal ones may still be 17 % (95 % interval)."""

LABELS_KEY = "labels"
_LEAST_CALIBRATION = 8
_SYNTHETIC_SIZE = 16


class Samples(msgspec.Struct, frozen=True):
    """Inputs, and labels if there are any.

    Attributes:
        inputs: Name -> array, axis 0 = samples, in the dtype that the model takes.
        count: Number of samples.
        batched: Whether several samples can share one run: all arrays hold rows, and axis 0 of all inputs is variable.
        whole: Names of the inputs whose samples are complete tensors.
        labels: INT64 ``[count]``, or ``None``.
    """

    inputs: Mapping[str, Array]
    count: int
    batched: bool
    whole: frozenset[str] = frozenset()
    labels: Array | None = None

    def batch(self, start: int, rows: int) -> dict[str, Array]:
        """Return samples ``start`` to ``start + rows`` as the session takes them; views where possible.

        Args:
            start: First sample.
            rows: Number of samples; fewer are returned at the end of the data.

        Raises:
            ValueError: If more than one sample is wanted of inputs that cannot share a run, or if ``start`` is out of
                range.
        """
        if not 0 <= start < self.count or rows < 1:
            raise ValueError(f"samples {start} to {start + rows} asked of {self.count}")
        if rows > 1 and not self.batched:
            raise ValueError(f"{rows} samples asked at once; inputs of this model take one sample a run")
        return {
            name: np.asarray(array[start]) if name in self.whole else array[start : start + rows]
            for name, array in self.inputs.items()
        }

    def batches(self, rows: int) -> list[dict[str, Array]]:
        """Return all samples in batches of ``rows``, the last maybe smaller; one by one if they cannot share a run."""
        step = rows if self.batched else 1
        return [self.batch(start, step) for start in range(0, self.count, step)]

    def take(self, indices: Sequence[int] | Array) -> "Samples":
        """Return the samples with these indices, copied, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return msgspec.structs.replace(
            self,
            inputs={name: array[chosen] for name, array in self.inputs.items()},
            count=len(chosen),
            labels=None if self.labels is None else self.labels[chosen],
        )


def read_samples(path: Path, signature: Signature, labels: Path | None = None) -> Samples:
    """Read ``DATA.npz`` and, when given, ``LABELS.npz``.

    Args:
        path: DATA.npz.
        signature: The model's signature.
        labels: LABELS.npz.

    Raises:
        CalibrationError: If a file cannot be read, a key is missing or unknown, counts differ, a shape does not fit, a
            value cannot be represented in the model's dtype, or a value is NaN or infinite.
    """
    arrays = _read_npz(path)
    names = [spec.name for spec in signature.inputs]
    if set(arrays) != set(names):
        raise CalibrationError(f"{path} holds {sorted(arrays)}; the model takes {names}: one array per input, by name")
    inputs = {spec.name: _fit(path, spec, arrays[spec.name]) for spec in signature.inputs}
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1:
        raise CalibrationError(f"{path} holds different numbers of samples: {counts}; axis 0 must count the samples")
    count = next(iter(counts.values()))
    if count == 0:
        raise CalibrationError(f"{path} holds no samples")
    whole = frozenset(spec.name for spec in signature.inputs if inputs[spec.name].ndim == len(spec.shape) + 1)
    batched = not whole and not any(isinstance(spec.shape[0], int) for spec in signature.inputs)
    return Samples(inputs, count, batched, whole, None if labels is None else _read_labels(labels, count))


def split(samples: Samples, calibration_n: int, holdout_n: int, seed: int) -> tuple[Samples, Samples]:
    """Draw two disjoint parts: one for calibration, one that no pass sees.

    With fewer samples than asked for, both shrink in proportion, calibration to no less than 8 or half of the samples.
    The same seed draws the same samples.

    Args:
        samples: At least one.
        calibration_n: Samples wanted for calibration.
        holdout_n: Samples wanted for the comparison.
        seed: Seed of the shuffle.

    Returns:
        Calibration samples (none when there is only one sample) and held-out samples.
    """
    order = np.random.default_rng(seed).permutation(samples.count)
    wanted = calibration_n + holdout_n
    if samples.count < wanted:
        share = samples.count * calibration_n // wanted
        calibration_n = max(share, min(_LEAST_CALIBRATION, samples.count // 2, calibration_n))
        holdout_n = min(holdout_n, samples.count - calibration_n)
    return samples.take(order[:calibration_n]), samples.take(order[calibration_n : calibration_n + holdout_n])


def synthetic_samples(signature: Signature, count: int, seed: int) -> Samples:
    """Make up inputs, with which exact passes can be checked when no data was given; they prove no lossy one.

    Floats are normal, integers 0 or 1 (valid as an index, a mask or a flag) with at least one 1 along the last axis.
    Variable axes have 16 elements.
    """
    rng = np.random.default_rng(seed)
    whole = frozenset(spec.name for spec in signature.inputs if not spec.shape or isinstance(spec.shape[0], int))
    inputs = {spec.name: _synthetic(spec, count, spec.name in whole, rng) for spec in signature.inputs}
    return Samples(inputs, count, batched=not whole, whole=whole)


def why_no_proof(samples: Samples | None) -> str:
    """Return why lossy precisions cannot be proven with these samples, or nothing when they can."""
    if samples is None:
        return "no proof possible: no samples; give --calibration DATA.npz"
    if samples.count < LEAST_SAMPLES:
        return f"no proof possible: {samples.count} samples, at least {LEAST_SAMPLES} are needed"
    return ""


def _synthetic(spec: TensorSpec, count: int, whole: bool, rng: np.random.Generator) -> Array:
    sizes = spec.shape if whole else spec.shape[1:]
    shape = (count, *(size if isinstance(size, int) else _SYNTHETIC_SIZE for size in sizes))
    dtype = NUMPY_DTYPE[spec.datatype]
    if spec.datatype == "BYTES":
        return np.full(shape, b"text", dtype=np.object_)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    values = rng.integers(0, 2, shape)
    values[..., 0] = 1
    return values.astype(dtype)


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise CalibrationError(f"cannot read {path}: {exc}; it must be made with numpy.savez, without objects") from exc


def _fit(path: Path, spec: TensorSpec, array: Array) -> Array:
    """Check one array against its input and cast it when no value changes."""
    _check_shape(path, spec, array)
    if spec.datatype == "BYTES":
        return _as_text(path, spec, array)
    dtype = NUMPY_DTYPE[spec.datatype]
    if array.dtype.kind not in "biuf":
        raise CalibrationError(f"{path}: '{spec.name}' has dtype {array.dtype}; the model takes {spec.datatype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(f"{path}: '{spec.name}' holds NaN or infinite values; calibration needs finite samples")
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if not np.array_equal(cast, array):
        raise CalibrationError(
            f"{path}: '{spec.name}' has dtype {array.dtype}, whose values change as {spec.datatype} ({dtype}): "
            "save it in the model's dtype"
        )
    return cast


def _check_shape(path: Path, spec: TensorSpec, array: Array) -> None:
    rank = len(spec.shape)
    takes_rows = rank > 0 and (not isinstance(spec.shape[0], int) or spec.shape[0] == 1)
    if array.ndim == rank and takes_rows:
        wanted = spec.shape[1:]
    elif array.ndim == rank + 1:
        wanted = spec.shape
    else:
        raise _misfit(path, spec, array, takes_rows)
    if any(isinstance(size, int) and size != seen for size, seen in zip(wanted, array.shape[1:], strict=True)):
        raise _misfit(path, spec, array, takes_rows)


def _misfit(path: Path, spec: TensorSpec, array: Array, takes_rows: bool) -> CalibrationError:
    unit = "one row per sample" if takes_rows else "one complete tensor per sample"
    return CalibrationError(
        f"{path}: '{spec.name}' has shape {list(array.shape)}; the model takes {spec.protocol_shape} (-1 = any size), "
        f"so save {unit}: {['samples', *(spec.protocol_shape[1:] if takes_rows else spec.protocol_shape)]}"
    )


def _as_text(path: Path, spec: TensorSpec, array: Array) -> Array:
    if array.dtype.kind == "S":
        return array.astype(np.object_)
    if array.dtype.kind == "U":
        return np.char.encode(array, "utf-8").astype(np.object_)
    raise CalibrationError(f"{path}: '{spec.name}' has dtype {array.dtype}; the model takes text (dtype S or U)")


def _read_labels(path: Path, count: int) -> Array:
    arrays = _read_npz(path)
    if LABELS_KEY not in arrays:
        raise CalibrationError(f"{path} holds {sorted(arrays)}; it must hold '{LABELS_KEY}'")
    labels = arrays[LABELS_KEY]
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path}: '{LABELS_KEY}' has dtype {labels.dtype} and shape {list(labels.shape)}; "
            f"it must hold integers of shape [{count}], one per sample"
        )
    return labels.astype(np.int64)
