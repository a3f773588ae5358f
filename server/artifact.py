"""Artifacts: what the optimizer writes and the server reads.

::

    models/<name>/<version>/
      manifest.json               a ``Manifest``; written last, so a folder without it is not finished
      <variant>/model.onnx        or model.plan
      golden.npz                  a few inputs and the original's outputs: ``input/<name>`` and ``output/<name>``;
                                  text as numpy's fixed-length bytes
      report.json  report.html    what was tried, kept, refused, and why

A folder ``<name>/<version>/`` may instead hold a plain ``model.onnx`` without a manifest; it is served as it is and
marked *unoptimized*. Times are milliseconds in the file (``_ms``) and seconds in memory (``_s``).
"""

import hashlib
import math
import zipfile
import zlib
from bisect import bisect_left
from pathlib import Path

import msgspec
import numpy as np

from server.errors import ArtifactError
from server.tensors import Array, Signature

FORMAT = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
PLAIN_MODEL = "model.onnx"
UNOPTIMIZED = "unoptimized"


class SessionOptions(msgspec.Struct, frozen=True):
    """How a variant's session must be opened; it travels with the variant because correctness can depend on it.

    Attributes:
        intra_op_threads: Threads of one session; 0 means onnxruntime's own default (all cores).
        spinning: Whether idle worker threads spin.
        graph_level: onnxruntime's graph optimization level: ``disable``, ``basic``, ``extended`` or ``all``.
        config: Session config entries, e.g. ``session.x64quantprecision``.
        provider_options: Options of a GPU's execution provider, beyond those that the server sets.
    """

    intra_op_threads: int = 1
    spinning: bool = False
    graph_level: str = "all"
    config: dict[str, str] = {}
    provider_options: dict[str, str] = {}


class Profile(msgspec.Struct, frozen=True):
    """Minimum, best and maximum shape per input, for engines that are built for a range of shapes."""

    minimum: dict[str, tuple[int, ...]]
    optimum: dict[str, tuple[int, ...]]
    maximum: dict[str, tuple[int, ...]]


class LatencyTable(msgspec.Struct, frozen=True):
    """Measured run time per batch size.

    Attributes:
        rows: Batch sizes, ascending.
        p50_ms: Median run time for each batch size.
        p99_ms: 99th percentile for each batch size.
        low_ms: Lower end of the 95 % interval of the median, for each batch size.
        high_ms: Upper end of that interval.
    """

    rows: tuple[int, ...]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]
    low_ms: tuple[float, ...]
    high_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if {len(column) for column in (self.p50_ms, self.p99_ms, self.low_ms, self.high_ms)} != {len(self.rows)}:
            raise ValueError("a latency table needs one time per batch size in every column")
        if not self.rows or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"batch sizes are {list(self.rows)}; they must ascend from 1 or more")

    def predict_s(self, rows: int) -> float:
        """Predict the run time in seconds of a batch, linear between measured sizes and beyond the last one."""
        sizes, times = self.rows, self.p50_ms
        right = bisect_left(sizes, rows)
        if right < len(sizes) and sizes[right] == rows:
            return times[right] / 1e3
        if right == 0 or len(sizes) == 1:
            return times[0] / 1e3
        right = min(right, len(sizes) - 1)
        slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
        return max(times[right - 1] + slope * (rows - sizes[right - 1]), 0.0) / 1e3

    def best_rows(self, tolerance: float = 0.05) -> int:
        """Return the smallest measured batch size whose rows per second come within ``tolerance`` of the best."""
        rates = [rows / max(ms, 1e-9) for rows, ms in zip(self.rows, self.p50_ms, strict=True)]
        enough = (1 - tolerance) * max(rates)
        return next(rows for rows, rate in zip(self.rows, rates, strict=True) if rate >= enough)

    def paying_rows(self, gain: float = 0.03) -> int:
        """Return the smallest measured batch size beyond which none gains more than ``gain`` rows/s per doubling.

        Each doubling makes everybody in the batch, and whoever comes while it runs, wait twice as long.
        """
        speeds = [(rows, rows / max(ms, 1e-9)) for rows, ms in zip(self.rows, self.p50_ms, strict=True)]
        return next(
            rows
            for index, (rows, speed) in enumerate(speeds)
            if all(faster <= speed * (1 + gain) ** math.log2(more / rows) for more, faster in speeds[index + 1 :])
        )


class Slice(msgspec.Struct, frozen=True):
    """Agreement on a part of the held-out samples.

    Attributes:
        name: What its samples share, e.g. ``class 3``, ``margin quarter 1`` (the least confident) or ``label 7``.
        samples: Samples in it.
        agreement: Share of them with the same decision.
        agreement_low: Lower end of its 95 % interval, of this slice alone: the worst of many is low by chance as well.
    """

    name: str
    samples: int
    agreement: float
    agreement_low: float


class Fidelity(msgspec.Struct, frozen=True):
    """How well a variant reproduces the original on held-out samples.

    Attributes:
        samples: Held-out samples compared.
        agreement: Share of samples with the same decision (see ``decision``), the worst over the batch sizes tried.
        agreement_low: Lower end of its 95 % interval.
        decision: What agreement counts: ``top1`` (largest column, or the label), ``binary`` (side of the threshold),
            ``nearest_neighbour`` (embeddings), ``tokens`` and ``pixels`` (largest class at 99 % of the positions),
            ``maps`` (same peaks, same outputs there), ``near`` (error 20 dB below the output), or ``close`` (every
            element within 1 %).
        cosine: Mean cosine of the outputs, and ``cosine_worst`` its minimum over the samples.
        sqnr_db: Signal power over error power, in decibel, of the worst output.
        accuracy: Task accuracy against labels, or what the user's evaluator returned; ``accuracy_original`` is the
            original's. ``None`` without labels and evaluator.
        top5_agreement: Share of samples whose original top-1 is among the candidate's five largest columns; ``None``
            with five classes or fewer.
        kl: Mean Kullback-Leibler divergence of the candidate's class distribution from the original's, in nats;
            ``None`` where the outputs hold no classes.
        sqnr_by_output: Decibel per floating point output.
        worst_slice: The slice of at least 16 samples with the lowest agreement; ``None`` when there is none.
        cosine_low: Lower end of the 95 % interval of the mean cosine.
        accuracy_drop_high: Upper end of the 95 % interval of the original's accuracy minus this one's; ``None``
            without labels, and with an evaluator, whose value is one number for all samples.
        accuracy_difference_low: Lower end of the 95 % interval of this accuracy minus the original's, by paired
            bootstrap; ``None`` without labels and evaluator, or where the evaluator could not be asked often enough.
    """

    samples: int
    agreement: float
    agreement_low: float
    decision: str
    cosine: float
    cosine_worst: float
    sqnr_db: float
    accuracy: float | None = None
    accuracy_original: float | None = None
    top5_agreement: float | None = None
    kl: float | None = None
    sqnr_by_output: dict[str, float] = {}
    worst_slice: Slice | None = None
    cosine_low: float | None = None
    accuracy_drop_high: float | None = None
    accuracy_difference_low: float | None = None


class Variant(msgspec.Struct, frozen=True):
    """One servable form of a model.

    Attributes:
        name: Unique in its artifact, e.g. ``int8-dynamic``; clients pin by it.
        file: Path of the model file relative to the version folder.
        sha256: Digest of that file, in hexadecimal; empty for an unoptimized model.
        size_bytes: Size of the file.
        precision: ``fp32``, ``fp16``, ``int8-dynamic``, ``int8-static``.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        options: How to open the session.
        golden_min_sqnr_db: Least SQNR in decibel on ``golden.npz`` with which the variant may serve on this host.
        fidelity: Evidence against the original; ``None`` for an unoptimized model.
        latency: Measured on ``host``; ``None`` when never measured.
        profile: Shapes that an engine was built for.
        host: Fingerprint of the host that measured it.
        host_bound: Whether it holds operators made for that kind of host, and opens on no other.
        from_rows: Least rows of the batches that it takes from the variant before it; 0 when it is not one for large
            batches.
        weights: Files beside ``file`` that hold its weights, by name -> digest; for models beyond 2 GB.
        engine: A plan built of it for other machines, path relative to the version folder, and ``engine_sha256`` its
            digest; empty without. ``profile`` are its shapes.
        stages: Of a model that is cut for several devices, the files of the stages that follow on ``file``, in order:
            path relative to the version folder -> digest.
    """

    name: str
    file: str
    sha256: str
    size_bytes: int
    precision: str
    provider: str
    options: SessionOptions = SessionOptions()
    golden_min_sqnr_db: float = 0.0
    fidelity: Fidelity | None = None
    latency: LatencyTable | None = None
    profile: Profile | None = None
    host: str = ""
    host_bound: bool = False
    from_rows: int = 0
    weights: dict[str, str] = {}
    stages: dict[str, str] = {}
    engine: str = ""
    engine_sha256: str = ""


class Batching(msgspec.Struct, frozen=True):
    """Whether rows of different requests may share a run.

    Attributes:
        batchable: True only where it is proven.
        reason: The proof, or why there is none.
        max_rows: Largest batch that was measured.
    """

    batchable: bool
    reason: str
    max_rows: int = 32


class Padding(msgspec.Struct, frozen=True):
    """Whether inputs may be padded along a variable axis other than the batch, e.g. the sequence.

    Attributes:
        paddable: True only where it is proven.
        reason: The proof, or why there is none.
        axes: Input name -> index of the axis that is padded at its end; only inputs that are padded.
        output_axes: Output name -> index of the axis to cut back to the unpadded length; only outputs that have it.
        value: What inputs are padded with.
    """

    paddable: bool
    reason: str
    axes: dict[str, int] = {}
    output_axes: dict[str, int] = {}
    value: int = 0


class Source(msgspec.Struct, frozen=True):
    """The original model."""

    file: str
    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """Everything the server needs to know about one model version.

    Attributes:
        variants: In order of preference: the first one that opens on a device serves there.
        digest: Of what was asked for and what was made, measured times left out.
        padding: Whether requests of unequal length may be padded to one; ``None`` when that was never tried.
    """

    format: int
    name: str
    version: str
    signature: Signature
    batching: Batching
    source: Source
    variants: tuple[Variant, ...]
    recipe_sha256: str = ""
    inputs_sha256: str = ""
    tools: dict[str, str] = {}
    host: dict[str, str] = {}
    golden_sha256: str = ""
    digest: str = ""
    padding: Padding | None = None


class Golden(msgspec.Struct, frozen=True):
    """Inputs and the original's outputs; axis 0 of each array counts the samples of a batchable model."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]


class Artifact(msgspec.Struct, frozen=True):
    """One version folder: an optimized artifact, or a plain model when ``manifest`` is ``None``."""

    folder: Path
    name: str
    version: str
    manifest: Manifest | None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The servable variants in order of preference."""
        if self.manifest is not None:
            return self.manifest.variants
        size = (self.folder / PLAIN_MODEL).stat().st_size
        return (Variant(UNOPTIMIZED, PLAIN_MODEL, "", size, "original", "cpu"),)


def is_complete(folder: Path) -> bool:
    """Whether a version folder may be opened: its manifest, or its plain model, is in place."""
    return (folder / MANIFEST).is_file() or (folder / PLAIN_MODEL).is_file()


def read_artifact(folder: Path) -> Artifact:
    """Read ``<name>/<version>/`` and check every digest.

    Raises:
        ArtifactError: If the manifest is missing, unreadable or of another format, if it disagrees with the folder's
            name, if two variants have one name, or if a file is missing, lies outside, or differs from its digest.
    """
    name, version = folder.parent.name, folder.name
    if not (folder / MANIFEST).is_file():
        if not (folder / PLAIN_MODEL).is_file():
            raise ArtifactError(f"{folder} holds neither {MANIFEST} nor {PLAIN_MODEL}")
        return Artifact(folder, name, version, None)
    manifest = _read_manifest(folder / MANIFEST)
    if (manifest.name, manifest.version) != (name, version):
        raise ArtifactError(
            f"{folder / MANIFEST} describes {manifest.name}/{manifest.version}; "
            f"move the folder to that place or optimize again under the name {name}"
        )
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{folder / MANIFEST} names its variants {names}; each name may occur once")
    for variant in manifest.variants:
        _check_digest(folder, variant.file, variant.sha256)
        for weights, digest in variant.weights.items():
            _check_digest(folder, str(Path(variant.file).parent / weights), digest)
        for stage, digest in variant.stages.items():
            _check_digest(folder, stage, digest)
        if variant.engine:
            _check_digest(folder, variant.engine, variant.engine_sha256)
    if manifest.golden_sha256:
        _check_digest(folder, GOLDEN, manifest.golden_sha256)
    return Artifact(folder, name, version, manifest)


def read_golden(folder: Path) -> Golden:
    """Read ``golden.npz``.

    Raises:
        ArtifactError: If it is missing or not such a file.
    """
    path = folder / GOLDEN
    kinds: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                kind, _, name = key.partition("/")
                if kind not in kinds:
                    raise ArtifactError(f"{path} holds {key}; keys are input/<name> and output/<name>")
                array = arrays[key]
                # Text is stored as fixed-length bytes, because arrays of objects would need pickle.
                kinds[kind][name] = array.astype(np.object_) if array.dtype.kind == "S" else array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise ArtifactError(f"cannot read {path}: {exc}") from exc
    return Golden(kinds["input"], kinds["output"])


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = path.read_bytes()
        found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format", b"null")
        if bytes(found) != str(FORMAT).encode():
            raise ArtifactError(
                f"{path} has format {bytes(found).decode()}; this server reads {FORMAT}: optimize the model again"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except (OSError, msgspec.MsgspecError) as exc:
        raise ArtifactError(f"cannot read {path}: {exc}") from exc


def _check_digest(folder: Path, file: str, expected: str) -> None:
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder / MANIFEST} names the file {file}, which lies outside the artifact")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the artifact again")
    if (seen := digest_of(path)) != expected:
        raise ArtifactError(f"{path} has SHA-256 {seen}, the manifest says {expected}; copy the artifact again")
