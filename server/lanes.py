"""Opening the lanes of one model version: each variant on each device that it is made for, proven before it serves."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import msgspec

from server.artifact import Artifact, LatencyTable, Variant, read_golden
from server.bench import LEAST_BUDGET_S, SessionBench, Subject
from server.bound import RUNNERS
from server.cores import usable_cores
from server.errors import ArtifactError, Draining, InferenceFailed, StartupError
from server.golden import require_golden
from server.host import read_host
from server.providers import Device
from server.ranged import RangedSession
from server.sample import Sample, sample_of_golden, sample_of_plain
from server.scheduler import LaneSpec
from server.session import Opened, measure_latency
from server.split import Split, Splits, compare
from server.staged import open_variant
from server.tensors import Signature, TensorSpec
from server.worker import INLINE_LANE_S

logger = logging.getLogger(__name__)

_BUDGET_SHARE = 0.5  # of the time that opening took until then, for measuring splits of slow models
_PLAIN_S, _FOREIGN_S = 1.0, 0.5  # for a latency table
_LOOK_S = 0.02  # for a first look at one row


class Lanes:
    """The opened lanes of an artifact.

    Opening blocks. Lanes are ordered by device as given, then by the manifest's preference. On the CPU the first
    variant and the one for large batches get several lanes, every other one a single lane per device.

    What a plain model or a manifest of another kind of host does not tell is measured: run times, and, unless something
    else needs the cores, how the lanes of the CPU split them.

    Args:
        artifact: What to open.
        devices: The devices that really work, the preferred one first.
        cpu_instances: Lanes of such a CPU variant; 0 means as measured, or as many as its threads fit into the usable
            cores.
        brownout: Whether every variant on the CPU gets several lanes, since each may have to serve alone.
        splits: The splits of the process's models; without, none is measured.

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
        self,
        artifact: Artifact,
        devices: tuple[Device, ...],
        cpu_instances: int,
        *,
        brownout: bool = False,
        splits: Splits | None = None,
    ) -> None:
        self._artifact, self._manifest, self._devices = artifact, artifact.manifest, devices
        self._cpu_instances, self._brownout = cpu_instances, brownout
        self._splits = None if cpu_instances else splits
        self._split = self._splits.known(artifact.name) if self._splits is not None else None
        self._golden = read_golden(artifact.folder) if artifact.manifest is not None else None
        self._sessions: list[Opened] = []
        self._closed = False
        self._opened: dict[str, Opened] = {}  # variant -> its first session
        self.specs: list[LaneSpec] = []
        self.batchable = artifact.manifest is None or artifact.manifest.batching.batchable
        self.refused: dict[str, str] = dict(_without_device(artifact, devices))
        for variant, device in _placements(artifact, devices):
            try:
                self._place(variant, device)
            except StartupError as exc:
                logger.warning("%s: not served on %s: %s", self._title, device.name, exc)
                earlier = self.refused.get(variant.name)
                self.refused[variant.name] = f"{earlier}; {exc}" if earlier else str(exc)
        if not self.specs:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise StartupError(f"no variant of {self._title} can be served: {reasons}")
        self.signature: Signature = self._manifest.signature if self._manifest else self._sessions[0].signature

    def summary(self) -> list[dict[str, str | int]]:
        """Return ``variant``, ``device``, ``instances`` and ``threads`` of each group of equal lanes."""
        groups = Counter((spec.variant, spec.device, spec.threads) for spec in self.specs)
        return [
            {"variant": variant, "device": device, "instances": instances, "threads": threads}
            for (variant, device, threads), instances in groups.items()
        ]

    def open_engine(self, engine: Variant, source: Variant, device: Device) -> list[LaneSpec]:
        """Open lanes for an engine that was built of a variant in service; ``close`` closes them with the others.

        Blocks, in any thread. The engine is checked against the golden outputs as every variant is, and measured.

        Args:
            engine: The engine, with its profile.
            source: What it was built of. It runs the shapes that the profile leaves out, where it serves itself, or
                else the variant that serves first.
            device: Where the engine runs.

        Raises:
            StartupError: If it cannot be opened, or does not reproduce the original.
            Draining: If the lanes were closed meanwhile.
        """
        if engine.profile is None:
            raise ArtifactError(f"the engine {engine.file} has no profile")
        plan = open_variant(self._artifact.folder, engine, [device], engine.options, None)
        otherwise = self._opened.get(source.name) or next(iter(self._opened.values()))
        session = RangedSession(plan, engine.profile, otherwise)
        self._keep(session, engine)
        if self._closed:  # looked at after ``_keep``: either ``close`` finds the session, or this finds it closed
            session.close()
            raise Draining(f"{self._title} was closed while an engine was opened")
        sample = self._sample(session)
        latency = self._measure(session, sample)
        agreement = _agreement_of(source)
        lane = LaneSpec(engine.name, device.name, session, latency, 1, agreement=agreement, probe=sample.probe)
        return [lane] * RUNNERS

    def discard(self, lanes: Sequence[LaneSpec]) -> None:
        """Release the lanes of an engine."""
        for session in [session for session in self._sessions if any(session is lane.runner for lane in lanes)]:
            session.close()
            self._sessions.remove(session)

    def close(self) -> None:
        """Release all sessions; idempotent."""
        self._closed = True
        for session in self._sessions:
            session.close()

    @property
    def _title(self) -> str:
        return f"{self._artifact.name}/{self._artifact.version}"

    @cached_property
    def _host(self) -> str:
        return read_host().fingerprint

    def _is_foreign(self, variant: Variant) -> bool:
        """Whether a variant was never measured, or on another kind of host."""
        return self._manifest is None or (bool(variant.host) and variant.host != self._host)

    def _place(self, variant: Variant, device: Device) -> None:
        started_s = time.perf_counter()
        on_cpu, is_foreign = device.kind == "cpu", self._is_foreign(variant)
        is_first_on_cpu = on_cpu and not any(spec.device == device.name for spec in self.specs)
        from_rows = 0 if is_first_on_cpu else variant.from_rows
        is_main = on_cpu and bool(is_first_on_cpu or from_rows or self._brownout)
        split = self._split_of(variant, device, is_main=is_main, is_foreign=is_foreign)
        is_open = is_first_on_cpu and is_foreign and not variant.stages and self._may_measure_split()
        session = self._open(variant, device, 1 if is_open else split.threads)
        sample = self._sample(session)
        sessions = [session]
        if is_open and (found := self._find_split(variant, session, sample, time.perf_counter() - started_s)):
            split, sessions = found
        elif is_open and split.threads != 1:
            session.close()
            sessions = [self._open(variant, device, split.threads)]
        # One-thread sessions compute in the calling thread, so lanes can share one and its memory. A session with more
        # has one pool of threads, which its callers would have to share. Stages are there to be shared.
        shares = split.threads == 1 or bool(variant.stages)
        while len(sessions) < split.instances:
            sessions.append(sessions[0] if shares else self._open(variant, device, split.threads))
        latency = self._measure(sessions[0], sample) if is_foreign else variant.latency
        agreement = _agreement_of(variant)
        self._opened.setdefault(variant.name, sessions[0])
        self.specs += [
            LaneSpec(variant.name, device.name, lane, latency, split.threads, from_rows, agreement, sample.probe)
            for lane in sessions
        ]

    def _split_of(self, variant: Variant, device: Device, *, is_main: bool, is_foreign: bool) -> Split:
        """Return how lanes of a variant use the device unless that is measured now."""
        if device.kind != "cpu":  # one lane's batch is copied and split while the other's is computed
            return Split(1 + len(variant.stages) if variant.stages else RUNNERS, 1)
        cores = usable_cores()
        if variant.stages:  # a batch is in one stage at a time
            stages = 1 + len(variant.stages)
            return Split(stages, max(1, cores // stages))
        if is_main and is_foreign and self._split is not None:
            return self._split
        threads = min(variant.options.intra_op_threads or cores, cores)
        return Split((self._cpu_instances or cores // threads) if is_main else 1, threads)

    def _may_measure_split(self) -> bool:
        if self._splits is None or usable_cores() == 1:
            return False
        if not self._splits.is_quiet():
            how = "as for the version before" if self._split is not None else "as many lanes as fit"
            logger.info("%s: requests are served, so the split of the cores is not measured: %s", self._title, how)
            return False
        return True

    def _find_split(
        self, variant: Variant, session: Opened, sample: Sample, opening_s: float
    ) -> tuple[Split, list[Opened]] | None:
        """Measure how the cores are best split; return a session for each instance, ``None`` if that is not told."""
        if sample.inputs is None or self._splits is None:
            return None
        if measure_latency(session, (1,), _LOOK_S, inputs=sample.inputs).predict_s(1) < INLINE_LANE_S:
            return None  # it runs on the event loop, one batch at a time
        reopen = partial(self._open, variant, session.device)
        files = (self._artifact.folder / variant.file).parent.iterdir()
        size_bytes = sum(file.stat().st_size for file in files if file.is_file())
        budget_s = max(LEAST_BUDGET_S, _BUDGET_SHARE * opening_s)
        subject = Subject(session, reopen, sample.inputs, sample.sizes, size_bytes)
        bench = SessionBench(subject, budget_s, self._splits.is_quiet)
        try:
            finding = compare(bench, usable_cores())
            if finding.failure:
                logger.info("%s: the measured split of the cores is not used: %s", self._title, finding.failure)
                return None
            split = finding.trials[0].split
            sessions = bench.keep(split)
        except (InferenceFailed, StartupError) as exc:
            logger.info("%s: the split of the cores cannot be measured: %s", self._title, exc)
            return None
        finally:
            bench.close()
        seen = "; ".join(str(trial) for trial in finding.trials)
        logger.info("%s: the cores are split as measured best, %s (%s)", self._title, split, seen)
        self._split = split
        self._splits.remember(self._artifact.name, split)
        return split, sessions

    def _sample(self, session: Opened) -> Sample:
        if self._manifest is not None and self._golden is not None:
            return sample_of_golden(self._golden, self._manifest.batching)
        sample = sample_of_plain(session)
        self.batchable = self.batchable and sample.batchable
        return sample

    def _measure(self, session: Opened, sample: Sample) -> LatencyTable | None:
        """Measure run times on this host as far as the sample tells them."""
        if sample.inputs is None or not sample.tells_times:
            return None
        budget_s = _PLAIN_S if self._manifest is None else _FOREIGN_S
        try:
            return measure_latency(session, sample.sizes, budget_s, inputs=sample.inputs)
        except InferenceFailed as exc:
            logger.info("%s: not measured: %s", self._title, exc)
            return None

    def _open(self, variant: Variant, device: Device, threads: int) -> Opened:
        if variant.host_bound and variant.host != self._host:
            raise StartupError(f"built for hosts of kind {variant.host}, this is one of {self._host}; optimize it here")
        options = variant.options
        if device.kind == "cpu" and threads != options.intra_op_threads:
            options = msgspec.structs.replace(options, intra_op_threads=threads, spinning=False)
        devices = [other for other in self._devices if other.kind == device.kind] if variant.stages else [device]
        signature = self._manifest.signature if self._manifest is not None else None
        session = open_variant(self._artifact.folder, variant, devices, options, signature)
        self._keep(session, variant)
        return session

    def _keep(self, session: Opened, variant: Variant) -> None:
        """Keep a session if it is what the manifest says and reproduces the golden outputs; else close it."""
        try:
            if self._manifest is not None and self._golden is not None:
                _require_signature(self._manifest.signature, session.signature, variant.name)
                decibel = require_golden(session, variant, self._golden)
                logger.debug("variant %s on %s: %.1f dB on golden inputs", variant.name, session.device.name, decibel)
        except StartupError:
            session.close()
            raise
        self._sessions.append(session)


def _placements(artifact: Artifact, devices: tuple[Device, ...]) -> Iterator[tuple[Variant, Device]]:
    for device in devices:
        for variant in artifact.variants:
            # A plain model goes everywhere but to TensorRT, which would build an engine whenever a shape is new.
            kinds = (variant.provider,) if artifact.manifest is not None else ("cuda", "cpu")
            # Stages take all devices of a kind, so they are placed once.
            is_taken = bool(variant.stages) and device != next(other for other in devices if other.kind == device.kind)
            if device.kind in kinds and not is_taken:
                yield variant, device


def _without_device(artifact: Artifact, devices: tuple[Device, ...]) -> Iterator[tuple[str, str]]:
    if artifact.manifest is not None:
        kinds = {device.kind for device in devices}
        for variant in artifact.manifest.variants:
            if variant.provider not in kinds:
                yield variant.name, f"no {variant.provider} device is usable here"


def _agreement_of(variant: Variant) -> float:
    return variant.fidelity.agreement if variant.fidelity is not None else 1.0


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
