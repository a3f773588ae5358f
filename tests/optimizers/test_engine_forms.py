"""The INT8 form of engines: symmetric, proven as it is written, published for TensorRT, and read by a real builder."""

import importlib.util
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from optimizers import engine_forms
from optimizers.engine_forms import AS_WRITTEN, NAME
from optimizers.pipeline import optimize
from optimizers.recipe import Recipe
from optimizers.report import read_report
from optimizers.request import OptimizeRequest
from server.artifact import Artifact, Profile, SessionOptions, Variant, digest_of, read_artifact
from server.errors import ArtifactError
from server.metrics import Metrics
from server.model import Model
from server.providers import CPU
from server.session import Session
from server.settings import Settings
from tests import models

RECIPE = Recipe(
    precisions=("fp32", "int8"),
    compressions=(),
    batch_rows=(1, 4),
    calibration_samples=16,
    search_samples=16,
    holdout_samples=32,
    min_agreement=0.3,  # of random pictures in a random network
    devices=("cpu", "tensorrt"),
    portable=True,
)


def optimized(folder: Path, **changes: object) -> Artifact:
    images = np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "data.npz", image=images)
    return optimize(
        OptimizeRequest(
            model=models.save_cnn(folder / "cnn.onnx"),
            repository=folder / "models",
            name="cnn",
            calibration=folder / "data.npz",
            recipe=msgspec.structs.replace(RECIPE, **changes),
            time_budget_s=0.1,
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return optimized(tmp_path_factory.mktemp("made"))


def form_of(made: Artifact) -> Variant:
    return next(variant for variant in made.variants if variant.name == NAME)


def test_form_is_published_for_tensorrt_with_its_evidence(made: Artifact):
    form = form_of(made)
    assert (form.provider, form.precision, form.options) == ("tensorrt", "int8-static", SessionOptions())
    assert form.fidelity is not None
    assert form.fidelity.agreement >= 0.3
    assert form.golden_min_sqnr_db > 0
    assert form.latency is None, "no device has measured it"
    assert made.variants[0].name != NAME, "what serves on this host comes first"


def test_form_is_symmetric_and_keeps_biases_in_float(made: Artifact):
    graph = onnx.load(made.folder / form_of(made).file).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantized = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantized
    for node in quantized:
        zero = weights[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()


def test_it_is_proven_as_it_is_written(made: Artifact):
    file = made.folder / form_of(made).file
    images = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    session = Session(file, CPU, SessionOptions(config=AS_WRITTEN))
    model = onnx.load(file)
    model.opset_import[0].version = 19  # of which the reference has these operators; they have not changed
    (expected,) = ReferenceEvaluator(model).run(None, {"image": images})
    np.testing.assert_allclose(session.run({"image": images})["logits"], expected, rtol=1e-3, atol=1e-3)


def test_it_is_served_on_no_cpu(made: Artifact):
    model = Model.load(made, (CPU,), Settings(cpu_instances=1), Metrics())
    assert NAME not in model.variants
    assert model.refused[NAME] == "no tensorrt device is usable here"
    model.close()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)
def test_a_real_builder_reads_it(made: Artifact):
    statuses = [record.status for record in read_report(made.folder).engines]
    assert statuses == [f"{NAME}: proven", "fp32: built", f"{NAME}: built"]
    assert {variant.name: variant.engine for variant in made.variants} == {
        "fp32": "engines/fp32.plan",
        NAME: f"engines/{NAME}.plan",
    }
    for variant in made.variants:
        assert digest_of(made.folder / variant.engine) == variant.engine_sha256
        assert variant.profile == Profile(*({"image": (rows, 3, 16, 16)} for rows in (1, 4, 4)))


def test_damaged_plan_is_a_damaged_artifact(made: Artifact, tmp_path: Path):
    copy = tmp_path / "cnn" / "1"
    shutil.copytree(made.folder, copy)
    plan = copy / form_of(made).engine
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{NAME}\.plan has SHA-256"):
        read_artifact(copy)


def test_unfaithful_form_is_refused_with_the_reason_of_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_forms, "unfaithful", lambda fidelity, gate: f"agreement {fidelity.agreement} is too low")
    made = optimized(tmp_path)
    assert NAME not in [variant.name for variant in made.variants]
    assert not (made.folder / NAME).exists()
    (record,) = (record for record in read_report(made.folder).engines if record.status.startswith(NAME))
    assert record.status == f"{NAME}: refused"
    for method in ("minmax", "entropy", "percentile", "mse"):
        assert f"{method}: agreement" in record.reason


@pytest.mark.parametrize("changes", [{"devices": ("cpu",)}, {"precisions": ("fp32",)}])
def test_it_is_made_only_when_asked_for(tmp_path: Path, changes: dict[str, tuple[str, ...]]):
    made = optimized(tmp_path, **changes)
    assert NAME not in [variant.name for variant in made.variants]
    assert not [record for record in read_report(made.folder).engines if record.status.startswith(NAME)]
