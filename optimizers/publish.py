"""Writes an artifact: variants, golden samples, report, the manifest last; then renames the folder into place."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from optimizers.evidence import HeldOut, Runner, join
from optimizers.trial import Chosen
from server.artifact import GOLDEN, MANIFEST, Golden, Manifest, Variant, digest_of
from server.errors import ArtifactError
from server.golden import sqnr_db
from server.providers import Device
from server.session import Session

GOLDEN_SAMPLES = 8
GOLDEN_MARGIN_DB = 3.0
GOLDEN_CEILING_DB = 60.0


def golden_of(original: Runner, held_out: HeldOut, *, batchable: bool) -> Golden:
    """Take a few held-out samples with the original's outputs, as one request.

    A model that must not be batched gets one sample, as one request can carry no more.
    """
    if not batchable:
        return Golden(dict(held_out.singles[0]), dict(original.run(held_out.singles[0])))
    count = min(GOLDEN_SAMPLES, len(held_out.singles))
    outputs = {name: array[:count] for name, array in held_out.reference.items()}
    return Golden(join(held_out.singles[:count]), outputs)


def write_golden(folder: Path, golden: Golden) -> None:
    """Write ``golden.npz``. Text becomes fixed-width bytes, since the file must hold no pickles."""
    arrays = {f"input/{name}": array for name, array in golden.inputs.items()}
    arrays |= {f"output/{name}": array for name, array in golden.outputs.items()}
    plain = {key: array.astype(np.bytes_) if array.dtype.kind == "O" else array for key, array in arrays.items()}
    np.savez(folder / GOLDEN, allow_pickle=False, **plain)


def write_variants(folder: Path, chosen: Sequence[Chosen], golden: Golden, host: str) -> tuple[Variant, ...]:
    """Copy the chosen files in and bind each to what it reached on the golden samples on this host.

    Args:
        folder: The artifact's folder.
        chosen: In order of preference.
        golden: The golden request.
        host: Fingerprint of this host.

    Raises:
        ArtifactError: If a variant does not reproduce the golden outputs at all.
    """
    return tuple(_write_variant(folder, choice, golden, host) for choice in chosen)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; with it the folder is complete."""
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def move_into_place(folder: Path, target: Path) -> None:
    """Rename the finished folder, which lies on the same file system, to its place.

    Raises:
        ArtifactError: If the place was taken meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # temporary folders are private; a served one may be read by another user
    try:
        folder.rename(target)
    except OSError as exc:
        raise ArtifactError(f"cannot move the artifact to {target}: {exc}; choose another --version") from exc


def _write_variant(folder: Path, choice: Chosen, golden: Golden, host: str) -> Variant:
    place = folder / choice.name / "model.onnx"
    place.parent.mkdir()
    shutil.copyfile(choice.built.model, place)
    session = Session(place, Device(choice.built.provider), choice.options)
    try:
        reached = sqnr_db(golden.outputs, session.run(golden.inputs))
    finally:
        session.close()
    if reached <= 0:
        raise ArtifactError(
            f"variant {choice.name} reaches {reached:.1f} dB on its golden samples; nothing was written"
        )
    return Variant(
        name=choice.name,
        file=str(place.relative_to(folder)),
        sha256=digest_of(place),
        size_bytes=place.stat().st_size,
        precision=choice.built.precision,
        provider=choice.built.provider,
        options=choice.options,
        golden_min_sqnr_db=min(reached - GOLDEN_MARGIN_DB, GOLDEN_CEILING_DB),
        fidelity=choice.fidelity,
        latency=choice.latency,
        host=host,
    )
