"""Artifacts written by tests: a valid manifest and a golden file around real ONNX models."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime

from server import artifact
from server.artifact import Batching, LatencyTable, Manifest, Source, Variant
from server.tensors import NUMPY_DTYPE, Array, Signature, TensorSpec, spec_of_ort


def write_artifact(
    repository: Path,
    name: str,
    version: str,
    variants: Mapping[str, Path],
    *,
    latency: Mapping[str, LatencyTable] | None = None,
    batchable: bool = True,
    min_sqnr_db: float = 20.0,
    golden_rows: int = 4,
    **fields: Any,
) -> Path:
    """Write ``<repository>/<name>/<version>/`` and return that folder.

    Args:
        variants: Variant name -> ONNX file, copied; in order of preference. The first one also counts as the original.
        latency: Variant name -> latency table.
        fields: Other fields for every ``Variant``, e.g. ``provider="cuda"`` or ``options=SessionOptions(...)``.
    """
    folder = repository / name / version
    original = next(iter(variants.values()))
    signature = signature_of(original)
    write_golden(folder, original, signature, golden_rows)
    entries = []
    for variant, source in variants.items():
        file = folder / variant / "model.onnx"
        file.parent.mkdir(parents=True)
        shutil.copyfile(source, file)
        entry = Variant(
            name=variant,
            file=f"{variant}/model.onnx",
            sha256=artifact.digest_of(file),
            size_bytes=file.stat().st_size,
            precision="fp32",
            provider="cpu",
            golden_min_sqnr_db=min_sqnr_db,
            latency=(latency or {}).get(variant),
        )
        entries.append(msgspec.structs.replace(entry, **fields))
    manifest = Manifest(
        format=artifact.FORMAT,
        name=name,
        version=version,
        signature=signature,
        batching=Batching(batchable, "set by the test"),
        source=Source(original.name, artifact.digest_of(original), original.stat().st_size),
        variants=tuple(entries),
        golden_sha256=artifact.digest_of(folder / artifact.GOLDEN),
    )
    (folder / artifact.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Replace fields of a written manifest."""
    path = folder / artifact.MANIFEST
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, **changes)))


def write_plain(repository: Path, name: str, version: str, model: Path) -> Path:
    """Copy a plain model to ``<repository>/<name>/<version>/model.onnx`` and return that folder."""
    folder = repository / name / version
    folder.mkdir(parents=True)
    shutil.copyfile(model, folder / artifact.PLAIN_MODEL)
    return folder


def signature_of(model: Path) -> Signature:
    """Read a model's signature with onnxruntime."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return Signature(
        tuple(spec_of_ort(node.name, node.type, node.shape) for node in session.get_inputs()),
        tuple(spec_of_ort(node.name, node.type, node.shape) for node in session.get_outputs()),
    )


def random_inputs(signature: Signature, rows: int = 4, seed: int = 0) -> dict[str, Array]:
    """Make inputs that fit: axis 0 has ``rows`` where it is variable, other variable axes have size 3."""
    rng = np.random.default_rng(seed)
    return {spec.name: _random(spec, rows, rng) for spec in signature.inputs}


def write_golden(folder: Path, original: Path, signature: Signature, rows: int = 4) -> None:
    """Write ``golden.npz``: random inputs and the original's outputs, text as fixed-length bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = random_inputs(signature, rows)
    feeds = {name: array.astype("U") if array.dtype.kind == "O" else array for name, array in inputs.items()}
    session = onnxruntime.InferenceSession(str(original), providers=["CPUExecutionProvider"])
    outputs = session.run(None, feeds)
    arrays = {f"input/{name}": array for name, array in inputs.items()}
    arrays |= {f"output/{spec.name}": array for spec, array in zip(signature.outputs, outputs, strict=True)}
    np.savez(
        folder / artifact.GOLDEN,
        **{key: array.astype("S") if array.dtype.kind == "O" else array for key, array in arrays.items()},
    )


def _random(spec: TensorSpec, rows: int, rng: np.random.Generator) -> Array:
    shape = [size if isinstance(size, int) else (3 if axis else rows) for axis, size in enumerate(spec.shape)]
    dtype = NUMPY_DTYPE[spec.datatype]
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    numbers = rng.integers(0, 2 if dtype.kind == "b" else 10, shape)
    if dtype.kind == "O":
        return np.array([b"text %d" % number for number in numbers.flat], object).reshape(shape)
    return numbers.astype(dtype)
