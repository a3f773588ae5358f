"""Model parallelism: a variant cut into pipeline stages for several devices, chosen by measurement and proven."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import onnx

from optimizers.cutting import Cut, Cutter, choose
from optimizers.errors import ModelError
from optimizers.graph import load_model, save_model, weight_bytes
from optimizers.records import EngineRecord
from server.artifact import Golden, SessionOptions, Variant, digest_of
from server.errors import ArtifactError, SlipstreamError
from server.golden import require_golden, sqnr_db
from server.providers import Device, Kind
from server.session import Session, measure_latency
from server.staged import open_variant
from server.tensors import Signature, Tensors

LEAST_DB = 60.0
"""What the stages must reach against the uncut variant: the same arithmetic, summed in another order at most."""

_CUT_S, _TABLE_S = 0.15, 3.0


class Staging(msgspec.Struct, frozen=True):
    """How to cut.

    Attributes:
        stages: How many.
        signature: Of the model.
        golden: The golden request.
        batchable: Whether axis 0 of its arrays counts rows.
        sizes: Batch sizes to measure, ascending.
        cores: Of this host, which the stages share while no device of their own is at hand.
        limit_bytes: Weights that a device holds; 0 sets no limit.
    """

    stages: int
    signature: Signature
    golden: Golden
    batchable: bool
    sizes: tuple[int, ...]
    cores: int
    limit_bytes: int = 0

    def batch(self, rows: int) -> Tensors:
        """Return a batch of so many rows made of the golden inputs; these as they are for a model without batches."""
        if not self.batchable:
            return self.golden.inputs
        return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in self.golden.inputs.items()}

    @property
    def options(self) -> SessionOptions:
        """Of each stage on a host where they share the cores."""
        return SessionOptions(intra_op_threads=max(1, self.cores // self.stages), spinning=False)


def add_stages(folder: Path, variants: Sequence[Variant], staging: Staging) -> tuple[tuple[Variant, ...], EngineRecord]:
    """Cut the first variant that is not bound to this host, and put the stages in front of all variants.

    Args:
        folder: Of the artifact, with the files of the variants.
        variants: In order of preference.
        staging: How to cut.

    Returns:
        The variants, the staged one first where it can be had, and what the report says of it.
    """
    source = next(variant for variant in variants if not variant.host_bound and not variant.from_rows)
    name = f"{source.name}-{staging.stages}-stages"
    try:
        made, facts = _cut(folder, source, name, staging)
    except (ModelError, SlipstreamError) as exc:
        shutil.rmtree(folder / name, ignore_errors=True)
        return tuple(variants), EngineRecord(f"{name}: refused", str(exc))
    return (made, *variants), EngineRecord(f"{name}: built", "served first, as asked for", facts)


def _cut(folder: Path, source: Variant, name: str, staging: Staging) -> tuple[Variant, dict[str, str]]:
    model = load_model(folder / source.file)
    cutter = Cutter(model)
    cuts = cutter.cuts()
    if len(cuts) < staging.stages - 1:
        raise ModelError(f"the model can be cut in {len(cuts)} places, {staging.stages} stages need more")
    rows, device = staging.sizes[-1], Device(cast(Kind, source.provider))
    with tempfile.TemporaryDirectory(prefix=".cut-", dir=folder) as scratch:
        seconds = [_seconds(Path(scratch), cutter.first(cut), device, staging, rows) for cut in cuts]
        seconds.append(_seconds(Path(scratch), model, device, staging, rows))
    weights = [*(cut.weight_bytes for cut in cuts), weight_bytes(model)]
    chosen = choose(seconds, weights, staging.stages, staging.limit_bytes)
    if chosen is None:
        limit = staging.limit_bytes
        raise ModelError(
            f"no choice of cuts leaves at most {limit} bytes of weights to each of {staging.stages} stages"
        )
    picked = [cuts[index] for index in chosen]
    files = []
    for number, stage in enumerate(cutter.stages(picked)):
        files.append(folder / name / f"stage-{number + 1}.onnx")
        save_model(stage, files[-1])
    return _proven(folder, source, name, files, staging), _facts(picked, seconds, chosen, files, rows)


def _proven(folder: Path, source: Variant, name: str, files: Sequence[Path], staging: Staging) -> Variant:
    """Open the stages, compare them with the uncut variant and with the golden outputs, and measure them."""
    first, *others = files
    device = Device(cast(Kind, source.provider))
    outside = sorted(set(first.parent.iterdir()) - set(files))  # weights of stages beyond 2 GB
    made = msgspec.structs.replace(
        source,
        name=name,
        file=str(first.relative_to(folder)),
        sha256=digest_of(first),
        size_bytes=sum(file.stat().st_size for file in (*files, *outside)),
        options=msgspec.structs.replace(staging.options, config=source.options.config),
        from_rows=0,
        weights={file.name: digest_of(file) for file in outside},
        stages={str(file.relative_to(folder)): digest_of(file) for file in others},
    )
    with ExitStack() as stack:
        whole = Session(folder / source.file, device, source.options)
        stack.callback(whole.close)
        staged = open_variant(folder, made, [device], made.options, staging.signature)
        stack.callback(staged.close)
        require_golden(staged, made, staging.golden)
        seen = sqnr_db(whole.run(staging.golden.inputs), staged.run(staging.golden.inputs))
        if seen < LEAST_DB:
            raise ArtifactError(f"the stages differ from {source.name} by {seen:.1f} dB; {LEAST_DB:g} dB are required")
        latency = measure_latency(staged, staging.sizes, _TABLE_S, inputs=staging.batch)
    return msgspec.structs.replace(made, latency=latency)


def _seconds(scratch: Path, part: onnx.ModelProto, device: Device, staging: Staging, rows: int) -> float:
    file = scratch / "part.onnx"
    save_model(part, file)
    session = Session(file, device, staging.options)
    try:
        names = {spec.name for spec in session.signature.inputs}
        batch = {name: array for name, array in staging.batch(rows).items() if name in names}
        return measure_latency(session, (rows,), _CUT_S, inputs=lambda _: batch).p50_ms[0] / 1e3
    finally:
        session.close()


def _facts(
    cuts: Sequence[Cut], seconds: Sequence[float], chosen: Sequence[int], files: Sequence[Path], rows: int
) -> dict[str, str]:
    ends = [0.0, *(seconds[index] for index in chosen), seconds[-1]]
    times = ", ".join(f"{max(0.0, stop - start) * 1e3:.2f}" for start, stop in pairwise(ends))
    return {
        "stages": f"{len(files)}, of {', '.join(f'{file.stat().st_size / 1e6:.1f}' for file in files)} MB",
        f"ms of {rows} rows": times,
        "crossing per row": ", ".join(f"{cut.crossing_bytes} bytes ({', '.join(cut.crossing)})" for cut in cuts),
    }
