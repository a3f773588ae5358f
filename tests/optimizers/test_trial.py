"""The trial on real sessions: who is opened, compared and raced, and what follows for the artifact."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from optimizers.building import Built
from optimizers.evidence import HeldOut, run_singly
from optimizers.exam import Exam
from optimizers.explore import Appraisal
from optimizers.isolation import SERVING, Form
from optimizers.pareto import Policy
from optimizers.racing import Track
from optimizers.search import Gate, Knobs
from optimizers.store import Store
from optimizers.trial import UNTOUCHED, Outcome, Trial, TrialPlan, headline
from server.artifact import digest_of
from server.errors import StartupError
from server.providers import CPU
from server.session import Session

PLAN = TrialPlan(Gate(0.9, 0.01), Policy(), 1, 0.1, 0)


def scaled(model: Path, factor: float, path: Path) -> Path:
    """Copy a model with its first weight multiplied."""
    proto = onnx.load(model)
    tensor = proto.graph.initializer[0]
    weight = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((weight * factor).astype(weight.dtype), tensor.name))
    onnx.save(proto, path)
    return path


class Field:
    """A track and an exam on one model."""

    def __init__(self, model: Path, folder: Path, sizes: tuple[int, ...] = (1, 8)) -> None:
        rng = np.random.default_rng(0)
        singles = tuple({"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(40))
        self.model, self.store = model, Store(folder / "store")
        held_out = HeldOut(singles, run_singly(Session(model, CPU, SERVING), singles), "top1")
        self.track = Track(model, singles, sizes, self.store, "host")
        self.exam = Exam(held_out, "held-out", "samples", 8, 1, self.store, "host")

    def run(self, *candidates: Built, plan: TrialPlan = PLAN, untouched: Path | None = None) -> Outcome:
        original = Built(UNTOUCHED, "fp32", "cpu", exact=True, form=form_of(untouched or self.model))
        appraised = [Appraisal(built, failure=built.failure) for built in candidates]
        return Trial(original, appraised, self.exam, self.track, plan, lambda *_: None).run()


@pytest.fixture
def field(mlp: Path, tmp_path: Path) -> Iterator[Field]:
    made = Field(mlp, tmp_path)
    yield made
    made.track.close()


def form_of(model: Path) -> Form:
    return Form(model, digest_of(model))


def fused(model: Path) -> Built:
    return Built("fp32", "fp32", "cpu", exact=True, form=form_of(model))


def lossy(model: Path, failure: str = "") -> Built:
    return Built("int8", "int8-dynamic", "cpu", exact=False, form=form_of(model), failure=failure)


def record_of(outcome: Outcome, name: str):
    return next(record for record in outcome.candidates if record.name == name)


def test_candidate_that_decides_otherwise_is_measured_but_not_served(field: Field, tmp_path: Path):
    outcome = field.run(fused(field.model), lossy(scaled(field.model, -1, tmp_path / "bad.onnx")))
    record = record_of(outcome, "int8")
    assert record.verdict == "refused"
    assert record.reason.startswith("agreement 0.")
    assert "of exact FP32" in record.reason
    assert record.latency is not None
    assert [choice.name for choice in outcome.chosen] == ["fp32"]


def test_candidate_that_was_not_built_keeps_its_reason(field: Field):
    record = record_of(field.run(fused(field.model), lossy(field.model, failure="no weights to quantize")), "int8")
    assert (record.verdict, record.reason, record.latency) == ("refused", "no weights to quantize", None)


def test_candidate_that_does_not_open_is_refused(field: Field, tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    record = record_of(field.run(fused(field.model), lossy(tmp_path / "bad.onnx", failure="")), "int8")
    assert record.reason.startswith("does not run:")


def test_candidate_that_gives_nan_is_refused(field: Field, tmp_path: Path):
    broken = lossy(scaled(field.model, float("nan"), tmp_path / "nan.onnx"))
    assert "NaN" in record_of(field.run(fused(field.model), broken), "int8").reason


def test_original_serves_as_fp32_when_the_fused_form_is_wrong(field: Field, tmp_path: Path):
    outcome = field.run(fused(scaled(field.model, -1, tmp_path / "bad.onnx")))
    assert [(choice.name, choice.built.model) for choice in outcome.chosen] == [("fp32", field.model)]
    assert record_of(outcome, UNTOUCHED).verdict == "served"
    assert record_of(outcome, "fp32").verdict == "refused"


def test_small_candidate_is_served_for_size(field: Field):
    smaller = lossy(field.model)
    outcome = field.run(fused(field.model), smaller, plan=replace(PLAN, policy=Policy("size")))
    assert record_of(outcome, "int8").reason.startswith("not better in size enough than exact FP32: 1.00x on average")
    assert outcome.policy.startswith("the smallest of the faithful candidates")


def test_everyone_that_raced_has_a_standing_with_memory(field: Field):
    outcome = field.run(fused(field.model))
    for name in (UNTOUCHED, "fp32"):
        standing = record_of(outcome, name).standing
        assert standing is not None
        assert standing.memory_bytes is not None
        assert standing.rows_per_s > 0
        assert record_of(outcome, name).placement["CPUExecutionProvider"]["MatMul"] >= 1


def test_other_settings_are_tried_and_the_choice_is_served(field: Field):
    outcome = field.run(fused(field.model), plan=replace(PLAN, cores=2))
    (choice,) = outcome.knobs
    for tried in ("2 threads", "1 thread, graph level basic"):
        assert f"{tried}: " in choice.reason
    assert "spinning" not in choice.reason  # runs of microseconds are over before another thread helps
    served = outcome.chosen[0]
    assert served.options.intra_op_threads == choice.knobs.threads
    assert served.options.graph_level == choice.knobs.graph_level
    assert [record.variant for record in outcome.served] == ["original", served.name]


def test_settings_without_memory_are_not_tried_and_the_report_says_so(field: Field, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("optimizers.tuning.open_alternatives.__defaults__", (lambda: 1,))
    (choice,) = field.run(fused(field.model), plan=replace(PLAN, cores=2)).knobs
    assert choice.knobs == Knobs()
    assert "nothing else was measured; not tried, another session does not fit into the free memory: " in choice.reason
    assert "1 thread, graph level basic" in choice.reason


def test_who_is_not_served_leaves_before_other_settings_are_opened(field: Field, monkeypatch: pytest.MonkeyPatch):
    entered: list[set[str]] = []
    enter = field.track.enter

    def watched(built: Built, knobs: Knobs | None = None) -> str:
        if knobs is not None:
            entered.append(set(field.track._sessions))
        return enter(built, knobs)

    monkeypatch.setattr(field.track, "enter", watched)
    outcome = field.run(fused(field.model), lossy(field.model))
    assert [choice.name for choice in outcome.chosen] == ["fp32"]
    assert entered[0] == {"original", "fp32"}


def test_headline_names_the_variant_and_the_baseline(field: Field):
    text = headline(field.run(fused(field.model)))
    assert text.startswith("fp32 is served")
    assert "onnxruntime's defaults" in text


def test_finished_fidelity_and_races_are_not_repeated(field: Field, monkeypatch: pytest.MonkeyPatch):
    first = field.run(fused(field.model), lossy(field.model))
    monkeypatch.setattr("optimizers.exam.fidelity_of", None)
    monkeypatch.setattr("optimizers.racing.race", None)
    again = field.run(fused(field.model), lossy(field.model))
    assert [record.latency for record in again.candidates] == [record.latency for record in first.candidates]


def test_original_that_does_not_open_ends_the_run(field: Field, tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(StartupError):
        field.run(untouched=tmp_path / "bad.onnx")


def costly(model: Path, path: Path, *, per_row: bool) -> Path:
    """Copy a model with work added to it that changes no decision: for every row, or four times for the first one."""
    proto = onnx.load(model)
    graph, rng = proto.graph, np.random.default_rng(1)
    answer = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["cheap" if name == answer else name for name in node.output]
    weights = {"down": (64, 4096), "up": (4096, 10)}
    graph.initializer.extend(
        onnx.numpy_helper.from_array((rng.standard_normal(shape) * 1e-9).astype(np.float32), name)
        for name, shape in weights.items()
    )
    ints = {"start": [0], "end": [1], "axis": [0]}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v, np.int64), k) for k, v in ints.items())
    make = onnx.helper.make_node
    rows = "x" if per_row else "first"
    if not per_row:
        graph.node.append(make("Slice", ["x", "start", "end", "axis"], ["first"]))
    last = "cheap"
    for number in range(1 if per_row else 4):
        source = rows if not number else f"shifted{number}"
        if number:
            graph.node.append(make("Sin", [rows if number == 1 else f"shifted{number - 1}"], [source]))
        graph.node.append(make("MatMul", [source, "down"], [f"wide{number}"]))
        graph.node.append(make("MatMul", [f"wide{number}", "up"], [f"extra{number}"]))
        target = answer if number == (0 if per_row else 3) else f"sum{number}"
        graph.node.append(make("Add", [last, f"extra{number}"], [target]))
        last = target
    onnx.save(proto, path)
    return path


def test_candidate_that_wins_for_large_batches_only_is_served_for_those(mlp: Path, tmp_path: Path):
    original = costly(mlp, tmp_path / "per-row.onnx", per_row=True)
    once = costly(mlp, tmp_path / "once.onnx", per_row=False)
    field = Field(original, tmp_path, sizes=(1, 8, 256))
    try:
        outcome = field.run(lossy(once), plan=replace(PLAN, budget_s=2.0))
    finally:
        field.track.close()
    assert [(choice.name, choice.from_rows > 1) for choice in outcome.chosen] == [("fp32", False), ("int8", True)]
    assert "rows and more" in record_of(outcome, "int8").reason
    assert "rows and more are run by int8" in headline(outcome)
