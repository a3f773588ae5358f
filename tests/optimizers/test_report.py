"""The report: complete as JSON; as HTML self-contained, escaped, and with every answer in its place."""

import itertools
import math
import re
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from optimizers.pareto import standing_of
from optimizers.plots import colours_of, latency_plot, points_of, trade_off_plot
from optimizers.ranking import MOST_LAYERS, kept_layers, ranking
from optimizers.recipe import Recipe, VariantPlan, write_recipe
from optimizers.report import (
    CandidateRecord,
    DataRecord,
    EngineRecord,
    PassRecord,
    Report,
    ServedRecord,
    Speed,
    StepRecord,
    mean_of,
    read_report,
    render_html,
    replay_command,
    write_report,
)
from optimizers.search import Gate, KnobChoice, Knobs
from optimizers.sensitivity import LayerSensitivity
from optimizers.waterfall import served_record, waterfall
from server.artifact import Batching, Fidelity, LatencyTable, Padding, Slice, Source
from server.host import HostFacts

ROWS = (1, 2, 4, 8, 16, 32)
BASE = ("sanitize", "fusion")
STATIC = (*BASE, "smoothquant", "int8-static(keep=[2])", "bias-correction")
HOSTILE = "<script>alert('$x^{')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Parses a page into a tree; a tag that is not closed in order fails."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tree = ElementTree.TreeBuilder()
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        self.root = self.tree.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {key: value or "" for key, value in attrs})
        if tag in VOID:
            self.tree.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()
        self.tree.end(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {key: value or "" for key, value in attrs})
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.tree.data(data)


def words(element: ElementTree.Element) -> str:
    return re.sub(r" ([:;,])", r"\1", " ".join(" ".join(element.itertext()).split()))


@lru_cache
def _parsed(encoded: bytes) -> ElementTree.Element:
    return Page(render_html(msgspec.json.decode(encoded, type=Report))).root


def parsed(report: Report) -> ElementTree.Element:
    """Render and parse; equal reports once, since plots take a while."""
    return _parsed(msgspec.json.encode(report))


def section(report: Report, name: str) -> ElementTree.Element:
    """Return everything between a heading and the next one."""
    body = parsed(report).find("body")
    assert body is not None
    found = ElementTree.Element("section")
    inside = False
    for element in body:
        if element.tag == "h2":
            inside = element.get("id") == name
        if inside:
            found.append(element)
    assert len(found), name
    return found


def rows_of(report: Report, name: str, table: int = 0) -> list[list[str]]:
    """Return the cells of a table of a section, without its head."""
    found = list(section(report, name).iter("table"))[table]
    return [[words(cell) for cell in row.findall("td")] for body in found.iter("tbody") for row in body.findall("tr")]


def candidate_rows(report: Report) -> dict[str, ElementTree.Element]:
    """Return the table body of each candidate."""
    table = next(section(report, "candidates").iter("table"))
    bodies = table.findall("tbody")
    return {words(next(body.iter("td"))).split(" ")[0]: body for body in bodies}


def table(ms: float, rows: tuple[int, ...] = ROWS) -> LatencyTable:
    p50 = tuple(ms * r**0.9 for r in rows)
    return LatencyTable(
        rows, p50, tuple(t * 1.2 for t in p50), tuple(t * 0.97 for t in p50), tuple(t * 1.04 for t in p50)
    )


def speeds(value: float) -> tuple[Speed, ...]:
    verdict = "faster" if value - 0.05 > 1 else "slower" if value + 0.05 < 1 else "indistinguishable"
    return tuple(Speed(rows, value, value - 0.05, value + 0.05, 40, 0.6, verdict) for rows in (1, 8))


def evidence(agreement: float, samples: int = 512) -> Fidelity:
    return Fidelity(
        samples, agreement, agreement - 0.008, "top1", 0.9995, 0.97, 31.2, 0.913, 0.915,
        top5_agreement=0.998, kl=0.00123, sqnr_by_output={"logits": 31.2, "box": 44.0},
        worst_slice=Slice("class 3", 40, 0.925, 0.8), cosine_low=0.9994, accuracy_drop_high=0.0123,
        accuracy_difference_low=-0.0117,
    )  # fmt: skip


def candidate(name: str, verdict: str, ms: float | None, **fields: object) -> CandidateRecord:
    """A candidate that ran in the latency race if it has a time."""
    fidelity = fields.get("fidelity")
    latency = fields.pop("latency", table(ms) if ms is not None else None)
    full = isinstance(latency, LatencyTable) and latency.rows == ROWS and name != "original"
    agreement = fidelity.agreement if isinstance(fidelity, Fidelity) else 1.0
    known: dict[str, object] = {
        "precision": "fp32",
        "provider": "cpu",
        "threads": 0 if name == "original" else 1,
        "reason": f"why {name} is {verdict}",
        "size_bytes": 90_285_682,
        "latency": latency,
        "cpu_ms": (ms,) * len(latency.rows) if isinstance(latency, LatencyTable) else (),
        "standing": standing_of(name, latency, 90_285_682, agreement, 200_000_000) if full else None,
        "placement": {"CPUExecutionProvider": {"Conv": 5, "Relu": 2}} if full else {},
    }
    return CandidateRecord(name=name, verdict=verdict, **{**known, **fields})


def applied(name: str, after: tuple[str, ...], effect: str, **fields: object) -> PassRecord:
    known = {"version": 1, "status": "applied", "reason": f"note of {name}", "seconds": 1.5}
    return PassRecord(name=name, effect=effect, after=after, **{**known, **fields})


PASSES = (
    applied("sanitize", (), "exact", speed=speeds(1.0), sqnr_db=200.0),
    applied("simplify", ("sanitize",), "exact", status="slower", reason="left out: slower", speed=speeds(0.8)),
    applied(
        "fusion", ("sanitize",), "tolerance", speed=speeds(1.25), sqnr_db=131.0,
        counts={"gelu": 6}, ops_before={"Erf": 6, "Add": 9}, ops_after={"Gelu": 6, "Add": 3},
    ),
    applied("smoothquant", BASE, "tolerance", sqnr_db=120.0, cached=True),
    applied("int8-static(keep=[2])", BASE, "lossy", sqnr_db=9.0),
    applied("int8-static(keep=[2])", STATIC[:3], "lossy", sqnr_db=28.0),
    applied("bias-correction", STATIC[:4], "lossy", sqnr_db=30.0),
    applied("fp16", BASE, "lossy", status="refused", reason="no <kernel> & no hope"),
)  # fmt: skip

CANDIDATES = (
    candidate("original", "baseline", 9.2),
    candidate("original-1thread", "baseline", 15.0, against_original=speeds(0.61), pareto=True),
    candidate(
        "fp32", "served", 12.0, passes=BASE, fidelity=evidence(1.0), against_original=speeds(0.75),
        against_exact=speeds(1.25),
    ),
    candidate(
        "int8-static", "served", 6.0, passes=STATIC, precision="int8-static", fidelity=evidence(0.996),
        against_original=speeds(1.5), against_exact=speeds(1.9), pareto=True,
        placement={"CUDAExecutionProvider": {"Conv": 4}, "CPUExecutionProvider": {"Reshape": 1, "Softmax": 2}},
    ),
    candidate(
        "int8-weights", "proven", 8.0, passes=(*BASE, "weight-only"), precision="int8-weights",
        fidelity=evidence(0.994), against_exact=speeds(1.4),
    ),
    candidate(
        "int4-weights", "refused", 5.0, passes=(*BASE, "weight-only(bits=4)"), fidelity=evidence(0.941),
        latency=table(5.0, (1, 8)), reason="agreement 0.941 < 0.99 (n=512)",
    ),
    candidate("int8-dynamic", "refused", None, passes=(*BASE, "int8-dynamic"), search_fidelity=evidence(0.9, 128)),
    candidate("fp16", "refused", None, passes=(*BASE, "fp16"), reason="no <kernel> & no hope", size_bytes=0),
)  # fmt: skip


def layers(count: int) -> tuple[LayerSensitivity, ...]:
    return tuple(LayerSensitivity(f"/block.{i}/Conv", "Conv", 100, 10.0 ** -(1 + i / 10), 1.0) for i in range(count))


@pytest.fixture
def report() -> Report:
    plan = VariantPlan(
        "int8-static",
        "int8-static",
        (
            {"pass": "sanitize"},
            {"pass": "fusion"},
            {"pass": "smoothquant"},
            {"pass": "int8-static", "keep": ["/block.0/Conv", "/block.29/Conv"]},
            {"pass": "bias-correction"},
        ),
    )
    reason = "1 thread chosen; 2 threads: 1.05x, slower"
    return Report(
        name="minilm",
        version="3",
        headline="int8-static answers 1.53x as fast as the original.",
        chosen="int8-static",
        source=Source("minilm-l6.onnx", "ab" * 32, 90_285_682),
        gate=Gate(),
        recipe=msgspec.json.decode(msgspec.json.encode(Recipe())),
        recipe_sha256="cd" * 32,
        data=DataRecord("texts.npz", 1000, 128, 128, 512, True, "ef" * 32),
        batching=Batching(True, "batches of 32 answer as single requests do (131 dB, 512 samples)"),
        padding=Padding(True, "padded answers agree (88 dB)", {"ids": 1}, {"tokens": 2}, 7),
        policy="the fastest of the faithful candidates",
        promise="",
        passes=PASSES,
        steps=(
            StepRecord("int8-static", "tried", "agreement 0.900", 5.9),
            StepRecord("int8-static + bias-correction", "kept", "error changes by -9.0 %", 4.25),
        ),
        sensitivity={"int8-static": layers(30), "int8-dynamic": layers(3)},
        candidates=CANDIDATES,
        served=(
            ServedRecord("original", "original", "onnxruntime's defaults", table(9.2), (18.4,) * 6, ()),
            ServedRecord("int8-static", "int8-static", "2 threads", table(4.0), (8.1,) * 6, speeds(2.2)),
            ServedRecord("fp32", "fp32", "1 thread", table(12.0), (12.0,) * 6, speeds(0.75)),
        ),
        knobs=(KnobChoice("int8-static", Knobs(2), reason),),
        engines=(EngineRecord("refused", "no TensorRT is installed", {"version": "none"}),),
        host=HostFacts("AMD EPYC", ("avx2", "avx512_vnni"), 2, (), {"onnxruntime": "1.32.0"}),
        command="slipstream optimize minilm-l6.onnx --repository models --name minilm --calibration texts.npz",
        replay=write_recipe(Recipe(variants=(plan,))),
        seconds=48.0,
        written="2026-01-01T00:00:00Z",
    )


def changed(report: Report, name: str, /, **fields: object) -> Report:
    """Replace fields of one candidate."""
    records = tuple(msgspec.structs.replace(c, **fields) if c.name == name else c for c in report.candidates)
    return msgspec.structs.replace(report, candidates=records)


def named(report: Report, name: str) -> CandidateRecord:
    return next(c for c in report.candidates if c.name == name)


def test_json_holds_everything(report: Report, tmp_path: Path):
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    plain = msgspec.json.decode((tmp_path / "report.json").read_bytes())
    assert plain["candidates"][3]["against_original"][0]["verdict"] == "faster"
    assert plain["steps"][1]["outcome"] == "kept"
    assert plain["passes"][3]["after"] == list(BASE)


def test_report_with_an_error_beyond_all_bounds_is_read_back(report: Report, tmp_path: Path):
    endless = (LayerSensitivity("/worst", "Conv", 10, math.inf, math.inf), *layers(2))
    write_report(msgspec.structs.replace(report, sensitivity={"int8-static": endless}), tmp_path)
    again = read_report(tmp_path)
    found = ranking(again, "int8-static").bars
    assert [bar.comparable for bar in found] == [False, True, True]
    assert found[0].width == 100
    assert rows_of(again, "sensitivity")[0][4] == "not comparable"


def test_html_is_self_contained(report: Report):
    page = render_html(report)
    for outside in ("http://", "https://", "src=", "<script", "<link", "<iframe", "@import", "url(http", "//cdn"):
        assert outside not in page.replace("http://www.w3.org/", ""), outside
    assert page.count("<svg") == 3


def test_html_is_well_formed_and_its_links_lead_somewhere(report: Report):
    root = parsed(report)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    targets = [link.get("href", "") for link in root.iter("a")]
    assert len(targets) >= 10
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_the_facts_come_first(report: Report):
    root = parsed(report)
    facts = next(element for element in root.iter("dl") if element.get("id") == "facts")
    seen = words(facts)
    for part in (
        "the fastest of the faithful candidates",
        "at least 0.99",
        "512 held-out samples are enough: without a miss they show an agreement of at least 0.9926",
        "128 search samples",
        "batches of 32 answer as single requests do",
        "AMD EPYC",
    ):
        assert part in seen, part


def test_samples_that_cannot_show_the_promise_are_a_warning(report: Report):
    root = parsed(msgspec.structs.replace(report, promise="64 samples prove too little"))
    warned = [words(e) for e in root.iter("span") if e.get("class") == "warning"]
    assert warned == ["64 samples prove too little"]


def test_each_candidate_stands_with_its_verdict_numbers_and_reason(report: Report):
    bodies = candidate_rows(report)
    assert set(bodies) == {c.name for c in report.candidates}
    for record in report.candidates:
        seen = words(bodies[record.name])
        assert record.verdict in seen
        assert record.reason in seen
    chosen = words(bodies["int8-static"])
    for number in (
        "0.9960", "0.9880", "0.9980", "KL 0.0012", "0.99950", "0.97000", "31.2 dB", "worst of 2 outputs",
        "0.9250", "class 3", "n=40", "0.9130", "of 0.9150", "drop ≤ 0.0123", "-0.0020, at least -0.0117",
        "90.3 MB", "200.0 MB", "6.00", "38.99",
        "1.90x", "1.85-1.95 at 8", "smoothquant → int8-static(keep=[2]) → bias-correction", "first choice", "Pareto",
    ):  # fmt: skip
        assert number in chosen, number


def test_the_first_choice_comes_first_and_what_was_never_measured_last(report: Report):
    assert list(candidate_rows(report)) == [
        "int8-static", "fp32", "int8-weights", "original", "original-1thread", "int4-weights", "int8-dynamic", "fp16",
    ]  # fmt: skip


def test_evidence_from_search_samples_is_told_apart(report: Report):
    bodies = candidate_rows(report)
    hints = {name: [c for c in body.iter("td") if "hint" in c.get("class", "")] for name, body in bodies.items()}
    assert {name for name, cells in hints.items() if cells} == {"int8-dynamic"}
    assert len(hints["int8-dynamic"]) == 6
    assert "0.9000" in words(hints["int8-dynamic"][0])
    assert "search, n=128" in words(hints["int8-dynamic"][0])


def test_held_out_evidence_wins_over_the_search(report: Report):
    both = changed(report, "int8-static", search_fidelity=evidence(0.7777, 128))
    assert "0.7777" not in words(section(both, "candidates"))


@pytest.mark.parametrize("labels", [True, False])
def test_columns_of_accuracy_appear_with_a_metric_only(report: Report, labels: bool):
    silent = report
    for record in report.candidates:
        for field in ("fidelity", "search_fidelity"):
            found = getattr(record, field)
            if found is not None and not labels:
                without = msgspec.structs.replace(found, accuracy=None, accuracy_original=None, accuracy_drop_high=None)
                silent = changed(silent, record.name, **{field: without})
    head = words(next(section(silent, "candidates").iter("thead")))
    assert ("accuracy" in head) is labels
    body = candidate_rows(silent)["int8-static"]
    columns = len(next(section(silent, "candidates").iter("thead")).findall("tr/th"))
    assert len(body.findall("tr")[0]) == columns
    assert [int(cell.get("colspan", "1")) for cell in body.findall("tr")[1]] == [columns]
    assert "0.9130" in words(body) or not labels


def test_the_untouched_file_served_as_fp32_is_marked_and_not_the_refused_fp32(report: Report):
    served = changed(changed(report, "original-1thread", verdict="served"), "fp32", verdict="refused")
    records = [
        msgspec.structs.replace(r, candidate="original-1thread") if r.variant == "fp32" else r for r in report.served
    ]
    served = msgspec.structs.replace(
        changed(served, "int8-static", verdict="refused"), chosen="fp32", served=tuple(records)
    )
    found = served_record(served, "fp32")
    assert found is not None
    assert found.name == "original-1thread"
    marked = {name for name, body in candidate_rows(served).items() if body.get("class") == "chosen"}
    assert marked == {"original-1thread"}


def test_html_escapes_what_it_did_not_write(report: Report):
    hostile = msgspec.structs.replace(
        changed(report, "int8-static", name=HOSTILE, reason=HOSTILE, placement={HOSTILE: {HOSTILE: 2}}),
        name=HOSTILE,
        headline=HOSTILE,
        chosen=HOSTILE,
        command=HOSTILE,
        replay=f"# {HOSTILE}\n",
        policy=HOSTILE,
        promise=HOSTILE,
        steps=(StepRecord(HOSTILE, "kept", HOSTILE, 1.0),),
        sensitivity={HOSTILE: (LayerSensitivity(HOSTILE, HOSTILE, 1, 0.1, 0.1),)},
        recipe={HOSTILE: HOSTILE},
        padding=Padding(True, HOSTILE, {HOSTILE: 1}, {HOSTILE: 1}),
    )
    page = render_html(hostile)
    assert "<script" not in page
    assert "no &lt;kernel&gt; &amp; no hope" in page
    seen = Page(page).root
    assert HOSTILE in "".join("".join(e.itertext()) for e in seen.iter("text")), "the plot does not name its point"


def test_names_in_plots_are_no_formulas_and_need_no_font(report: Report):
    odd = changed(report, "int8-static", name="模型 $\\frac{$")
    assert "模型 $\\frac{$" in trade_off_plot(odd, "p99")


def test_plots_follow_the_colours_of_the_page(report: Report):
    for plot in (latency_plot(report), trade_off_plot(report, "p99"), trade_off_plot(report, "throughput")):
        assert "currentColor" in plot
        assert "#123456" not in plot
        assert "DejaVu" not in plot


def test_measured_candidates_have_colours_of_their_own(report: Report):
    colours = colours_of(report)
    drawn = [colours[c.name] for c in report.candidates if c.latency is not None]
    assert len(set(drawn)) == len(drawn) == 6
    assert colours["fp16"] not in drawn


def test_trade_off_shows_who_is_pareto_dominated_or_unfaithful(report: Report):
    kinds = {point.name: point.kind for point in points_of(report, "p99")}
    assert kinds == {
        "original": "reference",
        "original-1thread": "pareto",
        "fp32": "dominated",
        "int8-static": "pareto",
        "int8-weights": "dominated",
        "int4-weights": "unfaithful",
    }
    by_name = {point.name: point for point in points_of(report, "p99")}
    assert by_name["int4-weights"].x == pytest.approx(6.0)  # p99 of one row from its short race
    assert (by_name["int8-static"].agreement, by_name["int8-static"].low) == (0.996, 0.988)


def test_trade_off_of_throughput_leaves_out_who_was_not_raced_at_every_size(report: Report):
    found = {point.name: point.x for point in points_of(report, "throughput")}
    assert set(found) == {"original-1thread", "fp32", "int8-static", "int8-weights"}
    assert found["int8-static"] == pytest.approx(32 / table(6.0).p50_ms[-1] * 1e3)


def marks(plot: str, colour: str) -> list[str]:
    """Return how the markers of a colour are filled."""
    uses = [e for e in Page(plot).root.iter("use") if f"stroke: {colour}" in e.get("style", "")]
    return ["hollow" if "fill: none" in e.get("style", "") else "filled" for e in uses]


def test_pareto_members_are_filled_and_dominated_ones_hollow(report: Report):
    plot, colours = trade_off_plot(report, "p99"), colours_of(report)
    assert marks(plot, colours["int8-static"]) == ["filled"]
    flipped = changed(report, "int8-static", pareto=False)
    assert "filled" not in marks(trade_off_plot(flipped, "p99"), colours["int8-static"])


def test_the_gate_is_a_line_in_the_plot(report: Report):
    moved = msgspec.structs.replace(report, gate=Gate(min_agreement=0.97))
    dotted = [
        next(e for e in Page(trade_off_plot(r, "p99")).root.iter("path") if "stroke-dasharray" in e.get("style", ""))
        for r in (report, moved)
    ]
    assert dotted[0].get("d") != dotted[1].get("d")


def test_knees_are_marked(report: Report):
    knee = named(report, "int8-static").standing
    assert knee is not None
    cells = rows_of(report, "latency")[0]
    assert cells[0] == "int8-static"
    assert [rows for rows, cell in zip(ROWS, cells[1:], strict=True) if "knee" in cell] == [knee.best_rows]
    assert f"{knee.rows_per_s:.0f} rows/s" in cells[1 + ROWS.index(knee.best_rows)]
    without = changed(report, "int8-static", standing=None)
    assert latency_plot(report).count("<use") == latency_plot(without).count("<use") + 1


def test_latencies_stand_below_their_batch_size(report: Report):
    cells = next(row for row in rows_of(report, "latency") if row[0] == "int4-weights")
    short = table(5.0, (1, 8))
    assert cells[1].startswith("5.00 4.85 to 5.20 p99 6.00")
    assert cells[4].startswith(f"{short.p50_ms[1]:.2f}")
    assert [cells[i] for i in (2, 3, 5, 6)] == ["-"] * 4


def test_waterfall_multiplies_exact_passes_and_joins_the_lossy_tail(report: Report):
    found = waterfall(report, named(report, "int8-static"))
    assert [stage.label for stage in found.stages] == [*STATIC, "quantization and repair, together"]
    assert [stage.gain is not None for stage in found.stages] == [True, True, False, False, False, True]
    assert found.stages[1].total == pytest.approx(1.25)
    assert found.stages[5].gain is not None
    assert found.stages[5].gain.speedup == pytest.approx(1.9)
    assert found.stages[5].total == pytest.approx(1.25 * 1.9)
    assert found.measured is not None
    assert found.measured.speedup == pytest.approx(15.0 / 6.0)
    assert found.measured.low < 2.5 < found.measured.high


def test_waterfall_takes_the_error_of_the_same_chain(report: Report):
    found = waterfall(report, named(report, "int8-static"))
    assert [stage.sqnr_db for stage in found.stages[:5]] == [200.0, 131.0, 120.0, 28.0, 30.0]
    assert found.sqnr_db == 31.2


def test_waterfall_bars_begin_where_the_one_before_ended(report: Report):
    found = waterfall(report, named(report, "int8-static"))
    bars = [stage.bar for stage in found.stages if stage.bar is not None]
    assert bars[0].left == pytest.approx(found.origin)
    assert bars[2].left == pytest.approx(bars[1].left + bars[1].width)
    scale = math.log(found.ends[1] / found.ends[0])
    assert bars[2].width == pytest.approx(100 * math.log(1.9) / scale)
    assert bars[2].low < bars[2].left + bars[2].width < bars[2].high
    assert found.bar is not None
    assert found.bar.width == pytest.approx(100 * math.log(2.5) / scale)


def test_waterfall_of_one_lossy_pass_needs_no_joint_bar(report: Report):
    found = waterfall(report, named(report, "int8-weights"))
    assert [stage.label for stage in found.stages] == [*BASE, "weight-only"]
    assert found.stages[2].gain is not None
    assert found.stages[2].gain.speedup == pytest.approx(1.4)


def test_waterfall_does_not_take_a_comparison_with_another_form(report: Report):
    """``against_exact`` refers to the build for this CPU when that is the best exact form."""
    build = candidate("fp32-host", "served", 10.0, passes=(*BASE, "cpu-build"), host_bound=True)
    passes = (*PASSES, applied("cpu-build", BASE, "tolerance"))
    hosted = msgspec.structs.replace(report, candidates=(*report.candidates, build), passes=passes)
    joint = waterfall(hosted, named(hosted, "int8-static")).stages[-1].gain
    assert joint is not None
    assert joint.speedup == pytest.approx(12.0 / 6.0)


def test_waterfall_of_a_replay_has_one_bar_for_the_chain(report: Report):
    passes = tuple(msgspec.structs.replace(p, speed=()) for p in PASSES)
    records = tuple(c for c in report.candidates if c.name in ("original", "original-1thread", "int8-static"))
    replayed = msgspec.structs.replace(report, passes=passes, candidates=records)
    found = waterfall(replayed, named(replayed, "int8-static"))
    assert [stage.gain is not None for stage in found.stages] == [False] * 5 + [True]
    assert found.stages[-1].total == pytest.approx(1.9)


def test_waterfall_on_a_gpu_takes_no_speed_from_the_cpu(report: Report):
    gpu = changed(report, "int8-static", provider="cuda")
    assert not any(stage.gain for stage in waterfall(gpu, named(gpu, "int8-static")).stages)


def test_html_draws_the_waterfall_of_the_first_choice_and_folds_the_others(report: Report):
    found = section(report, "waterfall")
    assert [words(e) for e in found if e.tag == "h3"] == ["int8-static"]
    folded = next(e for e in found if e.tag == "details")
    assert [words(e) for e in folded.iter("h3")] == ["fp32", "int8-weights"]
    rows = rows_of(report, "waterfall")
    assert [row[0] for row in rows] == [*STATIC, "quantization and repair, together", "whole chain, measured"]
    assert rows[1][1:3] == ["note of fusion", "1.25x 1.20-1.30"]
    assert rows[3][2] == "not raced alone"
    assert rows[3][6] == "28.0 dB"
    assert rows[6][4] == "2.50x"


def test_sensitivity_marks_the_layers_that_stay_in_float_by_name(report: Report):
    assert kept_layers(report, "int8-static") == ("/block.0/Conv", "/block.29/Conv")
    found = ranking(report, "int8-static")
    assert len(found.bars) == MOST_LAYERS
    assert [bar.layer.node for bar in found.bars if bar.kept] == ["/block.0/Conv"]
    assert (found.hidden, found.hidden_kept, found.kept, found.named) == (5, 1, 2, True)
    rows = rows_of(report, "sensitivity")
    assert [row[5] for row in rows[:2]] == ["float", "quantized"]
    assert rows[0][4] == "1.0e-01"
    coloured = [e for e in section(report, "sensitivity").iter("span") if e.get("class") == "bar float"]
    assert len(coloured) == 1
    assert "5 less sensitive layers are not drawn, 1 of them in float" in words(section(report, "sensitivity"))


def test_sensitivity_scale_is_logarithmic(report: Report):
    bars = ranking(report, "int8-static").bars
    steps = [one.width - two.width for one, two in itertools.pairwise(bars)]
    assert bars[0].width == pytest.approx(100)
    assert steps == pytest.approx([steps[0]] * (MOST_LAYERS - 1))


def test_sensitivity_does_not_guess_the_layers_of_what_is_not_served(report: Report):
    mixed = changed(report, "int8-dynamic", passes=(*BASE, "int8-dynamic(keep=[2])"))
    found = ranking(mixed, "int8-dynamic")
    assert (found.kept, found.named, [bar.kept for bar in found.bars]) == (2, False, [False] * 3)
    assert {row[5] for row in rows_of(mixed, "sensitivity", 1)} == {"not recorded"}


def test_sensitivity_of_layers_without_error_is_drawn(report: Report):
    silent = msgspec.structs.replace(report, sensitivity={"int8-static": (LayerSensitivity("a", "Conv", 0, 0.0, 0.0),)})
    assert [bar.width for bar in ranking(silent, "int8-static").bars] == [0.0]
    assert rows_of(silent, "sensitivity")[0][0] == "a"


def test_html_tells_the_path_of_the_search(report: Report):
    assert rows_of(report, "search") == [
        ["1", "int8-static", "tried", "agreement 0.900", "5.9"],
        ["2", "int8-static + bias-correction", "kept", "error changes by -9.0 %", "4.2"],
    ]


def test_html_tells_what_each_pass_did(report: Report):
    rows = {row[0]: row for row in rows_of(report, "passes")}
    fusion = rows["fusion version 1, after sanitize"]
    assert fusion[1:4] == ["tolerance", "applied", "15 → 9"]
    assert fusion[4] == "1.25x 1.20-1.30 at 1 1.25x 1.20-1.30 at 8"
    assert fusion[5] == "131.0 dB"
    assert fusion[7] == "note of fusion gelu: 6 Add 9 → 3, Erf 6 → 0, Gelu 0 → 6"
    assert rows["simplify version 1, after sanitize"][2] == "slower right, left out"
    assert "from cache" in rows["smoothquant version 1, after sanitize → fusion"][6]
    assert rows["fp16 version 1, after sanitize → fusion"][7] == "no <kernel> & no hope"
    assert "TensorRT engine refused: no TensorRT is installed; version none" in words(section(report, "passes"))


def test_html_tells_where_the_nodes_run(report: Report):
    found = section(report, "placement")
    heads = [words(e) for e in found.iter("summary")]
    assert heads[0] == "int8-static: CUDAExecutionProvider 4, CPUExecutionProvider 3"
    assert len(heads) == sum(1 for c in report.candidates if c.placement) == 4
    assert rows_of(report, "placement") == [
        ["CUDAExecutionProvider", "4", "Conv 4"],
        ["CPUExecutionProvider", "3", "Softmax 2, Reshape 1"],
    ]


def test_html_tells_the_proof_of_batching_and_padding(report: Report):
    seen = words(section(report, "batching"))
    assert "proven: batches of 32 answer as single requests do (131 dB, 512 samples); at most 32 rows" in seen
    assert "proven: padded answers agree (88 dB); ids padded on axis 1 with 7; tokens cut on axis 2" in seen
    never = msgspec.structs.replace(report, padding=Padding(False, "no variable axis"))
    assert "refused: no variable axis" in words(section(never, "batching"))


def test_html_tells_how_sessions_are_set_and_why(report: Report):
    rows = {row[0]: row for row in rows_of(report, "served")}
    assert rows["int8-static"][1:3] == ["2 threads", "4.00"]
    assert rows["int8-static"][8] == "8.10 / 1.01"
    seen = words(section(report, "served"))
    assert "Session of int8-static: 2 threads" in seen
    assert "1 thread chosen; 2 threads: 1.05x, slower." in seen


def test_html_tells_how_to_replay(report: Report):
    shown = ["".join(e.itertext()) for e in section(report, "replay").iter("pre")]
    assert shown[0] == f"{report.command} --recipe recipe.toml"
    assert shown[1] == report.command
    assert shown[2] == report.replay
    assert '"min_agreement": 0.99' in shown[3]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "slipstream optimize 'my model.onnx' --recipe old.toml --version 3 --name m",
            "slipstream optimize 'my model.onnx' --name m --recipe recipe.toml",
        ),
        (
            "slipstream optimize m.onnx --recipe=old.toml --version=3 --name m",
            "slipstream optimize m.onnx --name m --recipe recipe.toml",
        ),
        (
            "optimizers.optimize(...)",
            "slipstream optimize minilm-l6.onnx --repository FOLDER --name minilm --recipe recipe.toml "
            "--calibration DATA.npz",
        ),
        (
            "slipstream optimize 'never closed",
            "slipstream optimize minilm-l6.onnx --repository FOLDER --name minilm --recipe recipe.toml "
            "--calibration DATA.npz",
        ),
    ],
)
def test_replay_command(report: Report, command: str, expected: str):
    assert replay_command(msgspec.structs.replace(report, command=command)) == expected


def test_mean_of_speeds_is_geometric():
    assert mean_of([*speeds(2.0)[:1], *speeds(0.5)[:1]]) == pytest.approx(1.0)
    assert mean_of([]) == 1.0


def lean(report: Report) -> Report:
    """No lossy candidate, no search, no data."""
    records = tuple(c for c in report.candidates if c.name in ("original", "original-1thread"))
    return msgspec.structs.replace(
        changed(msgspec.structs.replace(report, candidates=records), "original-1thread", verdict="served"),
        chosen="fp32",
        data=DataRecord("", 0, 0, 0, 0, False, ""),
        passes=(),
        steps=(),
        sensitivity={},
        engines=(),
        knobs=(),
    )


def test_html_of_a_run_without_data_or_search(report: Report):
    bare = lean(report)
    assert "nothing but exact forms can be proven" in words(parsed(bare))
    assert "Nothing was searched." in words(section(bare, "search"))
    assert "No pass is in what is served" in words(section(bare, "waterfall"))
    assert "No ranking was needed" in words(section(bare, "sensitivity"))
    assert "DATA.npz" not in replay_command(msgspec.structs.replace(bare, command=""))


def test_html_of_a_replay_says_that_nothing_was_searched(report: Report):
    plain = {**report.recipe, "variants": [{"name": "int8-static"}]}
    replayed = msgspec.structs.replace(report, steps=(), recipe=plain)
    assert "the recipe names its variants" in words(section(replayed, "search"))


def test_html_of_a_model_that_is_never_batched(report: Report):
    one = table(1.0, (1,))
    single = report
    for record in report.candidates:
        if record.latency is not None:
            fields = {"latency": one, "cpu_ms": (1.0,), "against_original": (), "against_exact": ()}
            single = changed(single, record.name, **fields)
    served = (ServedRecord("original", "original", "defaults", one, (1.0,), ()),)
    single = msgspec.structs.replace(single, served=served, batching=Batching(False, "rows mix", 1))
    head = words(next(section(single, "candidates").iter("thead")))
    assert "ms at batch 1" in head
    assert "batch 8" not in head
    assert "refused: rows mix" in words(section(single, "batching"))


def test_html_where_nothing_was_measured(report: Report):
    nothing = lean(report)
    for name in ("original", "original-1thread"):
        nothing = changed(nothing, name, latency=None, standing=None, cpu_ms=(), placement={})
    root = parsed(msgspec.structs.replace(nothing, served=()))
    assert len(list(root.iter("svg"))) == 2
