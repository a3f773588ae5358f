"""A variant cut into stages: proven, written, served, or refused with the reason."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from optimizers.errors import RecipeError
from optimizers.pipeline import optimize
from optimizers.recipe import Recipe, read_recipe
from optimizers.report import read_report
from optimizers.request import OptimizeRequest
from server import session
from server.artifact import Artifact, read_artifact
from server.errors import ArtifactError
from server.lanes import Lanes
from server.providers import CPU, Device, open_ort_session
from server.staged import StagedSession
from tests.artifacts import edit_manifest
from tests.models import save_cnn

RECIPE = Recipe(precisions=("fp32",), compressions=(), devices=("cpu",), batch_rows=(1, 4), stages=2, portable=True)


def cut(model: Path, repository: Path, calibration: Path | None = None, **changes: object) -> Artifact:
    recipe = msgspec.structs.replace(RECIPE, **changes)
    request = OptimizeRequest(
        model=model, repository=repository, name="m", calibration=calibration, recipe=recipe, time_budget_s=5.0
    )
    return optimize(request)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("staged")
    return cut(save_cnn(folder / "cnn.onnx"), folder / "models")


def test_staged_variant_leads_and_its_files_are_there(staged: Artifact):
    first, second = staged.variants[:2]
    assert (first.name, len(first.stages), second.stages) == (f"{second.name}-2-stages", 1, {})
    assert first.latency is not None
    assert first.latency.rows == (1, 4)
    (record,) = read_report(staged.folder).engines
    assert record.status == f"{first.name}: built"
    assert record.facts["stages"].startswith("2, of ")
    assert "bytes" in record.facts["crossing per row"]


def test_served_lanes_are_as_many_as_stages_and_share_them(staged: Artifact):
    lanes = Lanes(staged, (CPU,), cpu_instances=0)
    try:
        specs = [spec for spec in lanes.specs if spec.variant == staged.variants[0].name]
        assert len(specs) == 2
        assert specs[0].runner is specs[1].runner
        assert isinstance(specs[0].runner, StagedSession)
        whole = next(spec.runner for spec in lanes.specs if spec.variant == staged.variants[1].name)
        inputs = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}
        np.testing.assert_allclose(specs[0].runner.run(inputs)["logits"], whole.run(inputs)["logits"], atol=1e-5)
    finally:
        lanes.close()


@pytest.mark.parametrize(("indices", "expected"), [((0, 1), ["cuda:0", "cuda:1"]), ((1,), ["cuda:1", "cuda:1"])])
def test_stages_go_to_the_devices_of_their_kind_in_turn(
    staged: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indices: tuple[int, ...], expected: list[str]
):
    """On the CPU, which stands for the GPUs."""
    monkeypatch.setattr(session, "open_ort_session", lambda path, device, options: open_ort_session(path, CPU, options))
    copy = shutil.copytree(staged.folder, tmp_path / "m" / staged.version)
    first, *others = staged.variants
    edit_manifest(copy, variants=(msgspec.structs.replace(first, provider="cuda"), *others))
    lanes = Lanes(read_artifact(copy), (*(Device("cuda", index) for index in indices), CPU), cpu_instances=0)
    try:
        specs = [spec for spec in lanes.specs if spec.variant == first.name]
        assert [spec.device for spec in specs] == [expected[0]] * 2
        (runner,) = {id(spec.runner): spec.runner for spec in specs}.values()
        assert isinstance(runner, StagedSession)
        assert [device.name for device in runner.devices] == expected
    finally:
        lanes.close()


def test_damaged_stage_is_found(staged: Artifact, tmp_path: Path):
    copy = shutil.copytree(staged.folder, tmp_path / "m" / staged.version)
    (file,) = staged.variants[0].stages
    (copy / file).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="stage-2"):
        read_artifact(copy)


def test_too_few_places_are_told_and_the_rest_is_served(tmp_path: Path, mlp: Path):
    artifact = cut(mlp, tmp_path / "models", stages=16)
    assert all(not variant.stages for variant in artifact.variants)
    assert not list(artifact.folder.glob("*-stages"))
    (record,) = read_report(artifact.folder).engines
    assert record.status.endswith("-16-stages: refused")
    assert "16 stages need more" in record.reason


def test_weights_that_fit_no_device_are_told(tmp_path: Path, mlp: Path):
    artifact = cut(mlp, tmp_path / "models", stage_bytes=16)
    (record,) = read_report(artifact.folder).engines
    assert record.reason == "no choice of cuts leaves at most 16 bytes of weights to each of 2 stages"


@pytest.mark.parametrize("text", ["stages = 0", "stages = 17", "stage_bytes = -1"])
def test_impossible_stages_are_refused(tmp_path: Path, text: str):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=text.split(" = ")[0]):
        read_recipe(tmp_path / "recipe.toml")
