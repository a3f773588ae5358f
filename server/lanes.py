"""Opening the lanes of one model version: each variant on each device that it is made for, proven before it serves."""

import logging
from collections.abc import Iterator

from server.artifact import Artifact, LatencyTable, Variant, read_golden
from server.errors import ArtifactError, InferenceFailed, StartupError
from server.golden import require_golden
from server.host import read_host
from server.providers import Device, usable_cores
from server.scheduler import LaneSpec
from server.session import MEASURED_ROWS, Session, measure_latency, synthetic_inputs
from server.tensors import Signature, Tensors, TensorSpec

logger = logging.getLogger(__name__)


class Lanes:
    """The opened lanes of an artifact.

    Opening blocks. Lanes are ordered by device as given, then by the manifest's preference. On the CPU the first
    variant and the one for large batches get several lanes, every other one a single lane per device.

    Args:
        artifact: What to open.
        devices: The devices that really work, the preferred one first.
        cpu_instances: Lanes of such a CPU variant; 0 means as many as its threads fit into the usable cores.
        brownout: Whether every variant on the CPU gets several lanes, since each may have to serve alone.

    Attributes:
        specs: What the scheduler feeds.
        signature: The manifest's, or a plain model's own.
        batchable: Whether rows of different requests may share a run.
        refused: Variant -> why it is not served on this host.

    Raises:
        StartupError: If no variant can be served; the message holds the reason of each.
        ArtifactError: If an optimized artifact lacks its golden outputs.
    """

    def __init__(
        self, artifact: Artifact, devices: tuple[Device, ...], cpu_instances: int, *, brownout: bool = False
    ) -> None:
        self._artifact, self._manifest = artifact, artifact.manifest
        self._cpu_instances, self._brownout = cpu_instances, brownout
        self._golden = read_golden(artifact.folder) if artifact.manifest is not None else None
        self._sessions: list[Session] = []
        self.specs: list[LaneSpec] = []
        self.batchable = artifact.manifest is None or artifact.manifest.batching.batchable
        self.refused: dict[str, str] = dict(_without_device(artifact, devices))
        for variant, device in _placements(artifact, devices):
            try:
                self._place(variant, device)
            except StartupError as exc:
                logger.warning("%s/%s: not served on %s: %s", artifact.name, artifact.version, device.name, exc)
                earlier = self.refused.get(variant.name)
                self.refused[variant.name] = f"{earlier}; {exc}" if earlier else str(exc)
        if not self.specs:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise StartupError(f"no variant of {artifact.name}/{artifact.version} can be served: {reasons}")
        self.signature: Signature = self._manifest.signature if self._manifest else self._sessions[0].signature

    def close(self) -> None:
        """Release all sessions."""
        for session in self._sessions:
            session.close()

    def _place(self, variant: Variant, device: Device) -> None:
        session = self._open(variant, device)
        latency, probe = variant.latency, self._probe()
        if self._manifest is None:
            latency, may_batch, probe = _observe(session)
            self.batchable = self.batchable and may_batch
        is_first_on_cpu = device.kind == "cpu" and not any(spec.device == device.name for spec in self.specs)
        threads = 1 if device.kind != "cpu" else variant.options.intra_op_threads or usable_cores()
        from_rows = 0 if is_first_on_cpu else variant.from_rows
        is_main = device.kind == "cpu" and (is_first_on_cpu or from_rows or self._brownout)
        count = (self._cpu_instances or max(1, usable_cores() // threads)) if is_main else 1
        for number in range(count):
            # One-thread sessions compute in the calling thread, so lanes can share one and its memory. A session with
            # more has one pool of threads, which its callers would have to share.
            if number and threads > 1:
                session = self._open(variant, device)
            self.specs.append(
                LaneSpec(
                    variant.name,
                    device.name,
                    session,
                    latency,
                    threads,
                    from_rows,
                    variant.fidelity.agreement if variant.fidelity is not None else 1.0,
                    probe,
                )
            )

    def _probe(self) -> Tensors | None:
        """Return inputs that are known to work: the first golden row."""
        if self._golden is None:
            return None
        rows = slice(1) if self.batchable else slice(None)
        return {name: array[rows] for name, array in self._golden.inputs.items()}

    def _open(self, variant: Variant, device: Device) -> Session:
        if variant.host_bound and variant.host != (here := read_host().fingerprint):
            raise StartupError(f"built for hosts of kind {variant.host}, this is one of {here}; optimize it here")
        session = Session(self._artifact.folder / variant.file, device, variant.options)
        if self._manifest is not None and self._golden is not None:
            _require_signature(self._manifest.signature, session.signature, variant.name)
            decibel = require_golden(session, variant, self._golden)
            logger.debug("variant %s on %s: %.1f dB on golden inputs", variant.name, device.name, decibel)
        self._sessions.append(session)
        return session


def _placements(artifact: Artifact, devices: tuple[Device, ...]) -> Iterator[tuple[Variant, Device]]:
    for device in devices:
        for variant in artifact.variants:
            # A plain model goes everywhere but to TensorRT, which would build an engine whenever a shape is new.
            kinds = (variant.provider,) if artifact.manifest is not None else ("cuda", "cpu")
            if device.kind in kinds:
                yield variant, device


def _without_device(artifact: Artifact, devices: tuple[Device, ...]) -> Iterator[tuple[str, str]]:
    if artifact.manifest is not None:
        kinds = {device.kind for device in devices}
        for variant in artifact.manifest.variants:
            if variant.provider not in kinds:
                yield variant.name, f"no {variant.provider} device is usable here"


def _require_signature(declared: Signature, seen: Signature, variant: str) -> None:
    """Require a session to take and give what the manifest promises.

    Variable axes of outputs may be unknown to one side only, since onnxruntime infers shapes that a file leaves open.
    """
    inputs = [(spec.name, spec.datatype, spec.protocol_shape) for spec in declared.inputs]
    if [(spec.name, spec.datatype, spec.protocol_shape) for spec in seen.inputs] != inputs:
        raise ArtifactError(f"variant {variant} takes {seen.inputs}, the manifest says {declared.inputs}")
    same = len(seen.outputs) == len(declared.outputs)
    if not same or not all(_agree(*pair) for pair in zip(declared.outputs, seen.outputs, strict=True)):
        raise ArtifactError(f"variant {variant} gives {seen.outputs}, the manifest says {declared.outputs}")


def _agree(declared: TensorSpec, seen: TensorSpec) -> bool:
    if (declared.name, declared.datatype) != (seen.name, seen.datatype):
        return False
    sizes = zip(declared.protocol_shape, seen.protocol_shape, strict=False)
    return all(size == other or -1 in (size, other) for size, other in sizes)


def _observe(session: Session) -> tuple[LatencyTable | None, bool, Tensors | None]:
    """Warm up a plain model and measure it as far as inputs of ones allow.

    Returns:
        Its latency table, whether it may be batched, and the inputs that it has run.
    """
    signature = session.signature
    batchable = signature.shares_batch_axis
    ones = synthetic_inputs(signature, 1)
    try:
        session.run(ones)
    except InferenceFailed as exc:
        logger.info("not warmed up, inputs of ones do not suit the model: %s", exc)
        return None, batchable, None
    if batchable and not _runs_two_rows(session):
        logger.warning("the model declares a variable batch axis but does not map two rows to two; it is not batched")
        batchable = False
    if _has_open_sizes(signature, batchable):
        return None, batchable, ones
    try:
        return measure_latency(session, MEASURED_ROWS if batchable else (1,)), batchable, ones
    except InferenceFailed as exc:
        logger.info("not measured: %s", exc)
        return None, batchable, ones


def _has_open_sizes(signature: Signature, batchable: bool) -> bool:
    """Whether a request can be larger than its rows tell, so that times of inputs of ones promise what none keeps."""
    return any(
        spec.datatype == "BYTES" or not all(isinstance(size, int) for size in spec.shape[1 if batchable else 0 :])
        for spec in signature.inputs
    )


def _runs_two_rows(session: Session) -> bool:
    try:
        outputs = session.run(synthetic_inputs(session.signature, 2))
    except InferenceFailed:
        return False
    return all(array.shape[:1] == (2,) for array in outputs.values())
