"""The report: complete as JSON, self-contained and escaped as HTML."""

from pathlib import Path

import msgspec
import pytest

from optimizers.report import (
    CandidateRecord,
    DataRecord,
    EngineRecord,
    PassRecord,
    Report,
    ServedRecord,
    Speed,
    read_report,
    render_html,
    write_report,
)
from optimizers.search import Gate, ThreadChoice
from server.artifact import Batching, Fidelity, LatencyTable, Source
from server.host import HostFacts

ROWS = (1, 2, 4, 8, 16, 32)


def table(ms: float) -> LatencyTable:
    p50 = tuple(ms * rows**0.95 for rows in ROWS)
    return LatencyTable(
        ROWS, p50, tuple(t * 1.2 for t in p50), tuple(t * 0.97 for t in p50), tuple(t * 1.04 for t in p50)
    )


def speeds(value: float) -> tuple[Speed, ...]:
    return tuple(Speed(rows, value, value - 0.05, value + 0.05, 40, 0.6, "faster") for rows in (1, 8))


def candidate(name: str, verdict: str, reason: str, ms: float, speed: float, agreement: float = 1.0) -> CandidateRecord:
    evidence = (
        None if verdict == "baseline" else Fidelity(512, agreement, agreement - 0.008, "top1", 0.9995, 0.97, 31.2)
    )
    return CandidateRecord(
        name,
        name,
        "cpu",
        1,
        verdict,
        reason,
        90_285_682,
        evidence,
        table(ms),
        (ms,) * 6,
        speeds(speed),
        speeds(speed * 0.7),
    )


@pytest.fixture
def report() -> Report:
    candidates = (
        candidate("original", "baseline", "the file as onnxruntime opens it by default", 9.2, 1.0),
        candidate("original-1thread", "baseline", "the file as the server opens it", 15.1, 0.61),
        candidate("fp32", "served", "exact; 1.02x (1.00-1.03) at batch 1", 14.9, 0.62),
        candidate("int8-dynamic", "served", "faithful, and faster than exact FP32", 6.0, 1.5, 0.996),
        candidate("int8-static", "refused", "agreement 0.941 < 0.99 (n=512, 95 % lower bound 0.917)", 5.5, 1.7, 0.941),
        CandidateRecord("fp16", "fp16", "cpu", 1, "refused", "no <kernel> & no hope"),
    )
    return Report(
        name="minilm",
        version="3",
        headline="int8-dynamic answers 1.53x as fast as the original.",
        chosen="int8-dynamic",
        source=Source("minilm-l6.onnx", "ab" * 32, 90_285_682),
        gate=Gate(),
        recipe={"precisions": ["fp32", "int8"]},
        recipe_sha256="cd" * 32,
        data=DataRecord("texts.npz", 1000, 128, 512, True, "ef" * 32),
        batching=Batching(True, "batches of 32 answer as single requests do (131 dB, 512 samples)"),
        passes=(
            PassRecord(
                "simplify", 1, "exact", "applied", "", 1.5, {}, {"Erf": 6, "Add": 9}, {"Gelu": 6, "Add": 3}, 131.0
            ),
            PassRecord("fp16", 1, "tolerance", "refused", "no <kernel> & no hope", 0.3, {}, {"Erf": 6}),
        ),
        candidates=candidates,
        served=(
            ServedRecord("original", 0, True, table(9.2), (18.4,) * 6, ()),
            ServedRecord("int8-dynamic", 1, True, table(6.0), (6.1,) * 6, speeds(1.5)),
            ServedRecord("int8-dynamic", 2, False, table(4.0), (8.1,) * 6, speeds(2.2)),
        ),
        threads=(ThreadChoice("int8-dynamic", 1, "1 thread: 2 threads cost 1.33x, more than 1.25x"),),
        engines=(EngineRecord("refused", "no TensorRT is installed"),),
        host=HostFacts("AMD EPYC", ("avx2", "avx512_vnni"), 2, (), {"onnxruntime": "1.32.0"}),
        command="slipstream optimize minilm-l6.onnx --repository models --name minilm --calibration texts.npz",
        seconds=48.0,
        written="2026-01-01T00:00:00Z",
    )


def test_json_holds_everything(report: Report, tmp_path: Path):
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes())["candidates"][3]["against_original"][0][
        "verdict"
    ]


def test_html_is_self_contained(report: Report):
    page = render_html(report)
    assert page.count("<svg") == 2
    for outside in ("http://", "https://", "src=", "<script", "@import", "url(http"):
        assert outside not in page.replace("http://www.w3.org/", ""), outside


def test_html_names_every_candidate_its_verdict_and_reason(report: Report):
    page = render_html(report)
    for record in report.candidates:
        assert record.name in page
    assert "agreement 0.941 &lt; 0.99 (n=512, 95 % lower bound 0.917)" in page
    assert "int8-dynamic answers 1.53x as fast as the original." in page
    assert "slipstream optimize minilm-l6.onnx" in page


def test_html_escapes_what_it_did_not_write(report: Report):
    page = render_html(msgspec.structs.replace(report, headline="<script>alert(1)</script>"))
    assert "<script>" not in page
    assert "no &lt;kernel&gt; &amp; no hope" in page


def test_plots_follow_the_colours_of_the_page(report: Report):
    page = render_html(report)
    assert "currentColor" in page
    assert "#123456" not in page


def test_html_of_a_model_that_is_never_batched_and_has_one_candidate(report: Report):
    one = LatencyTable((1,), (1.0,), (1.2,), (0.9,), (1.1,))
    alone = msgspec.structs.replace(
        report.candidates[0], latency=one, cpu_ms=(1.0,), against_original=(), against_exact=()
    )
    bare = msgspec.structs.replace(report, candidates=(alone,), served=(), passes=(), engines=(), threads=())
    assert "<svg" in render_html(bare)
