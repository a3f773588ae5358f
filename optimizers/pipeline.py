"""From ``model.onnx`` to an artifact: load, passes, proof, race, choice, and a folder renamed into place.

The same model, data, recipe, tools and host give the same artifact: a second run finds it and does nothing. An artifact
is never changed; other content becomes the next version.
"""

import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from optimizers.building import SERVING, Built, Plan, build
from optimizers.calibration import Samples, read_samples, split, synthetic_samples, why_no_proof
from optimizers.engines import build_engines
from optimizers.evidence import HeldOut, prove_batching, run_singly
from optimizers.fidelity import decision_for
from optimizers.graph import load_model, save_model, signature_of
from optimizers.isolation import Probe, Workshop
from optimizers.passes import Pass, PassContext
from optimizers.passes.catalog import EXACT, lossy
from optimizers.publish import golden_of, move_into_place, write_golden, write_manifest, write_variants
from optimizers.report import DataRecord, EngineRecord, PassRecord, Report, write_report
from optimizers.request import Digests, OptimizeRequest, digests_of, find_existing, versions_in
from optimizers.search import Gate
from optimizers.trial import UNTOUCHED, Outcome, TrialPlan, headline, run_trial
from server.artifact import FORMAT, GOLDEN, Artifact, Batching, Golden, Manifest, Source, digest_of, read_artifact
from server.errors import ArtifactError
from server.host import HostFacts, read_host
from server.providers import CPU, usable_devices
from server.session import Session
from server.tensors import Signature

Observe = Callable[[str, float], None]
"""Called with the current stage and the share of the whole that is done, 0 to 1."""

_CALIBRATION_ROWS = 8
_PROBE_SAMPLES = 4
_SYNTHETIC_SAMPLES = 32


def existing(request: OptimizeRequest) -> Artifact | None:
    """Find the version that this request made before, on this host; cheap, no model is opened.

    Raises:
        OptimizerError: If a file cannot be read or the name cannot be served.
        ArtifactError: If ``request.version`` exists with other content.
    """
    return find_existing(request, digests_of(request, read_host(), _passes(request)))


def optimize(request: OptimizeRequest, observe: Observe = lambda _stage, _share: None) -> Artifact:
    """Make, prove and publish an artifact; or return the one that the same request made before.

    Blocks for seconds to minutes and runs passes in child processes. A failure leaves nothing behind.

    Args:
        request: What to do.
        observe: Told about the current stage.

    Raises:
        OptimizerError: If the model, the data or the recipe cannot be used.
        StartupError: If the original itself cannot be opened, or if the version exists with other content.
        InferenceFailed: If the original fails on the samples.
    """
    host = read_host()
    digests = digests_of(request, host, _passes(request))
    found = find_existing(request, digests)
    if found is not None:
        return found
    folder = request.repository / request.name
    version = request.version or max([0, *versions_in(folder)]) + 1
    try:
        request.repository.mkdir(parents=True, exist_ok=True)
        # A hidden sibling on the same file system, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=".optimize-", dir=request.repository) as work:
            made = _Run(request, host, digests, str(version), Path(work), observe).execute()
            move_into_place(made, folder / str(version))
    except OSError as exc:
        raise ArtifactError(f"cannot write to {request.repository}: {exc.strerror or exc}") from exc
    return read_artifact(folder / str(version))


def _passes(request: OptimizeRequest) -> list[Pass]:
    return [*EXACT, *lossy(request.recipe.precisions).values()]


class _Data(msgspec.Struct, frozen=True):
    """The samples in two parts, and what they are.

    Attributes:
        no_proof: Why they cannot prove a lossy variant; empty when they can.
    """

    calibration: Samples | None
    held_out: Samples
    record: DataRecord
    no_proof: str


class _Original(msgspec.Struct, frozen=True):
    """What the original answered: the measure of everything else."""

    held_out: HeldOut
    batching: Batching
    golden: Golden


class _Run:
    """One run; each method is one stage, and ``execute`` is their order."""

    def __init__(
        self, request: OptimizeRequest, host: HostFacts, digests: Digests, version: str, work: Path, observe: Observe
    ) -> None:
        self.request, self.recipe, self.host, self.digests = request, request.recipe, host, digests
        self.version, self.work, self.observe = version, work, observe
        self.started_s = time.monotonic()

    def execute(self) -> Path:
        """Return the finished artifact's folder."""
        self.observe("load", 0.0)
        untouched, signature = self._load()
        data = self._samples(signature)
        self.observe("ask the original", 0.02)
        original = self._ask(untouched, signature, data.held_out)
        built, passes = self._build(untouched, data, original.held_out)
        outcome = run_trial(
            [untouched, *built], original.held_out, original.batching, self._trial(), self._part(0.35, 0.6)
        )
        self.observe("write the artifact", 0.96)
        folder = self.work / "artifact"
        folder.mkdir()
        engines = self._engines(built, data.held_out, original.batching.max_rows, folder)
        manifest = self._publish(folder, signature, original, outcome)
        write_report(self._report(manifest, data.record, passes, outcome, engines), folder)
        write_manifest(folder, manifest)
        self.observe("done", 1.0)
        return folder

    def _part(self, start: float, share: float) -> Observe:
        return lambda stage, done: self.observe(stage, start + share * done)

    def _load(self) -> tuple[Built, Signature]:
        """Copy the original into the work folder as one self-contained file, and read its signature."""
        model = load_model(self.request.model)
        path = self.work / "original" / "model.onnx"
        save_model(model, path)
        return Built(UNTOUCHED, "fp32", "cpu", exact=True, model=path), signature_of(model)

    def _samples(self, signature: Signature) -> _Data:
        recipe, path = self.recipe, self.request.calibration
        if path is None:
            made = synthetic_samples(signature, _SYNTHETIC_SAMPLES, recipe.seed)
            record = DataRecord("made up: no --calibration was given", made.count, 0, made.count, False, "")
            return _Data(None, made, record, why_no_proof(None))
        samples = read_samples(path, signature, self.request.labels)
        calibration, held_out = split(samples, recipe.calibration_samples, recipe.holdout_samples, recipe.seed)
        record = DataRecord(
            path.name, samples.count, calibration.count, held_out.count, samples.labels is not None, self.digests.inputs
        )
        return _Data(calibration, held_out, record, why_no_proof(held_out))

    def _ask(self, untouched: Built, signature: Signature, samples: Samples) -> _Original:
        """Run the original over the held-out samples, one by one and in batches."""
        singles = tuple(samples.batch(index, 1) for index in range(samples.count))
        session = Session(untouched.model, CPU, SERVING)
        try:
            reference = run_singly(session, singles, self.host.cores)
            held_out = HeldOut(singles, reference, decision_for(reference), samples.labels)
            batching = prove_batching(session, signature, held_out, max(self.recipe.batch_rows), self.host.cores)
            return _Original(held_out, batching, golden_of(session, held_out, batchable=batching.batchable))
        finally:
            session.close()

    def _build(self, untouched: Built, data: _Data, held_out: HeldOut) -> tuple[list[Built], list[PassRecord]]:
        singles = held_out.singles[:_PROBE_SAMPLES]
        probe = Probe(singles, {name: array[: len(singles)] for name, array in held_out.reference.items()})
        batches = data.calibration.batches(_CALIBRATION_ROWS) if data.calibration is not None else []
        folder = self.work / "passes"
        folder.mkdir()
        context = PassContext(self.host, tuple(batches), self.recipe.seed, folder)
        workshop = Workshop(folder, context, probe, self.request.pass_timeout_s)
        usable = tuple(device.kind for device in usable_devices("prefer") if device.kind in self.recipe.devices)
        plan = Plan(EXACT, lossy(self.recipe.precisions), usable, data.no_proof)
        return build(untouched.model, plan, workshop, self._part(0.05, 0.3))

    def _trial(self) -> TrialPlan:
        recipe = self.recipe
        gate = Gate(recipe.min_agreement, recipe.max_accuracy_drop)
        budget_s = self.request.time_budget_s
        return TrialPlan(self.request.model, gate, recipe.batch_rows, self.host.cores, budget_s, recipe.seed)

    def _engines(self, built: list[Built], samples: Samples, max_rows: int, folder: Path) -> tuple[EngineRecord, ...]:
        if "tensorrt" not in self.recipe.devices:
            return ()
        models = {b.name: b.model for b in built if b.name in ("fp32", "fp16") and not b.failure}
        return build_engines(models, samples, max_rows, folder / "engines", self.request.pass_timeout_s)

    def _publish(self, folder: Path, signature: Signature, original: _Original, outcome: Outcome) -> Manifest:
        """Write everything but the report, and return the manifest."""
        write_golden(folder, original.golden)
        host = self.host
        facts = {
            "fingerprint": host.fingerprint,
            "cpu": host.cpu,
            "flags": " ".join(host.flags),
            "cores": str(host.cores),
        }
        size = self.request.model.stat().st_size
        return Manifest(
            format=FORMAT,
            name=self.request.name,
            version=self.version,
            signature=signature,
            batching=_within_slo(original.batching, outcome, self.recipe.slo_ms),
            source=Source(self.request.model.name, self.digests.source, size),
            variants=write_variants(folder, outcome.chosen, original.golden, host.fingerprint),
            recipe_sha256=self.digests.recipe,
            inputs_sha256=self.digests.inputs,
            tools=host.tools,
            host=facts,
            golden_sha256=digest_of(folder / GOLDEN),
        )

    def _report(
        self,
        manifest: Manifest,
        data: DataRecord,
        passes: list[PassRecord],
        outcome: Outcome,
        engines: tuple[EngineRecord, ...],
    ) -> Report:
        return Report(
            name=manifest.name,
            version=manifest.version,
            headline=headline(outcome),
            chosen=outcome.chosen[0].name,
            source=manifest.source,
            gate=Gate(self.recipe.min_agreement, self.recipe.max_accuracy_drop),
            recipe=msgspec.to_builtins(self.recipe),
            recipe_sha256=manifest.recipe_sha256,
            data=data,
            batching=manifest.batching,
            passes=tuple(passes),
            candidates=outcome.candidates,
            served=outcome.served,
            threads=outcome.threads,
            engines=engines,
            host=self.host,
            command=self.request.command,
            seconds=time.monotonic() - self.started_s,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _within_slo(batching: Batching, outcome: Outcome, slo_ms: float | None) -> Batching:
    """Limit batches to those whose measured p99 keeps the wanted latency; one row always goes."""
    if slo_ms is None or not batching.batchable:
        return batching
    table = outcome.chosen[0].latency
    fitting = [rows for rows, p99_ms in zip(table.rows, table.p99_ms, strict=True) if p99_ms <= slo_ms]
    rows = max(fitting, default=1)
    seen = f"p99 of {rows} rows is {table.p99_ms[table.rows.index(rows)]:.1f} ms, wanted are {slo_ms:g} ms"
    return Batching(True, f"{batching.reason}; {seen}", rows)
