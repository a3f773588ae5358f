"""Sessions: an opened variant that turns arrays into arrays.

The optimizer measures and the server serves with this same class, so the numbers in a report are those of serving.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from server.artifact import LatencyTable, SessionOptions
from server.bound import bind
from server.errors import InferenceFailed, SignatureMismatch, UnsupportedModel
from server.faults import fault_of
from server.providers import Device, open_ort_session, ort_errors, placement_of
from server.tensors import NUMPY_DTYPE, Array, Signature, Tensors, spec_of_ort

logger = logging.getLogger(__name__)

MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
_MOST_RUNS = 50


class Opened(Protocol):
    """A model that is opened: a ``Session``, or what takes its place."""

    signature: Signature
    device: Device
    providers: tuple[str, ...]

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run the model, see ``Session.run``."""
        ...

    def close(self) -> None:
        """Release the model, see ``Session.close``."""
        ...


class Session:
    """One model file, opened on one device.

    ``run`` may be called from several threads at once: a session with one thread then scales with the callers, since
    onnxruntime computes in the calling thread and holds no lock.

    Args:
        path: An ONNX file.
        device: Where it must run; anything else is an error, never a fallback.
        options: How to open it.

    Raises:
        ArtifactError: If the file is not a readable model.
        UnsupportedModel: If the model, or the type of one of its tensors, cannot be served.
        ProviderUnavailable: If the device's execution provider is not really active.
    """

    signature: Signature
    device: Device
    providers: tuple[str, ...]

    def __init__(self, path: Path, device: Device, options: SessionOptions) -> None:
        if path.suffix == ".plan":
            raise UnsupportedModel(f"{path} is a bare TensorRT engine; onnxruntime opens ONNX files")
        session = open_ort_session(path, device, options)
        self._path = path
        self.device = device
        self.providers = tuple(session.get_providers())
        self.signature = Signature(
            tuple(spec_of_ort(node.name, node.type, node.shape) for node in session.get_inputs()),
            tuple(spec_of_ort(node.name, node.type, node.shape) for node in session.get_outputs()),
        )
        self._session: Any = bind(session, self.signature, device, options.config)
        self._output_names = [spec.name for spec in self.signature.outputs]
        self._text_inputs = [spec.name for spec in self.signature.inputs if spec.datatype == "BYTES"]
        self._errors = ort_errors()
        logger.info("opened %s on %s, active providers %s", path, device.name, ", ".join(self.providers))

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run the model; thread-safe, releases the GIL.

        Args:
            inputs: Name -> array as the signature declares; not written to and not kept.
            outputs: Names of the wanted outputs; empty means all.

        Returns:
            Name -> array in the order asked for. The arrays own their memory.

        Raises:
            InferenceFailed: If onnxruntime raises, if text is not UTF-8, or if the session is closed; ``OutOfMemory``
                or ``DeviceLost`` where the cause is known.
        """
        session = self._session
        if session is None:
            raise InferenceFailed(f"{self._path} is closed")
        names = list(outputs) or self._output_names
        try:
            arrays = session.run(names, self._with_text(inputs) if self._text_inputs else inputs)
        except self._errors as exc:
            raise fault_of(exc)(f"{self._path} on {self.device.name}: {exc}") from exc
        return {
            name: _encoded(array) if array.dtype.kind == "O" else array
            for name, array in zip(names, arrays, strict=True)
        }

    def placement(self) -> dict[str, dict[str, int]]:
        """Return execution provider -> operator -> count of its nodes, see ``providers.placement_of``."""
        return placement_of(self._session)

    def close(self) -> None:
        """Release the model once the runs in progress have ended; later runs fail."""
        self._session = None

    def _with_text(self, inputs: Tensors) -> Tensors:
        # onnxruntime takes str; from bytes it would quietly make their repr, "b'text'".
        return {**inputs, **{name: _decoded(inputs[name]) for name in self._text_inputs if name in inputs}}


def check_text(inputs: Tensors) -> None:
    """Check that every ``BYTES`` element is UTF-8, which is all that onnxruntime's string tensors can carry.

    Raises:
        SignatureMismatch: If one is not.
    """
    for name, array in inputs.items():
        if array.dtype.kind == "O":
            try:
                _decoded(array)
            except UnicodeDecodeError as exc:
                raise SignatureMismatch(f"input '{name}' must hold UTF-8 text: {exc}") from exc


def synthetic_inputs(signature: Signature, rows: int, open_size: int = 1) -> dict[str, Array]:
    """Make inputs of ones that fit: a variable axis 0 has ``rows``, other variable axes have size ``open_size``."""
    made: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = [
            size if isinstance(size, int) else (open_size if axis else rows) for axis, size in enumerate(spec.shape)
        ]
        made[spec.name] = np.full(shape, b"1" if spec.datatype == "BYTES" else 1, NUMPY_DTYPE[spec.datatype])
    return made


def measure_latency(
    session: Opened,
    sizes: Sequence[int] = MEASURED_ROWS,
    budget_s: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    inputs: Callable[[int], Tensors] | None = None,
) -> LatencyTable:
    """Measure a short latency table.

    Sizes that would not fit into the rest of the budget are left out; the first one is always measured.

    Args:
        session: What to run.
        sizes: Batch sizes in rows, ascending.
        budget_s: Seconds that all of it may take, roughly.
        clock: Seconds from any origin.
        inputs: Makes a batch of so many rows; synthetic inputs by default.

    Raises:
        InferenceFailed: If a run fails.
    """
    make = inputs or partial(synthetic_inputs, session.signature)
    end_s = clock() + budget_s
    measured: dict[int, list[float]] = {}
    for size in sizes:
        if measured:
            last, times = next(reversed(measured.items()))
            if clock() + 4 * times[len(times) // 2] * size / last > end_s:
                break
        batch = make(size)
        session.run(batch)
        until_s = min(clock() + budget_s / len(sizes), end_s)
        times = []
        while not times or (len(times) < _MOST_RUNS and clock() < until_s):
            start_s = clock()
            session.run(batch)
            times.append(clock() - start_s)
        measured[size] = sorted(times)
    return _table(measured)


def _table(measured: dict[int, list[float]]) -> LatencyTable:
    columns: dict[str, list[float]] = {"p50": [], "p99": [], "low": [], "high": []}
    for times in measured.values():
        count = len(times)
        # The 95 % interval of a median lies between two order statistics (binomial, normal approximation).
        rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
        columns["p50"].append(float(np.median(times)) * 1e3)
        columns["p99"].append(float(np.percentile(times, 99)) * 1e3)
        columns["low"].append(times[rank] * 1e3)
        columns["high"].append(times[count - 1 - rank] * 1e3)
    p50, p99, low, high = (tuple(column) for column in columns.values())
    return LatencyTable(tuple(measured), p50, p99, low, high)


def _decoded(array: Array) -> Array:
    return np.array([element.decode() for element in array.flat], np.object_).reshape(array.shape)


def _encoded(array: Array) -> Array:
    return np.array([element.encode() for element in array.flat], np.object_).reshape(array.shape)
