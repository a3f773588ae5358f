"""Builds candidates: each is a chain of passes, from the original to a form that may be served.

Every pass runs isolated and golden-checked. A chain whose pass fails ends there, with that reason; the exact passes are
built one by one by whoever decides which of them to keep. Chains that begin alike share that work, in this run through
the forms that were made already, and between runs through the store.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from optimizers.isolation import Finding, Form, Workshop, run_isolated
from optimizers.passes import Pass
from optimizers.passes.catalog import label_of, settings_of
from optimizers.records import PassRecord, Speed
from server.artifact import SessionOptions
from server.providers import Kind

Chain = tuple[Pass, ...]
"""Passes in their order."""


class Built(msgspec.Struct, frozen=True):
    """One candidate as a file.

    Attributes:
        name: The candidate's name, unique.
        precision: ``fp32``, ``fp16``, ``int8-dynamic``, ``int8-static``, ...
        provider: ``cpu`` or ``cuda``.
        exact: Whether it keeps FP32 arithmetic and all weights.
        form: The model, and how to open it, threads aside.
        chain: The passes that made it.
        failure: Why it does not exist; empty when it does.
        host_bound: Whether it holds operators that are made for this kind of CPU only.
    """

    name: str
    precision: str
    provider: Kind
    exact: bool
    form: Form
    chain: Chain = ()
    failure: str = ""
    host_bound: bool = False

    @property
    def model(self) -> Path:
        """The file."""
        return self.form.model

    @property
    def options(self) -> SessionOptions:
        """How to open it, threads aside."""
        return self.form.options

    @property
    def size_bytes(self) -> int:
        """Size of its files; 0 when there are none."""
        weights = self.model.with_name(f"{self.model.name}.data")  # where ``save_model`` puts those beyond 2 GB
        return 0 if self.failure else sum(file.stat().st_size for file in (self.model, weights) if file.is_file())

    @property
    def passes(self) -> tuple[str, ...]:
        """The chain as people write it."""
        return tuple(label_of(step) for step in self.chain)


class Line:
    """Runs chains of passes on one original.

    Args:
        original: The original.
        workshop: Where and with what passes run.

    Attributes:
        original: As given.
        records: What each pass did, in the order of their first run.
    """

    def __init__(self, original: Form, workshop: Workshop) -> None:
        self.original = original
        self.records: list[PassRecord] = []
        self._workshop = workshop
        self._made: dict[bytes, tuple[Form, Finding]] = {}

    def build(self, name: str, chain: Chain, precision: str, *, exact: bool = False) -> Built:
        """Build a candidate for the CPU; it carries a failure when one of its passes fails or changes nothing."""
        form = self.original
        for index, step in enumerate(chain):
            made, finding = self.apply(chain[:index], form, step)
            failure = finding.failure
            if not failure and not finding.changed and step.spec.effect == "lossy":
                failure = f"nothing to convert: {finding.note}"
            if failure:
                label = label_of(step)
                reason = failure if index == len(chain) - 1 else f"{label}: {failure}"
                return Built(name, precision, "cpu", exact, form, chain, reason)
            form = made
        bound = any(step.spec.produces == "cpu-build" for step in chain)
        return Built(name, precision, "cpu", exact, form, chain, host_bound=bound)

    def apply(self, before: Chain, form: Form, step: Pass) -> tuple[Form, Finding]:
        """Run one pass on a form; return its result, or the form itself when it failed or changed nothing.

        Args:
            before: The passes that made the form.
            form: What to run it on.
            step: The pass.
        """
        key = msgspec.json.encode([settings_of(done) for done in (*before, step)])
        if key not in self._made:
            finding = run_isolated(step, form, self._workshop)
            self.records.append(_record(before, step, finding))
            self._made[key] = (_result(form, step, finding), finding)
        return self._made[key]

    def annotate(
        self, step: Pass, before: Chain, speed: tuple[Speed, ...], left_out: str, status: str = "slower"
    ) -> None:
        """Add to the record of a pass how fast its result is, and why it was left out, if it was."""
        name, after = label_of(step), tuple(label_of(done) for done in before)
        for index, record in enumerate(self.records):
            if (record.name, record.after) == (name, after):
                changes: dict[str, Any] = {"status": status, "reason": left_out} if left_out else {}
                self.records[index] = msgspec.structs.replace(record, speed=speed, **changes)


def on_gpu(built: Sequence[Built], devices: Sequence[str]) -> list[Built]:
    """Repeat FP32, FP16 and BF16 for the GPU; CUDA has no INT8 kernels, there INT8 needs TensorRT."""
    return [
        msgspec.structs.replace(b, name=f"{b.name}-cuda", provider="cuda")
        for b in built
        if "cuda" in devices and b.precision in ("fp32", "fp16", "bf16") and not b.host_bound
    ]


def _result(form: Form, step: Pass, finding: Finding) -> Form:
    if finding.failure or not finding.changed:
        return form
    is_quantized = step.spec.produces != "fp32"
    reference, digest = form.reference, form.reference_sha256
    if is_quantized and reference is None:
        reference, digest = form.model, form.sha256
    return Form(Path(finding.model), finding.sha256, finding.options, reference, digest)


def _record(before: Chain, step: Pass, finding: Finding) -> PassRecord:
    spec = step.spec
    status = "refused" if finding.failure else "applied" if finding.changed else "unchanged"
    return PassRecord(
        name=label_of(step),
        version=spec.version,
        effect=spec.effect,
        status=status,
        reason=finding.failure or finding.note,
        seconds=finding.seconds,
        after=tuple(label_of(done) for done in before),
        cached=finding.cached,
        counts=finding.counts,
        ops_before=finding.ops_before,
        ops_after=finding.ops_after,
        sqnr_db=finding.sqnr_db,
    )
