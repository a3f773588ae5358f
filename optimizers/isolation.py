"""Runs one pass in a process of its own, so that a crash, a hang or an exception of a third-party tool is a refusal.

The child loads the model, runs the pass, requires its result to be as near to its input as the pass's effect promises,
and compares it, opened as the server opens it, with the original's outputs on a few samples. Parent and child share a
folder: what a job needs goes in as files, a ``Finding`` comes back as JSON and the new model as a file. Nothing of the
pass's process survives it.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from optimizers.errors import PassFailed
from optimizers.evidence import run_singly
from optimizers.fidelity import worst_sqnr_db
from optimizers.graph import load_model, op_counts, save_model
from optimizers.passes import Pass, PassContext
from optimizers.passes.check import require_equivalent
from server.artifact import SessionOptions
from server.providers import CPU
from server.session import Session
from server.tensors import Tensors

# Least SQNR in decibel of a pass's result against the original. FP32 rounding stays far above 60; a lossy pass is
# judged on all held-out samples later, so that only garbage is stopped here.
LEAST_SQNR_DB = {"exact": 60.0, "tolerance": 30.0, "lossy": 0.0}

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from optimizers.isolation import main; main(sys.argv[2])"
)
_JOB, _FINDING, _RESULT = "job.pickle", "finding.json", "model.onnx"


class Probe(msgspec.Struct, frozen=True):
    """A few requests and the original's answers: the golden check after every pass."""

    singles: tuple[Tensors, ...]
    reference: Tensors


class Finding(msgspec.Struct, frozen=True):
    """What became of a pass.

    Attributes:
        failure: Why its result must not be used; empty when it may.
        model: The resulting file; the pass's input when it failed or changed nothing.
        changed: Whether the pass changed the model.
        counts: What was fused, removed or converted.
        note: The pass's own remark.
        options: How sessions of the result must be opened.
        ops_before: Node count per operator before, and ``ops_after`` after the pass.
        sqnr_db: The result against the original on the probe.
    """

    failure: str = ""
    model: str = ""
    changed: bool = False
    counts: dict[str, int] = {}
    note: str = ""
    options: SessionOptions = SessionOptions()
    ops_before: dict[str, int] = {}
    ops_after: dict[str, int] = {}
    sqnr_db: float | None = None
    seconds: float = 0.0


class Workshop(msgspec.Struct, frozen=True):
    """Where jobs run.

    Attributes:
        folder: Each pass gets a folder of its own below it.
        context: What passes may use.
        probe: The golden check.
        timeout_s: Seconds after which a pass is stopped.
    """

    folder: Path
    context: PassContext
    probe: Probe
    timeout_s: float = 600.0


def run_isolated(step: Pass, model: Path, workshop: Workshop, options: SessionOptions) -> Finding:
    """Run a pass on a model file in a child process and wait for it; never raises for what the pass does.

    Args:
        step: The pass; it must be picklable by name.
        model: Its input, left as it is.
        workshop: Folder, context, golden check and time limit.
        options: How sessions of the input are opened; the pass may add to them.
    """
    workshop.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{step.spec.name}-", dir=workshop.folder))
    (folder / _JOB).write_bytes(pickle.dumps((step, model, workshop, options)))
    start = time.monotonic()
    failure = _spawn(folder, workshop.timeout_s)
    seconds = time.monotonic() - start
    if failure:
        return Finding(failure=failure, model=str(model), seconds=seconds)
    finding = msgspec.json.decode((folder / _FINDING).read_bytes(), type=Finding)
    return msgspec.structs.replace(finding, seconds=seconds)


def main(folder: str) -> None:
    """Run the job in a folder; the child's side of ``run_isolated``."""
    place = Path(folder)
    step, model, workshop, options = pickle.loads((place / _JOB).read_bytes())  # noqa: S301  (our own file)
    try:
        finding = _work(step, model, workshop, options, place / _RESULT)
    except PassFailed as exc:
        finding = Finding(failure=str(exc), model=str(model))
    except Exception as exc:  # noqa: BLE001  (the stage's isolation: any failure of a pass is a refusal with its reason)
        text = str(exc).strip().splitlines()
        finding = Finding(failure=f"{type(exc).__name__}: {text[0] if text else 'no message'}", model=str(model))
    (place / _FINDING).write_bytes(msgspec.json.encode(finding))


def _spawn(folder: Path, timeout_s: float) -> str:
    """Run the child; return why it ended badly, or nothing."""
    command = [sys.executable, "-c", _START, json.dumps(sys.path), str(folder)]
    with (folder / "log.txt").open("wb") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=log, timeout=timeout_s, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout_s:g} s without a result"
    if status == 0 and (folder / _FINDING).is_file():
        return ""
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"its process {ended}" + (f": {lines[-1]}" if lines else "")


def _work(step: Pass, model: Path, workshop: Workshop, options: SessionOptions, target: Path) -> Finding:
    source = load_model(model)
    before = op_counts(source)
    result = step.run(source, workshop.context)
    if not result.changed:
        return Finding(model=str(model), note=result.note, ops_before=before, ops_after=before, options=options)
    require_equivalent(source, result, step.spec.effect, workshop.probe.singles, target.parent)
    save_model(result.model, target)
    merged = msgspec.structs.replace(options, config={**options.config, **result.options.config})
    sqnr_db = _golden(target, merged, workshop.probe)
    least = LEAST_SQNR_DB[step.spec.effect]
    return Finding(
        failure=""
        if sqnr_db >= least
        else f"SQNR {sqnr_db:.1f} dB to the original, {step.spec.effect} needs {least:.0f} dB",
        model=str(target if sqnr_db >= least else model),
        changed=True,
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
