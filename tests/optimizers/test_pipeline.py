"""The whole pipeline on real models: what is written, what is found again, and what a failure leaves behind."""

import importlib.util
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from optimizers import pipeline
from optimizers.calibration import read_samples, split
from optimizers.errors import CalibrationError, ModelError, OptimizerError
from optimizers.evidence import run_singly
from optimizers.isolation import SERVING
from optimizers.pipeline import existing, optimize
from optimizers.recipe import Recipe, VariantPlan
from optimizers.report import Report, read_report
from optimizers.request import OptimizeRequest
from optimizers.roots import Root
from optimizers.trial import served_name
from server.artifact import Artifact, read_artifact, read_golden
from server.errors import ArtifactError
from server.golden import require_golden
from server.metrics import Metrics
from server.model import Model
from server.providers import CPU
from server.scheduler import Cores
from server.session import Session
from server.settings import Settings
from server.tensors import InferRequest
from tests import models
from tests.optimizers.test_isolation import Coarser, Crash, Damage

ROWS = (1, 8)
RECIPE = Recipe(
    precisions=("fp32", "fp16", "int8"),
    compressions=(),
    batch_rows=ROWS,
    calibration_samples=32,
    search_samples=24,
    holdout_samples=64,
    min_agreement=0.9,
    devices=("cpu",),
    portable=True,
)
EXACT_ONLY = msgspec.structs.replace(RECIPE, precisions=("fp32",))


def request_for(model: Path, repository: Path, **fields: object) -> OptimizeRequest:
    plain = {"name": "mlp", "recipe": EXACT_ONLY, "time_budget_s": 0.1, "cache": repository.parent / "cache"}
    return OptimizeRequest(**{"model": model, "repository": repository, **plain, **fields})


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> OptimizeRequest:
    """A request with data and labels, for all precisions."""
    folder = tmp_path_factory.mktemp("full")
    model = models.save_mlp(folder / "mlp.onnx", hidden=256)
    samples = np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32)
    np.savez(folder / "data.npz", x=samples)
    session = Session(model, CPU, SERVING)
    np.savez(folder / "labels.npz", labels=session.run({"x": samples})["y"].argmax(axis=1))
    return request_for(
        model,
        folder / "models",
        recipe=RECIPE,
        calibration=folder / "data.npz",
        labels=folder / "labels.npz",
        command="slipstream optimize mlp.onnx",
        time_budget_s=120.0,
    )


@pytest.fixture(scope="module")
def stages(full: OptimizeRequest) -> list[tuple[str, float]]:
    """Optimize once for all tests of this module; return the stages that were reported."""
    seen: list[tuple[str, float]] = []
    optimize(full, lambda stage, share: seen.append((stage, share)))
    return seen


@pytest.fixture(scope="module")
def artifact(full: OptimizeRequest, stages: list[tuple[str, float]]) -> Artifact:
    return read_artifact(full.repository / "mlp" / "1")


@pytest.fixture(scope="module")
def report(artifact: Artifact) -> Report:
    return read_report(artifact.folder)


def test_artifact_is_complete_and_alone(artifact: Artifact, full: OptimizeRequest):
    files = {path.name for path in artifact.folder.iterdir()}
    assert {"manifest.json", "golden.npz", "recipe.toml", "report.json", "report.html"} <= files
    assert [path.name for path in full.repository.iterdir()] == ["mlp"], "no temporary folder stays behind"
    assert artifact.manifest is not None
    assert artifact.manifest.batching.batchable
    assert artifact.manifest.source.file == "mlp.onnx"


def test_exact_fp32_is_always_served_as_the_last_resort(artifact: Artifact):
    last = artifact.variants[-1]
    assert (last.name, last.precision, last.provider) == ("fp32", "fp32", "cpu")


def test_every_variant_reproduces_its_golden_outputs_and_carries_its_latency(artifact: Artifact):
    golden = read_golden(artifact.folder)
    assert len(golden.inputs["x"]) == 8
    for variant in artifact.variants:
        session = Session(artifact.folder / variant.file, CPU, variant.options)
        assert require_golden(session, variant, golden) >= variant.golden_min_sqnr_db + 2.9
        assert variant.latency is not None
        assert variant.latency.rows == ROWS
        assert variant.host


def test_only_served_variants_are_files(artifact: Artifact):
    found = {str(path.relative_to(artifact.folder)) for path in artifact.folder.glob("*/*")}
    assert found == {variant.file for variant in artifact.variants}


def test_served_variants_decide_as_promised_on_the_held_out_samples(artifact: Artifact, full: OptimizeRequest):
    assert artifact.manifest is not None
    assert full.calibration is not None
    samples = read_samples(full.calibration, artifact.manifest.signature)
    _, _, held_out = split(samples, 32, 24, 64, RECIPE.seed)
    original = run_singly(Session(full.model, CPU, SERVING), held_out.batches(1))["y"].argmax(axis=1)
    for variant in artifact.variants:
        session = Session(artifact.folder / variant.file, CPU, variant.options)
        same = run_singly(session, held_out.batches(1))["y"].argmax(axis=1) == original
        promised = variant.fidelity.agreement if variant.fidelity is not None else 1.0
        assert same.mean() >= promised


async def test_server_takes_the_artifact(artifact: Artifact, full: OptimizeRequest):
    model = Model.load(artifact, (CPU,), Settings(cpu_instances=1), Metrics())
    try:
        model.start(Cores(1))
        inputs = read_golden(artifact.folder).inputs
        response = await model.infer(InferRequest(inputs))
        assert not model.unoptimized
        assert model.refused == {}
        assert response.variant in {variant.name for variant in artifact.variants}
        original = Session(full.model, CPU, SERVING).run(inputs)["y"]
        assert np.mean(response.outputs["y"].argmax(axis=1) == original.argmax(axis=1)) >= RECIPE.min_agreement
    finally:
        model.close()


def test_golden_outputs_are_those_of_the_untouched_file(artifact: Artifact, full: OptimizeRequest):
    golden = read_golden(artifact.folder)
    original = Session(full.model, CPU, SERVING)
    np.testing.assert_allclose(original.run(golden.inputs)["y"], golden.outputs["y"], rtol=1e-5, atol=1e-5)


def test_report_tells_of_every_candidate_and_pass(report: Report):
    candidates = {record.name: record for record in report.candidates}
    assert {"original", "original-1thread", "fp32-fused", "fp16", "int8-dynamic", "int8-static"} <= candidates.keys()
    assert candidates["original"].verdict == "baseline"
    for record in report.candidates:
        assert record.reason
        if record.fidelity is not None:
            assert record.fidelity.accuracy_original == 1.0
            assert [speed.rows for speed in record.against_original] == list(ROWS)
    assert {"sanitize", "simplify", "fp16", "int8-dynamic", "int8-static"} <= {step.name for step in report.passes}
    assert (report.data.calibration, report.data.search, report.data.held_out) == (32, 24, 64)
    assert report.data.labels
    assert {step.what for step in report.steps} >= {"int8-dynamic", "int8-static", "fp16"}
    assert report.command == "slipstream optimize mlp.onnx"


def test_report_and_manifest_agree_on_what_is_served(report: Report, artifact: Artifact):
    served = {record.name for record in report.candidates if record.verdict == "served"}
    assert {served_name(name) for name in served} == {v.name for v in artifact.variants}
    assert report.chosen == artifact.variants[0].name
    for variant in artifact.variants[:-1]:
        assert variant.fidelity is not None
        assert variant.fidelity.agreement >= RECIPE.min_agreement


def test_stages_are_told_and_never_go_back(stages: list[tuple[str, float]]):
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {"load", "latency race"} <= {stage for stage, _ in stages}


def test_same_request_does_nothing(artifact: Artifact, full: OptimizeRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "load_model", None)  # calling it would fail
    assert existing(full) == artifact
    assert optimize(full) == artifact
    assert optimize(msgspec.structs.replace(full, version=1)) == artifact


def test_version_is_never_changed(artifact: Artifact, full: OptimizeRequest):
    other = msgspec.structs.replace(full, recipe=msgspec.structs.replace(RECIPE, seed=7), version=1)
    with pytest.raises(ArtifactError, match="versions never change"):
        optimize(other)
    assert existing(msgspec.structs.replace(other, version=None)) is None


def test_without_data_only_exact_variants_are_made_in_the_next_version(artifact: Artifact, full: OptimizeRequest):
    made = optimize(msgspec.structs.replace(full, calibration=None, labels=None))
    assert made.version == "2"
    assert [variant.name for variant in made.variants] == ["fp32"]
    records = {record.name: record for record in read_report(made.folder).candidates}
    assert records["int8-static"].verdict == "refused"
    assert "no samples; give --calibration" in records["int8-static"].reason
    assert read_artifact(artifact.folder) == artifact


def test_candidates_that_the_time_budget_leaves_out_say_so(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "EXACT", ())
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32))
    made = optimize(request_for(mlp, tmp_path / "models", calibration=tmp_path / "data.npz", recipe=RECIPE))
    report = read_report(made.folder)
    assert [variant.name for variant in made.variants] == ["fp32"]
    left_out = {step.what: step.reason for step in report.steps if step.outcome == "not tried"}
    assert {"int8-dynamic", "int8-static", "fp16"} <= left_out.keys()
    assert set(left_out.values()) == {"the time budget is spent"}
    reasons = {record.name: record.reason for record in report.candidates}
    assert reasons["int8-dynamic"] == "the time budget is spent"


def test_recipe_with_variants_is_not_cut_by_the_time_budget(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32))
    passes = ({"pass": "sanitize"}, {"pass": "int8-dynamic"})
    plan = VariantPlan("int8-dynamic", "int8-dynamic", passes)
    recipe = msgspec.structs.replace(RECIPE, variants=(plan,))
    made = optimize(request_for(mlp, tmp_path / "models", calibration=tmp_path / "data.npz", recipe=recipe))
    (record,) = (record for record in read_report(made.folder).candidates if record.name == "int8-dynamic")
    assert record.latency is not None, "it was built and raced"


def test_other_data_make_the_next_version_and_each_is_found_again(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "EXACT", ())
    requests = []
    for seed in (0, 1):
        samples = np.random.default_rng(seed).standard_normal((20, 64)).astype(np.float32)
        np.savez(tmp_path / f"{seed}.npz", x=samples)
        requests.append(request_for(mlp, tmp_path / "models", calibration=tmp_path / f"{seed}.npz"))
    made = [optimize(request) for request in requests]
    assert [artifact.version for artifact in made] == ["1", "2"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("models/mlp/*/*")}
    assert len(before) > 8
    assert [optimize(request) for request in requests] == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("models/mlp/*/*")} == before


def test_candidate_below_the_wanted_agreement_is_refused_and_not_written(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = Root("coarser", "coarser", "int8-static", (Coarser(),))
    monkeypatch.setattr(pipeline, "EXACT", ())
    monkeypatch.setattr(pipeline, "roots_for", lambda *_: (root,))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32))
    strict = msgspec.structs.replace(RECIPE, min_agreement=1.0)
    made = optimize(
        request_for(mlp, tmp_path / "models", calibration=tmp_path / "data.npz", recipe=strict, time_budget_s=60.0)
    )
    (record,) = (record for record in read_report(made.folder).candidates if record.name == "coarser")
    assert record.verdict == "refused"
    assert re.match(r"agreement 0\.\d+ < 1 \(n=64|agreement at most 0\.\d+ \(95 %\)", record.reason)
    assert [path.parent.name for path in made.folder.glob("*/model.onnx")] == ["fp32"]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)
def test_engines_lie_in_the_artifact_and_batches_keep_the_wanted_latency(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "EXACT", ())
    recipe = msgspec.structs.replace(EXACT_ONLY, devices=("cpu", "tensorrt"), slo_ms=1e-6)
    made = optimize(request_for(mlp, tmp_path / "models", recipe=recipe))
    assert [path.name for path in (made.folder / "engines").iterdir()] == ["fp32.plan"]
    assert [engine.status for engine in read_report(made.folder).engines] == ["fp32: built"]
    assert made.manifest is not None
    assert (made.manifest.batching.batchable, made.manifest.batching.max_rows) == (True, 1)
    assert "wanted are 1e-06 ms" in made.manifest.batching.reason


def test_model_with_the_batch_on_another_axis_is_served_without_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "EXACT", ())
    made = optimize(request_for(models.save_batch_on_axis_1(tmp_path / "m.onnx"), tmp_path / "models"))
    assert made.manifest is not None
    assert not made.manifest.batching.batchable
    assert "axis 0" in made.manifest.batching.reason
    session = Session(made.folder / made.variants[0].file, CPU, made.variants[0].options)
    assert require_golden(session, made.variants[0], read_golden(made.folder)) == 200


def test_model_whose_rows_influence_each_other_is_measured_one_by_one(tmp_path: Path):
    made = optimize(request_for(models.save_batch_mixing(tmp_path / "m.onnx"), tmp_path / "models"))
    assert made.manifest is not None
    assert not made.manifest.batching.batchable
    assert made.variants[0].latency is not None
    assert made.variants[0].latency.rows == (1,)
    assert len(read_golden(made.folder).inputs["x"]) == 1


def test_text_model_is_served_as_it_is(tmp_path: Path):
    made = optimize(request_for(models.save_strings(tmp_path / "m.onnx"), tmp_path / "models"))
    session = Session(made.folder / made.variants[0].file, CPU, made.variants[0].options)
    assert require_golden(session, made.variants[0], read_golden(made.folder)) == 200


def test_broken_passes_are_refused_and_the_run_goes_on(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "EXACT", (Crash(), Damage()))
    made = optimize(request_for(mlp, tmp_path / "models"))
    assert [variant.name for variant in made.variants] == ["fp32"]
    passes = read_report(made.folder).passes
    assert [step.status for step in passes[:2]] == ["refused", "refused"]
    assert "signal 11" in passes[0].reason


@pytest.mark.parametrize(
    ("stage", "error", "raised"),
    [
        ("Trial", OptimizerError("no candidate"), OptimizerError),
        ("publish", OSError(28, "No space left on device"), ArtifactError),
        ("move_into_place", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_leaves_nothing_behind(
    stage: str,
    error: BaseException,
    raised: type[BaseException],
    mlp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, stage, fail)
    monkeypatch.setattr(pipeline, "EXACT", ())
    with pytest.raises(raised, match=str(error.args[-1]) if error.args else None):
        optimize(request_for(mlp, tmp_path / "models"))
    assert list((tmp_path / "models").iterdir()) == []


def test_data_that_do_not_fit_end_the_run(mlp: Path, tmp_path: Path):
    np.savez(tmp_path / "data.npz", wrong=np.zeros((20, 64), np.float32))
    with pytest.raises(CalibrationError, match="wrong"):
        optimize(request_for(mlp, tmp_path / "models", calibration=tmp_path / "data.npz"))
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "cut off"])
def test_file_that_is_no_model_ends_the_run(mlp: Path, tmp_path: Path, content: bytes | None):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(mlp.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        optimize(request_for(bad, tmp_path / "models"))
    assert list(tmp_path.glob("models/*")) == []


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b"])
def test_name_that_cannot_be_served_is_refused(mlp: Path, tmp_path: Path, name: str):
    with pytest.raises(OptimizerError, match="the name"):
        optimize(request_for(mlp, tmp_path / "models", name=name))
