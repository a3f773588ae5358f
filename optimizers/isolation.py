"""Runs one pass in a process of its own, so that whatever a third-party tool does is, at worst, a refusal.

The child loads the model, runs the pass, requires its result to be as near to its input as the pass's effect promises,
and compares it, opened as the server opens it, with the original's outputs on a few samples. Parent and child share a
folder: what a job needs goes in as files, a ``Finding`` comes back as JSON and the new model as a file. A child that
crashes, runs too long or takes too much memory is ended and its pass refused; nothing of it survives. What a child
answered is kept in a store, and the same job is not run again. How long a pass took on these samples is kept as well:
it is not started when the time budget is known not to suffice.
"""

import pickle
import time
from pathlib import Path

import msgspec

from optimizers.budget import SPENT, Budget
from optimizers.errors import PassFailed
from optimizers.evidence import run_singly
from optimizers.fidelity import worst_sqnr_db
from optimizers.graph import files_of, load_model, op_counts, save_model
from optimizers.nursery import Nursery
from optimizers.passes import Pass, PassContext
from optimizers.passes.catalog import settings_of
from optimizers.passes.check import require_equivalent
from optimizers.store import Store, joint_digest, key_of
from server.artifact import SessionOptions
from server.providers import CPU
from server.session import Session
from server.tensors import Tensors

# Least SQNR in decibel of a pass's result against the original. FP32 rounding stays far above 60; a lossy pass is
# judged on all held-out samples later, so that only garbage is stopped here.
LEAST_SQNR_DB = {"exact": 60.0, "tolerance": 30.0, "lossy": 0.0}

SERVING = SessionOptions(intra_op_threads=1, spinning=False, graph_level="all")
"""How candidates are opened, as the server does: one thread, which never spins."""

_JOB, _FINDING, _RESULT = "job.pickle", "finding.json", "model.onnx"
_SECONDS = "seconds.json"


class Probe(msgspec.Struct, frozen=True):
    """A few requests and the original's answers: the golden check after every pass."""

    singles: tuple[Tensors, ...]
    reference: Tensors


class Form(msgspec.Struct, frozen=True):
    """A model on its way through the passes.

    Attributes:
        model: Its file.
        sha256: Digest of its content.
        options: How its sessions are opened.
        reference: The unquantized model that it was made of; ``None`` while it is that itself.
        reference_sha256: Digest of that model's content.
    """

    model: Path
    sha256: str
    options: SessionOptions = SERVING
    reference: Path | None = None
    reference_sha256: str = ""


class Finding(msgspec.Struct, frozen=True):
    """What became of a pass.

    Attributes:
        failure: Why its result must not be used; empty when it may.
        changed: Whether the pass changed the model.
        sha256: Digest of the result's content; empty when nothing changed or it must not be used.
        counts: What was fused, removed or converted.
        note: The pass's own remark.
        options: How sessions of the result must be opened.
        ops_before: Node count per operator before, and ``ops_after`` after the pass.
        sqnr_db: The result against the original on the probe.
        seconds: Wall time of the child that ran it.
        model: The resulting file; empty when there is no new one.
        cached: Whether an earlier run found this out.
    """

    failure: str = ""
    changed: bool = False
    sha256: str = ""
    counts: dict[str, int] = {}
    note: str = ""
    options: SessionOptions = SERVING
    ops_before: dict[str, int] = {}
    ops_after: dict[str, int] = {}
    sqnr_db: float | None = None
    seconds: float = 0.0
    model: str = ""
    cached: bool = False


class Workshop(msgspec.Struct, frozen=True):
    """Where and with what jobs run.

    Attributes:
        store: Keeps what children answered.
        nursery: Forks the children, see ``nursery_of_passes``.
        context: What passes may use; the reference is set for each job.
        probe: The golden check.
        inputs: Digest of everything that calibration and probe come from.
        timeout_s: Seconds after which a pass is stopped.
        memory_bytes: Resident memory at which a pass is stopped; 0 means no limit.
        budget: The time of the run, which stops a pass as well.
    """

    store: Store
    nursery: Nursery
    context: PassContext
    probe: Probe
    inputs: str = ""
    timeout_s: float = 600.0
    memory_bytes: int = 0
    budget: Budget = msgspec.field(default_factory=Budget)


class _Job(msgspec.Struct, frozen=True):
    step: Pass
    form: Form
    context: PassContext
    probe: Probe


def nursery_of_passes() -> Nursery:
    """Return a nursery whose children run passes; close it in the end."""
    return Nursery(__name__)


def run_isolated(step: Pass, form: Form, workshop: Workshop) -> Finding:
    """Run a pass on a model in a child process and wait for it; never raises for what the pass does.

    Args:
        step: The pass; it must be picklable by name.
        form: Its input, left as it is.
        workshop: Store, nursery, context, golden check and limits.
    """
    key = _key(step, form, workshop)
    if (place := workshop.store.find(key)) is not None:
        return msgspec.structs.replace(_read(place), cached=True)
    refusal = workshop.budget.refusal(_usual_s(step, workshop))
    if refusal:
        return Finding(failure=refusal, options=form.options)
    folder = workshop.store.draft()
    context = msgspec.structs.replace(workshop.context, work=folder, reference=form.reference or form.model)
    (folder / _JOB).write_bytes(pickle.dumps(_Job(step, form, context, workshop.probe)))
    start = time.monotonic()
    failure = _run(folder, workshop)
    seconds = time.monotonic() - start
    _remember(step, workshop, seconds)
    if failure:
        return Finding(failure=failure, options=form.options, seconds=seconds)  # not kept: it may go well next time
    (folder / _JOB).unlink()
    finding = msgspec.structs.replace(_read(folder), seconds=seconds, model="")
    (folder / _FINDING).write_bytes(msgspec.json.encode(finding))
    return _read(workshop.store.keep(key, folder))


def main(folder: str) -> None:
    """Run the job in a folder; the child's side of ``run_isolated``."""
    place = Path(folder)
    job: _Job = pickle.loads((place / _JOB).read_bytes())  # noqa: S301  (our own file)
    try:
        finding = _work(job, place / _RESULT)
    except PassFailed as exc:
        finding = Finding(failure=str(exc), options=job.form.options)
    except MemoryError:
        finding = Finding(failure="ran out of memory", options=job.form.options)
    except Exception as exc:  # noqa: BLE001  (the stage's isolation: any failure of a pass is a refusal with its reason)
        text = str(exc).strip().splitlines()
        reason = f"{type(exc).__name__}: {text[0] if text else 'no message'}"
        finding = Finding(failure=reason, options=job.form.options)
    (place / _FINDING).write_bytes(msgspec.json.encode(finding))


def _run(folder: Path, workshop: Workshop) -> str:
    """Run the job in a folder within the limits of time and memory; return why there is no finding, if so."""
    left_s = workshop.budget.left_s()
    failure = workshop.nursery.run(folder, min(workshop.timeout_s, left_s), workshop.memory_bytes)
    if failure and left_s < workshop.timeout_s and workshop.budget.left_s() <= 0:
        return f"stopped after {left_s:.0f} s: {SPENT}"
    if not failure and not (folder / _FINDING).is_file():
        return "its process ended with status 0 and no result"
    return failure


def _usual_s(step: Pass, workshop: Workshop) -> float:
    """Return how long a pass last took, or for how long it ran until it was stopped; 0 when it never ran."""
    known = workshop.store.read(_time_key(step, workshop), _SECONDS)
    return msgspec.json.decode(known, type=float) if known is not None else 0.0


def _remember(step: Pass, workshop: Workshop, seconds: float) -> None:
    workshop.store.write(_time_key(step, workshop), _SECONDS, msgspec.json.encode(seconds))


def _time_key(step: Pass, workshop: Workshop) -> str:
    """Name what the time of a pass follows from, whatever the passes before it: model, samples, host."""
    return key_of("seconds", settings_of(step), step.spec.version, workshop.inputs, workshop.context.host.fingerprint)


def _key(step: Pass, form: Form, workshop: Workshop) -> str:
    """Name a job by everything that its result follows from."""
    spec, host = step.spec, workshop.context.host
    parts = [spec.version, settings_of(step), form.sha256, form.options, host.tools, workshop.inputs]
    if "reference" in spec.needs:
        parts.append(form.reference_sha256)
    # The golden check ran on this host as well, but what it found counts wherever the pass gives the same file.
    parts.append(host.fingerprint if "host" in spec.needs else host.arch)
    return key_of("pass", *parts, workshop.context.seed)


def _read(folder: Path) -> Finding:
    finding = msgspec.json.decode((folder / _FINDING).read_bytes(), type=Finding)
    return msgspec.structs.replace(finding, model=str(folder / _RESULT) if finding.sha256 else "")


def _work(job: _Job, target: Path) -> Finding:
    spec, options = job.step.spec, job.form.options
    source = load_model(job.form.model)
    before = op_counts(source)
    result = job.step.run(source, job.context)
    if not result.changed:
        return Finding(note=result.note, ops_before=before, ops_after=before, options=options)
    require_equivalent(source, result, spec.effect, job.probe.singles, target.parent)
    save_model(result.model, target)
    level = result.options.graph_level if spec.produces == "cpu-build" else options.graph_level
    merged = msgspec.structs.replace(options, config={**options.config, **result.options.config}, graph_level=level)
    sqnr_db = _golden(target, merged, job.probe)
    least = LEAST_SQNR_DB[spec.effect]
    failure = "" if sqnr_db >= least else f"SQNR {sqnr_db:.1f} dB to the original, {spec.effect} needs {least:.0f} dB"
    return Finding(
        failure=failure,
        changed=True,
        sha256="" if failure else joint_digest(files_of(target)),
        counts=result.counts,
        note=result.note,
        options=merged,
        ops_before=before,
        ops_after=op_counts(result.model),
        sqnr_db=sqnr_db,
    )


def _golden(model: Path, options: SessionOptions, probe: Probe) -> float:
    session = Session(model, CPU, options)
    try:
        outputs = run_singly(session, probe.singles)
    finally:
        session.close()
    for name, expected in probe.reference.items():
        if name not in outputs or outputs[name].shape != expected.shape:
            raise PassFailed(f"output '{name}' is missing or has another shape")
    return worst_sqnr_db(probe.reference, outputs)
