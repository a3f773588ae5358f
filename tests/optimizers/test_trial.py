"""The trial on real sessions: who is opened, compared and raced, and what follows for the artifact."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.building import Built
from optimizers.evidence import HeldOut, prove_batching, run_singly
from optimizers.search import Gate
from optimizers.trial import UNTOUCHED, Outcome, TrialPlan, headline, run_trial
from server.artifact import SessionOptions
from server.errors import StartupError
from server.providers import CPU
from server.session import Session


def scaled(model: Path, factor: float, path: Path) -> Path:
    """Copy a model with its first weight multiplied."""
    proto = onnx.load(model)
    tensor = proto.graph.initializer[0]
    weight = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((weight * factor).astype(weight.dtype), tensor.name))
    onnx.save(proto, path)
    return path


def held_out_of(model: Path) -> tuple[HeldOut, Session]:
    rng = np.random.default_rng(0)
    singles = tuple({"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(40))
    session = Session(model, CPU, SessionOptions())
    return HeldOut(singles, run_singly(session, singles), "top1"), session


def tried(model: Path, *candidates: Built, cores: int = 1) -> Outcome:
    held_out, session = held_out_of(model)
    batching = prove_batching(session, session.signature, held_out, 8)
    plan = TrialPlan(model, Gate(0.9, 0.01), (1, 8), cores, 0.1, 0)
    untouched = Built(UNTOUCHED, "fp32", "cpu", exact=True, model=model)
    return run_trial([untouched, *candidates], held_out, batching, plan, lambda _stage, _share: None)


def fused(model: Path) -> Built:
    return Built("fp32", "fp32", "cpu", exact=True, model=model)


def lossy(model: Path, failure: str = "") -> Built:
    return Built("int8", "int8-dynamic", "cpu", exact=False, model=model, failure=failure)


def record_of(outcome: Outcome, name: str):
    return next(record for record in outcome.candidates if record.name == name)


def test_candidate_that_decides_otherwise_is_measured_but_not_served(mlp: Path, tmp_path: Path):
    outcome = tried(mlp, fused(mlp), lossy(scaled(mlp, -1, tmp_path / "bad.onnx")))
    record = record_of(outcome, "int8")
    assert record.verdict == "refused"
    assert record.reason.startswith("agreement 0.")
    assert record.latency is not None
    assert [choice.name for choice in outcome.chosen] == ["fp32"]


def test_candidate_that_was_not_built_keeps_its_reason(mlp: Path):
    record = record_of(tried(mlp, fused(mlp), lossy(mlp, failure="no weights to quantize")), "int8")
    assert (record.verdict, record.reason, record.latency) == ("refused", "no weights to quantize", None)


def test_candidate_that_does_not_open_is_refused(mlp: Path, tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    record = record_of(tried(mlp, fused(mlp), lossy(tmp_path / "bad.onnx")), "int8")
    assert record.reason.startswith("does not run:")


def test_candidate_that_gives_nan_is_refused(mlp: Path, tmp_path: Path):
    record = record_of(tried(mlp, fused(mlp), lossy(scaled(mlp, float("nan"), tmp_path / "nan.onnx"))), "int8")
    assert "NaN" in record.reason


def test_original_serves_as_fp32_when_the_fused_form_is_wrong(mlp: Path, tmp_path: Path):
    outcome = tried(mlp, fused(scaled(mlp, -1, tmp_path / "bad.onnx")))
    assert [(choice.name, choice.built.model) for choice in outcome.chosen] == [("fp32", mlp)]
    assert record_of(outcome, UNTOUCHED).verdict == "served"
    assert record_of(outcome, "fp32").verdict == "refused"


def test_served_variants_are_measured_with_one_thread_and_with_all_cores(mlp: Path):
    outcome = tried(mlp, fused(mlp), cores=2)
    name = outcome.chosen[0].name
    assert [(s.variant, s.threads) for s in outcome.served] == [("original", 0), (name, 1), (name, 2)]
    assert sum(s.chosen for s in outcome.served if s.variant == name) == 1
    (choice,) = outcome.threads
    assert outcome.chosen[0].options.intra_op_threads == choice.threads
    assert "CPU time per row" in choice.reason


def test_one_core_leaves_no_choice_of_threads(mlp: Path):
    (choice,) = tried(mlp, fused(mlp)).threads
    assert (choice.threads, choice.reason) == (1, "one usable core")


def test_headline_names_the_variant_and_the_baseline(mlp: Path):
    text = headline(tried(mlp, fused(mlp)))
    assert text.startswith("fp32 is served")
    assert "onnxruntime's defaults" in text


def test_original_that_does_not_open_ends_the_run(mlp: Path, tmp_path: Path):
    held_out, session = held_out_of(mlp)
    batching = prove_batching(session, session.signature, held_out, 8)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    plan = TrialPlan(tmp_path / "bad.onnx", Gate(), (1,), 1, 0.1, 0)
    with pytest.raises(StartupError):
        run_trial([Built(UNTOUCHED, "fp32", "cpu", True, mlp)], held_out, batching, plan, lambda *_: None)
