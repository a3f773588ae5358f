"""Publishing: golden samples that can be read back, and a folder that appears whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from optimizers.asking import golden_of
from optimizers.building import Built
from optimizers.evidence import HeldOut
from optimizers.isolation import SERVING, Form
from optimizers.publish import move_into_place, write_golden, write_variants
from optimizers.trial import Chosen
from server.artifact import Golden, LatencyTable, digest_of, read_golden
from server.errors import ArtifactError
from server.providers import CPU
from server.session import Session
from tests import models

TABLE = LatencyTable((1,), (1.0,), (1.0,), (1.0,), (1.0,))


def golden_for(model: Path) -> Golden:
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}
    return Golden(inputs, Session(model, CPU, SERVING).run(inputs))


def chosen(model: Path) -> Chosen:
    return Chosen("fp32", Built("fp32", "fp32", "cpu", True, Form(model, digest_of(model))), SERVING, None, TABLE)


def test_golden_takes_a_few_samples_as_one_request():
    singles = tuple({"x": np.full((1, 2), i, np.float32)} for i in range(20))
    reference = {"y": np.arange(20.0)}
    golden = golden_of(None, HeldOut(singles, reference, "close"), batchable=True)  # type: ignore[arg-type]
    assert golden.inputs["x"][:, 0].tolist() == golden.outputs["y"].tolist() == list(range(8))


def test_golden_of_an_unbatchable_model_is_one_complete_request(tmp_path: Path):
    session = Session(models.save_batch_on_axis_1(tmp_path / "m.onnx"), CPU, SERVING)
    singles = tuple({"x": np.full((1, 4), i, np.float32)} for i in range(3))
    golden = golden_of(
        session, HeldOut(singles, {"state": np.zeros((3, 2, 1, 4), np.float32)}, "close"), batchable=False
    )
    assert golden.outputs["state"].shape == (2, 1, 4)


def test_golden_can_be_read_back_also_with_text(tmp_path: Path):
    golden = Golden({"text": np.array([b"a", b"bc"], object)}, {"y": np.ones((2, 3), np.float32)})
    write_golden(tmp_path, golden)
    found = read_golden(tmp_path)
    assert found.inputs["text"].tolist() == [b"a", b"bc"]
    np.testing.assert_array_equal(found.outputs["y"], golden.outputs["y"])


def test_golden_file_does_not_depend_on_the_time(tmp_path: Path, mlp: Path):
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_golden(tmp_path / name, golden_for(mlp))
        digests.add(digest_of(tmp_path / name / "golden.npz"))
    assert len(digests) == 1


def test_variant_is_bound_to_what_it_reached(tmp_path: Path, mlp: Path):
    (variant,) = write_variants(tmp_path, [chosen(mlp)], golden_for(mlp), "host")
    assert variant.file == "fp32/model.onnx"
    assert (tmp_path / variant.file).read_bytes() == mlp.read_bytes()
    assert variant.sha256 == digest_of(mlp)
    assert variant.golden_min_sqnr_db == 60.0
    assert variant.host == "host"


def test_variant_that_misses_its_golden_samples_is_not_written_as_servable(tmp_path: Path, mlp: Path):
    golden = golden_for(mlp)
    other = Golden(golden.inputs, {"y": -golden.outputs["y"]})
    with pytest.raises(ArtifactError, match=r"fp32 reaches -6\.0 dB"):
        write_variants(tmp_path, [chosen(mlp)], other, "host")


def test_folder_moves_into_place_once(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    move_into_place(tmp_path / "first", tmp_path / "models" / "m" / "1")
    with pytest.raises(ArtifactError, match="--version"):
        move_into_place(tmp_path / "second", tmp_path / "models" / "m" / "1")
    assert (tmp_path / "models" / "m" / "1" / "file").read_text() == "first"
