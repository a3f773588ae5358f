"""Latency of a model on a device, by precision, by batch size, and by the way in which it is called."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from benchmarks.gpu.floor import Ceilings, Work, bound_run, median_s
from benchmarks.gpu.subjects import Subject
from server.artifact import Artifact, SessionOptions
from server.errors import StartupError
from server.providers import GRAPH_ROWS, Device, open_ort_session, ort_errors
from server.session import Session
from server.tensors import Array

ROWS = (1, 8, 32)


class Timing(msgspec.Struct, frozen=True):
    """One cell of the table.

    Attributes:
        precision: ``fp32``, ``tf32`` or ``fp16``.
        way: ``run`` (arrays in, arrays out), ``bound`` (tensors stay in the device's memory), ``graph`` (bound, and
            replayed as a CUDA graph), ``served`` (the session that the server uses) or ``served-graph`` (the same with
            CUDA graphs).
        rows: Batch size.
        ms: Median.
        floor_ms: The least that the device's ceilings allow.
        failure: Why it could not be measured; empty when it was.
    """

    precision: str
    way: str
    rows: int
    ms: float = 0.0
    floor_ms: float = 0.0
    failure: str = ""


def measure(
    subject: Subject, artifact: Artifact, device: Device, work: Work, ceilings: Ceilings, seconds: float
) -> Iterator[Timing]:
    """Measure every precision that the artifact holds for the device.

    Args:
        subject: What its requests are.
        artifact: The optimized model.
        device: Where.
        work: Of one row.
        ceilings: Of the device.
        seconds: For each cell.
    """
    of_kind = [variant for variant in artifact.variants if variant.provider == device.kind and not variant.stages]
    for precision in ("fp32", "tf32", "fp16"):
        variant = next((v for v in of_kind if v.precision == ("fp16" if precision == "fp16" else "fp32")), None)
        if variant is None or (precision == "tf32" and device.kind == "cpu"):
            continue
        options = msgspec.structs.replace(
            variant.options, provider_options={"use_tf32": "1"} if precision == "tf32" else {}
        )
        model = artifact.folder / variant.file
        for rows in ROWS:
            batch = subject.batch(rows)
            floor_ms = ceilings.floor_s(work, rows, precision) * 1e3
            for way, opener in _WAYS.items():
                if way.endswith("graph") and device.kind == "cpu":
                    continue
                try:
                    seen_ms = median_s(opener(model, device, options, batch), seconds) * 1e3
                except (StartupError, *ort_errors()) as exc:
                    yield Timing(precision, way, rows, failure=str(exc).splitlines()[0])
                else:
                    yield Timing(precision, way, rows, seen_ms, floor_ms)


def _run(model: Path, device: Device, options: SessionOptions, batch: dict[str, Array]) -> Callable[[], object]:
    session = open_ort_session(model, device, options)
    return lambda: session.run(None, batch)


def _bound(model: Path, device: Device, options: SessionOptions, batch: dict[str, Array]) -> Callable[[], object]:
    return bound_run(open_ort_session(model, device, options), device, batch)


def _graph(model: Path, device: Device, options: SessionOptions, batch: dict[str, Array]) -> Callable[[], object]:
    captured = {**options.provider_options, "enable_cuda_graph": "1"}
    return _bound(model, device, msgspec.structs.replace(options, provider_options=captured), batch)


def _served(model: Path, device: Device, options: SessionOptions, batch: dict[str, Array]) -> Callable[[], object]:
    session = Session(model, device, options)
    return lambda: session.run(batch)


def _served_graph(
    model: Path, device: Device, options: SessionOptions, batch: dict[str, Array]
) -> Callable[[], object]:
    sizes = {**options.config, GRAPH_ROWS: str(len(next(iter(batch.values()))))}
    return _served(model, device, msgspec.structs.replace(options, config=sizes), batch)


_WAYS = {"run": _run, "bound": _bound, "graph": _graph, "served": _served, "served-graph": _served_graph}
