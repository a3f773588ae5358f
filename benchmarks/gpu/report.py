"""What the check found, as JSON for machines and Markdown for people."""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.gpu.floor import Ceilings, Work
from benchmarks.gpu.over_http import OverHttp
from benchmarks.gpu.served import DOWN_S, Disturbed, Served
from benchmarks.gpu.tables import Timing
from server.host import HostFacts

FP16_GAIN, MOST_COMPUTE = 2.0, 1.05
"""The bars: FP16 with CUDA graphs against FP32 ``run`` at batch 32, and served compute against the bare session's."""


class Candidate(msgspec.Struct, frozen=True):
    """One optimized form and what its proof said.

    Attributes:
        name: Of the candidate.
        verdict: ``served``, ``proven``, ``refused`` or ``baseline``.
        agreement: With the original on held-out samples; ``None`` when it was never compared.
        reason: Of the verdict.
    """

    name: str
    verdict: str
    agreement: float | None
    reason: str


class ModelResult(msgspec.Struct, frozen=True):
    """Everything about one model."""

    name: str
    origin: str
    work: Work
    candidates: tuple[Candidate, ...]
    timings: tuple[Timing, ...]
    served: Served
    http: OverHttp
    failover: Disturbed | None
    swap: Disturbed

    def ms(self, precision: str, way: str, rows: int) -> float | None:
        """Return a measured time; ``None`` where there is none."""
        found = [t.ms for t in self.timings if (t.precision, t.way, t.rows) == (precision, way, rows) and not t.failure]
        return found[0] if found else None

    @property
    def failures(self) -> Iterator[str]:
        """What must not be."""
        for what, seen in (("fail-over", self.failover), ("swap", self.swap)):
            if seen is not None and seen.failed:
                yield f"{self.name}: {what} lost requests: {seen.failed}"
        if self.failover is not None and not 0 <= self.failover.noticed_s <= DOWN_S:
            yield f"{self.name}: the failing lane was not noticed within a second"
        if self.failover is not None and self.failover.recovered_s < 0:
            yield f"{self.name}: the lane did not come back"
        if self.http.failed or self.http.wrong:
            yield f"{self.name}: over HTTP {self.http.failed} answers failed, {self.http.wrong} are wrong"


class Checked(msgspec.Struct, frozen=True):
    """The whole check.

    Attributes:
        device: Where it ran, e.g. ``cuda:0``.
        host: The machine.
        command: What made it.
        ceilings: Of the device.
        models: The results.
    """

    device: str
    host: HostFacts
    command: str
    ceilings: Ceilings
    models: tuple[ModelResult, ...]

    @property
    def failures(self) -> list[str]:
        """What must not be."""
        return [failure for model in self.models for failure in model.failures]


def write_report(checked: Checked, folder: Path) -> tuple[Path, Path]:
    """Write ``gpu-NAME.json`` and ``gpu-NAME.md``; return both."""
    label = checked.host.gpus[0] if checked.host.gpus and checked.device != "cpu" else checked.device
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    machine, people = folder / f"{name}.json", folder / f"{name}.md"
    machine.write_bytes(msgspec.json.format(msgspec.json.encode(checked), indent=1) + b"\n")
    people.write_text("\n".join(_lines(checked, label)) + "\n", encoding="utf-8")
    return machine, people


def _lines(checked: Checked, label: str) -> Iterator[str]:
    yield f"# {label}"
    yield ""
    yield f"`{checked.command}` on {checked.host.cpu}; " + ", ".join(f"{k} {v}" for k, v in checked.host.tools.items())
    yield ""
    yield "Ceilings measured in the same run: " + ", ".join(
        [f"{name} {flops / 1e12:.2f} TFLOP/s" for name, flops in checked.ceilings.flops_per_s.items()]
        + [f"memory {checked.ceilings.bytes_per_s / 1e9:.0f} GB/s"]
    )
    for model in checked.models:
        yield from _model_lines(model)


def _model_lines(model: ModelResult) -> Iterator[str]:
    yield ""
    yield f"## {model.name} ({model.origin})"
    yield ""
    yield f"{model.work.flops / 1e9:.2f} GFLOP a row, {model.work.weight_bytes / 1e6:.1f} MB of weights in FP32."
    yield ""
    yield "| candidate | verdict | agreement | reason |"
    yield "|---|---|---|---|"
    for candidate in model.candidates:
        agreement = "" if candidate.agreement is None else f"{candidate.agreement:.4f}"
        yield f"| {candidate.name} | {candidate.verdict} | {agreement} | {candidate.reason} |"
    yield ""
    yield "Milliseconds per batch, and the floor that the ceilings set:"
    yield ""
    yield "| precision | way | rows | ms | floor | times the floor |"
    yield "|---|---|---|---|---|---|"
    for t in model.timings:
        if t.failure:
            yield f"| {t.precision} | {t.way} | {t.rows} | {t.failure} | | |"
        else:
            yield f"| {t.precision} | {t.way} | {t.rows} | {t.ms:.3f} | {t.floor_ms:.3f} | {t.ms / t.floor_ms:.1f} |"
    yield ""
    plain, best = model.ms("fp32", "run", 32), model.ms("fp16", "graph", 32)
    if plain is not None and best is not None:
        yield f"FP16 with a CUDA graph against FP32 `run` at batch 32: {plain / best:.2f} times (bar: {FP16_GAIN:g})."
        yield ""
    s, h = model.served, model.http
    yield (
        f"Served in process, 64 clients: {s.rows_per_s:.0f} rows/s by {s.variant} on {s.device}; batches of "
        f"{s.batch_rows} took {s.compute_ms:.3f} ms, {s.compute_ms / s.raw_ms:.3f} of the bare session (bar: "
        f"{MOST_COMPUTE:g})."
    )
    yield ""
    yield (
        f"Over HTTP, 64 connections, binary: {h.requests_per_s:.0f} requests/s, p50 {h.p50_ms:.1f} ms, p99 "
        f"{h.p99_ms:.1f} ms; failed {h.failed}, wrong {h.wrong}."
    )
    yield ""
    if model.failover is None:
        yield "Fail-over: not tried, there is no other lane."
    else:
        f = model.failover
        yield (
            f"Fail-over: {f.requests} requests answered, {sum(f.failed.values())} lost; said to be down after "
            f"{f.noticed_s * 1e3:.0f} ms, back {f.recovered_s:.2f} s after the trouble."
        )
    yield ""
    yield (
        f"Swap of versions: {model.swap.requests} requests answered, {sum(model.swap.failed.values())} lost; "
        f"{model.swap.noticed_s:.1f} s from the load call to the new version."
    )
