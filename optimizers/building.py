"""Builds the candidates: the exact passes one after another, then one lossy pass per precision on their result.

Every pass runs isolated and is rolled back on failure: the next one continues with the last good model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from optimizers.isolation import Finding, Workshop, run_isolated
from optimizers.passes import Pass
from optimizers.report import PassRecord
from server.artifact import SessionOptions
from server.providers import Kind

SERVING = SessionOptions(intra_op_threads=1, spinning=False, graph_level="all")
"""How candidates are opened, as the server does: one thread, which never spins."""


class Built(msgspec.Struct, frozen=True):
    """One candidate as a file.

    Attributes:
        name: The candidate's name, unique.
        precision: ``fp32``, ``fp16``, ``int8-dynamic``, ``int8-static``.
        provider: ``cpu`` or ``cuda``.
        exact: Whether it keeps FP32 arithmetic.
        model: The file.
        options: How to open it, threads aside.
        failure: Why it does not exist; empty when it does.
    """

    name: str
    precision: str
    provider: Kind
    exact: bool
    model: Path
    options: SessionOptions = SERVING
    failure: str = ""

    @property
    def size_bytes(self) -> int:
        """Size of the file; 0 when there is none."""
        return 0 if self.failure else self.model.stat().st_size


class Plan(msgspec.Struct, frozen=True):
    """Which passes make which candidates.

    Attributes:
        exact: Passes that lead to FP32, in order.
        lossy: Precision -> pass, each applied to the FP32 result.
        devices: ``cpu``, and ``cuda`` where it works.
        no_proof: Why no lossy variant can be proven, so that none is tried; empty when it can.
    """

    exact: tuple[Pass, ...]
    lossy: dict[str, Pass]
    devices: tuple[str, ...]
    no_proof: str


def build(
    source: Path, plan: Plan, workshop: Workshop, observe: Callable[[str, float], None]
) -> tuple[list[Built], list[PassRecord]]:
    """Run all passes; return the candidates and what each pass did.

    Args:
        source: The original as one file.
        plan: The passes.
        workshop: Where and with what they run.
        observe: Told about progress.
    """
    records: list[PassRecord] = []
    total = len(plan.exact) + len(plan.lossy)

    def run(step: Pass, model: Path, options: SessionOptions) -> Finding:
        observe(f"pass {step.spec.name}", len(records) / total)
        finding = run_isolated(step, model, workshop, options)
        records.append(_record(step, finding))
        return finding

    model, options = source, SERVING
    for step in plan.exact:
        finding = run(step, model, options)
        if not finding.failure:
            model, options = Path(finding.model), finding.options
    built = [Built("fp32", "fp32", "cpu", exact=True, model=model, options=options)]
    for precision, step in plan.lossy.items():
        if plan.no_proof:
            records.append(
                PassRecord(step.spec.name, step.spec.version, step.spec.effect, "refused", plan.no_proof, 0.0)
            )
            built.append(Built(precision, precision, "cpu", exact=False, model=model, failure=plan.no_proof))
            continue
        finding = run(step, model, options)
        built.append(_candidate(precision, finding))
    return [*built, *_on_gpu(built, plan.devices)], records


def _candidate(precision: str, finding: Finding) -> Built:
    failure = finding.failure or ("" if finding.changed else f"nothing to convert: {finding.note}")
    return Built(
        precision, precision, "cpu", exact=False, model=Path(finding.model), options=finding.options, failure=failure
    )


def _on_gpu(built: Sequence[Built], devices: Sequence[str]) -> list[Built]:
    """Repeat FP32 and FP16 for the GPU; CUDA has no INT8 kernels, there INT8 needs TensorRT."""
    return [
        msgspec.structs.replace(b, name=f"{b.name}-cuda", provider="cuda")
        for b in built
        if "cuda" in devices and b.precision in ("fp32", "fp16")
    ]


def _record(step: Pass, finding: Finding) -> PassRecord:
    status = "refused" if finding.failure else "applied" if finding.changed else "unchanged"
    return PassRecord(
        name=step.spec.name,
        version=step.spec.version,
        effect=step.spec.effect,
        status=status,
        reason=finding.failure or finding.note,
        seconds=finding.seconds,
        counts=finding.counts,
        ops_before=finding.ops_before,
        ops_after=finding.ops_after,
        sqnr_db=finding.sqnr_db,
    )
