"""Requests: what an artifact follows from, and which versions there are."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from optimizers.errors import OptimizerError
from optimizers.passes.catalog import EXACT
from optimizers.recipe import Recipe
from optimizers.request import Digests, OptimizeRequest, digests_of, find_existing, versions_in
from server.artifact import Source
from server.errors import ArtifactError
from server.host import read_host
from tests import models
from tests.artifacts import edit_manifest, write_artifact


@pytest.fixture
def request_(mlp: Path, tmp_path: Path) -> OptimizeRequest:
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 64), np.float32))
    return OptimizeRequest(model=mlp, repository=tmp_path / "models", name="mlp", calibration=tmp_path / "data.npz")


def test_digests_are_the_same_twice(request_: OptimizeRequest):
    host = read_host()
    assert digests_of(request_, host, list(EXACT)) == digests_of(request_, host, list(EXACT))


def test_digests_follow_model_data_recipe_passes_and_host(request_: OptimizeRequest, tmp_path: Path):
    host = read_host()
    base = digests_of(request_, host, list(EXACT))
    other_model = models.save_mlp(tmp_path / "other.onnx", seed=1)
    changed = msgspec.structs.replace
    assert digests_of(changed(request_, model=other_model), host, list(EXACT)).source != base.source
    assert digests_of(changed(request_, calibration=None), host, list(EXACT)).inputs == ""
    assert digests_of(changed(request_, recipe=Recipe(seed=1)), host, list(EXACT)).recipe != base.recipe
    assert digests_of(request_, host, list(EXACT[1:])).recipe != base.recipe
    assert digests_of(request_, changed(host, cores=99), list(EXACT)).host != base.host


def test_source_digest_covers_external_weights(request_: OptimizeRequest, mlp: Path, tmp_path: Path):
    digests = []
    for seed in (0, 1):
        proto = onnx.load(models.save_mlp(tmp_path / "m.onnx", seed=seed))
        place = tmp_path / str(seed) / "m.onnx"
        place.parent.mkdir()
        onnx.save_model(proto, place, save_as_external_data=True, location="m.data", size_threshold=0)
        request = msgspec.structs.replace(request_, model=place)
        digests.append(digests_of(request, read_host(), []).source)
    assert digests[0] != digests[1], "two models that share a graph but not weights are two models"


def test_versions_are_numbers_in_order(tmp_path: Path):
    for name in ("10", "9", "latest", "2.tmp"):
        (tmp_path / name).mkdir()
    assert versions_in(tmp_path) == [9, 10]
    assert versions_in(tmp_path / "missing") == []


def test_plain_or_damaged_versions_are_not_mistaken_for_the_artifact(request_: OptimizeRequest):
    digests = digests_of(request_, read_host(), list(EXACT))
    folder = request_.repository / "mlp"
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(request_.model.read_bytes())
    (folder / "2" / "manifest.json").write_text("{")
    assert find_existing(request_, digests) is None
    with pytest.raises(ArtifactError):
        find_existing(msgspec.structs.replace(request_, version=1), digests)


def publish(request: OptimizeRequest, version: str, digests: Digests, **changes: object) -> None:
    """Write a version that follows from these digests, apart from the changes."""
    folder = write_artifact(request.repository, request.name, version, {"fp32": request.model})
    made = {
        "source": Source("mlp.onnx", digests.source, 1),
        "recipe_sha256": digests.recipe,
        "inputs_sha256": digests.inputs,
        "host": {"fingerprint": digests.host},
        "tools": digests.tools,
    }
    edit_manifest(folder, **{**made, **changes})


def test_newest_version_of_the_same_content_is_found(request_: OptimizeRequest):
    digests = digests_of(request_, read_host(), list(EXACT))
    for version in ("2", "9", "10"):
        publish(request_, version, digests)
    publish(request_, "11", digests, recipe_sha256="another recipe")
    found = find_existing(request_, digests)
    assert found is not None
    assert found.version == "10"
    named = find_existing(msgspec.structs.replace(request_, version=2), digests)
    assert named is not None
    assert named.version == "2"
    assert find_existing(msgspec.structs.replace(request_, version=12), digests) is None
    with pytest.raises(ArtifactError, match="versions never change"):
        find_existing(msgspec.structs.replace(request_, version=11), digests)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": Source("mlp.onnx", "another model", 1)},
        {"recipe_sha256": "another recipe"},
        {"inputs_sha256": "other samples"},
        {"host": {"fingerprint": "another host"}},
        {"host": {}},
        {"tools": {"onnxruntime": "0.1"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_version_of_other_content_is_not_found(request_: OptimizeRequest, changes: dict[str, object]):
    digests = digests_of(request_, read_host(), list(EXACT))
    publish(request_, "1", digests, **changes)
    assert find_existing(request_, digests) is None


def test_labels_belong_to_the_inputs(request_: OptimizeRequest, tmp_path: Path):
    host, found = read_host(), set()
    for label in (None, 0, 1):
        labels = tmp_path / f"{label}.npz"
        if label is not None:
            np.savez(labels, labels=np.full(20, label))
        request = msgspec.structs.replace(request_, labels=None if label is None else labels)
        found.add(digests_of(request, host, []).inputs)
    assert len(found) == 3


def test_missing_file_is_named(request_: OptimizeRequest, tmp_path: Path):
    gone = msgspec.structs.replace(request_, calibration=tmp_path / "gone.npz")
    with pytest.raises(OptimizerError, match=r"gone\.npz"):
        digests_of(gone, read_host(), [])
