"""Calibration samples: real inputs from ``DATA.npz``, checked against the model, and split into disjoint parts.

``DATA.npz`` holds one array per model input under the input's name; axis 0 counts the samples. An array with as many
axes as the input holds one row per sample (axis 0 of the input is the batch); an array with one axis more holds one
complete tensor per sample (a recurrent state, a scalar). ``LABELS.npz`` holds ``labels``: one integer per sample.

Memory holds a few megabytes of any number of samples: numbers are checked and cast piece by piece on their way into one
file per input, and each batch is read from there when it is asked for. Text is kept whole.
"""

import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import msgspec
import numpy as np

from optimizers.errors import CalibrationError
from server.tensors import NUMPY_DTYPE, Array, Signature, Tensors, TensorSpec

LEAST_SAMPLES = 16
"""Fewer samples prove nothing: with 16 equal decisions the share of unequal ones may still be 17 % (95 % interval)."""

LABELS_KEY = "labels"
_LEAST_CALIBRATION = 8
_SYNTHETIC_SIZE = 16
_PIECE_BYTES = 4 << 20


class StoredArray(msgspec.Struct, frozen=True):
    """An array in a ``.npy`` file of ours, C-contiguous; opened for each read, so that nothing stays in memory.

    Attributes:
        path: The file.
        shape: Axis 0 counts the samples.
        dtype: A numpy dtype, as a string.
        offset: Where the elements begin in the file, in bytes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, indices: Sequence[int] | Array) -> Array:
        """Return the samples with these indices, in this order, as a new array.

        Raises:
            CalibrationError: If the file is gone or was cut.
        """
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        rows = out.reshape(len(indices), math.prod(self.shape[1:])).view(np.uint8)
        try:
            with self.path.open("rb") as file:
                for row, index in zip(rows, indices, strict=True):
                    file.seek(self.offset + int(index) * row.nbytes)
                    if file.readinto(row.data) != row.nbytes:
                        raise CalibrationError(f"{self.path} was cut: sample {index} of {self.shape[0]} is missing")
        except OSError as exc:
            raise CalibrationError(f"cannot read {self.path}: {exc.strerror or exc}") from exc
        return out


class Samples(msgspec.Struct, frozen=True):
    """Inputs, and labels if there are any.

    Attributes:
        inputs: Name -> array in memory or in a file, axis 0 = samples, in the dtype that the model takes.
        count: Number of samples.
        batched: Whether several samples can share one run: all arrays hold rows, and axis 0 of all inputs is variable.
        whole: Names of the inputs whose samples are complete tensors.
        labels: INT64 ``[count]``, or ``None``.
        indices: Which samples of the arrays these are, INT64 ``[count]``; ``None`` means all, in their order.
    """

    inputs: Mapping[str, Array | StoredArray]
    count: int
    batched: bool
    whole: frozenset[str] = frozenset()
    labels: Array | None = None
    indices: Array | None = None

    def batch(self, start: int, rows: int) -> dict[str, Array]:
        """Return samples ``start`` to ``start + rows`` as the session takes them; views where possible.

        Args:
            start: First sample.
            rows: Number of samples; fewer are returned at the end of the data.

        Raises:
            ValueError: If more than one sample is wanted of inputs that cannot share a run, or if ``start`` is out of
                range.
            CalibrationError: If a file is gone or was cut.
        """
        if not 0 <= start < self.count or rows < 1:
            raise ValueError(f"samples {start} to {start + rows} asked of {self.count}")
        if rows > 1 and not self.batched:
            raise ValueError(f"{rows} samples asked at once; inputs of this model take one sample a run")
        stop = min(start + rows, self.count)
        read = {name: self._rows(array, start, stop) for name, array in self.inputs.items()}
        return {name: np.asarray(array[0]) if name in self.whole else array for name, array in read.items()}

    def batches(self, rows: int) -> "Batches":
        """Return all samples in batches of ``rows``, the last maybe smaller; one by one if they cannot share a run.

        Batches are read when they are asked for, and can be pickled for a child process.
        """
        rows = rows if self.batched else 1
        return Batches(self, range(0, self.count, rows), rows)

    def take(self, indices: Sequence[int] | Array) -> "Samples":
        """Return the samples with these indices, in this order; nothing is read or copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        return msgspec.structs.replace(
            self,
            count=len(chosen),
            labels=None if self.labels is None else self.labels[chosen],
            indices=chosen if self.indices is None else self.indices[chosen],
        )

    def _rows(self, array: Array | StoredArray, start: int, stop: int) -> Array:
        if isinstance(array, StoredArray):
            return array.read(np.arange(start, stop) if self.indices is None else self.indices[start:stop])
        return array[start:stop] if self.indices is None else array[self.indices[start:stop]]


@dataclass(frozen=True, slots=True)
class Batches(Sequence[Tensors]):
    """Batches of samples, each read when it is asked for.

    Attributes:
        samples: Where they come from.
        starts: The first sample of each batch.
        rows: Samples of a batch; the last one of all may have fewer.
    """

    samples: Samples
    starts: range
    rows: int

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Tensors: ...

    @overload
    def __getitem__(self, index: slice) -> "Batches": ...

    def __getitem__(self, index: int | slice) -> "Tensors | Batches":
        """Read one batch, or name some of them.

        Raises:
            IndexError: If there is no such batch.
            CalibrationError: If a file is gone or was cut.
        """
        if isinstance(index, slice):
            return Batches(self.samples, self.starts[index], self.rows)
        return self.samples.batch(self.starts[index], self.rows)


def read_samples(path: Path, signature: Signature, labels: Path | None = None, folder: Path | None = None) -> Samples:
    """Read ``DATA.npz`` and, when given, ``LABELS.npz``.

    Args:
        path: DATA.npz.
        signature: The model's signature.
        labels: LABELS.npz.
        folder: An existing folder for the samples, which must outlive them; ``None`` keeps them in memory.

    Raises:
        CalibrationError: If a file cannot be read, a key is missing or unknown, counts differ, a shape does not fit, a
            value cannot be represented in the model's dtype, or a value is NaN or infinite.
    """
    names = [spec.name for spec in signature.inputs]
    with _unpacked(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if set(members) != set(names):
            raise CalibrationError(
                f"{path} holds {sorted(members)}; the model takes {names}: one array per input, by name"
            )
        inputs = {
            spec.name: _fit(_Member(path, archive, members[spec.name]), spec, folder and folder / f"{index}.npy")
            for index, spec in enumerate(signature.inputs)
        }
    counts = {name: array.shape[0] for name, array in inputs.items()}
    count = min(counts.values())
    if count != max(counts.values()):
        raise CalibrationError(f"{path} holds different numbers of samples: {counts}; axis 0 must count the samples")
    if count == 0:
        raise CalibrationError(f"{path} holds no samples")
    whole = frozenset(spec.name for spec in signature.inputs if len(inputs[spec.name].shape) == len(spec.shape) + 1)
    batched = not whole and not any(isinstance(spec.shape[0], int) for spec in signature.inputs)
    return Samples(inputs, count, batched, whole, None if labels is None else _read_labels(labels, count))


def split(
    samples: Samples, calibration_n: int, search_n: int, holdout_n: int, seed: int
) -> tuple[Samples, Samples, Samples]:
    """Draw three disjoint parts: for calibration, for choosing among candidates, and one that neither has seen.

    With fewer samples than asked for, all shrink in proportion, within two limits: the held-out part keeps what was
    asked for or half of all samples, for it is the proof; calibration keeps 8 samples or a quarter of all, but one at
    least. The search part gives way first and may be empty. One sample alone is held out. The same seed draws the same
    samples.

    Args:
        samples: At least one.
        calibration_n: Samples wanted for calibration.
        search_n: Samples wanted for the search.
        holdout_n: Samples wanted for the proof.
        seed: Seed of the shuffle.

    Returns:
        Calibration, search and held-out samples.
    """
    order = np.random.default_rng(seed).permutation(samples.count)
    wanted, there = calibration_n + search_n + holdout_n, samples.count
    if there < wanted:
        spare = there - min(holdout_n, math.ceil(there / 2))
        least = min(calibration_n, _LEAST_CALIBRATION, max(1, there // 4))
        calibration_n = min(max(there * calibration_n // wanted, least), spare)
        search_n = min(there * search_n // wanted, spare - calibration_n)
        holdout_n = min(holdout_n, there - calibration_n - search_n)
    ends = np.cumsum([calibration_n, search_n, holdout_n])
    calibration, search, holdout, _ = np.split(order, ends)
    return samples.take(calibration), samples.take(search), samples.take(holdout)


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


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn what reading a broken archive may raise into one error."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise CalibrationError(f"cannot read {path}: {exc}; it must be made with numpy.savez, without objects") from exc


def _unpacked(path: Path) -> zipfile.ZipFile:
    with _refused(path):
        archive = zipfile.ZipFile(path)
    return archive  # noqa: RET504  (mypy takes a return inside for one that may not happen)


class _Member:
    """One array of an archive: its header, and its elements piece by piece."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self.path, self.archive, self.name = path, archive, name
        with _refused(path), archive.open(name) as file:
            self.shape, self.fortran, self.dtype = _header(file)
            if self.dtype.hasobject:
                raise ValueError(f"'{name}' holds Python objects")

    def whole(self) -> Array:
        """Return all of it at once."""
        with _refused(self.path), self.archive.open(self.name) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    def pieces(self, folder: Path | None) -> Iterator[Array]:
        """Yield arrays ``[samples, ...]`` of about 4 MB, in order; temporary files go to the folder."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        step = max(1, _PIECE_BYTES // max(1, row_bytes))
        starts = range(0, self.shape[0], step)
        if row_bytes == 0:
            yield self.whole()
        elif self.fortran:  # its samples lie scattered, so that it must be mapped as one file
            with _refused(self.path), tempfile.TemporaryDirectory(dir=folder) as place:
                draft = self.archive.extract(self.name, place)
                for start in starts:
                    yield np.array(np.load(draft, mmap_mode="r")[start : start + step], order="C")
        else:
            with _refused(self.path), self.archive.open(self.name) as file:
                _header(file)
                for start in starts:
                    rows = min(step, self.shape[0] - start)
                    yield np.frombuffer(file.read(rows * row_bytes), self.dtype).reshape(rows, *self.shape[1:])


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran and len(shape) > 1, dtype


def _fit(member: _Member, spec: TensorSpec, target: Path | None) -> Array | StoredArray:
    path, dtype = member.path, NUMPY_DTYPE[spec.datatype]
    _check_shape(path, spec, member.shape)
    if spec.datatype == "BYTES":
        return _as_text(path, spec, member.whole())
    if member.dtype.kind not in "biuf":
        raise CalibrationError(f"{path}: '{spec.name}' has dtype {member.dtype}; the model takes {spec.datatype}")
    pieces = (_cast(path, spec, piece) for piece in member.pieces(target and target.parent))
    if target is None:
        return np.ascontiguousarray(np.concatenate([np.empty((0, *member.shape[1:]), dtype), *pieces]))
    return _stored(target, member.shape, dtype, pieces)


def _cast(path: Path, spec: TensorSpec, piece: Array) -> Array:
    """Check one piece against its input, and cast it when no value changes."""
    dtype = NUMPY_DTYPE[spec.datatype]
    if piece.dtype.kind == "f" and not np.isfinite(piece).all():
        raise CalibrationError(f"{path}: '{spec.name}' holds NaN or infinite values; calibration needs finite samples")
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore", invalid="ignore"):
        cast = piece.astype(dtype)
    if not np.array_equal(cast, piece):
        raise CalibrationError(
            f"{path}: '{spec.name}' has dtype {piece.dtype}, whose values change as {spec.datatype} ({dtype}): "
            "save it in the model's dtype"
        )
    return cast


def _stored(target: Path, shape: tuple[int, ...], dtype: np.dtype[Any], pieces: Iterable[Array]) -> StoredArray:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).data)
    return StoredArray(target, shape, dtype.str, offset)


def _check_shape(path: Path, spec: TensorSpec, shape: tuple[int, ...]) -> None:
    takes_rows = bool(spec.shape) and (not isinstance(spec.shape[0], int) or spec.shape[0] == 1)
    wanted = spec.shape[1:] if takes_rows and len(shape) == len(spec.shape) else spec.shape
    fixed = [(size, seen) for size, seen in zip(wanted, shape[1:], strict=False) if isinstance(size, int)]
    if len(shape) == len(wanted) + 1 and all(size == seen for size, seen in fixed):
        return
    unit = "one row per sample" if takes_rows else "one complete tensor per sample"
    raise CalibrationError(
        f"{path}: '{spec.name}' has shape {list(shape)}; the model takes {spec.protocol_shape} (-1 = any size), "
        f"so save {unit}: {['samples', *(spec.protocol_shape[1:] if takes_rows else spec.protocol_shape)]}"
    )


def _as_text(path: Path, spec: TensorSpec, array: Array) -> Array:
    if array.dtype.kind == "S":
        return array.astype(np.object_)
    if array.dtype.kind == "U":
        return np.char.encode(array, "utf-8").astype(np.object_)
    raise CalibrationError(f"{path}: '{spec.name}' has dtype {array.dtype}; the model takes text (dtype S or U)")


def _read_labels(path: Path, count: int) -> Array:
    with _unpacked(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if LABELS_KEY not in members:
            raise CalibrationError(f"{path} holds {sorted(members)}; it must hold '{LABELS_KEY}'")
        labels = _Member(path, archive, members[LABELS_KEY]).whole()
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path}: '{LABELS_KEY}' has dtype {labels.dtype} and shape {list(labels.shape)}; "
            f"it must hold integers of shape [{count}], one per sample"
        )
    return labels.astype(np.int64)
