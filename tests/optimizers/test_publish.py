"""Publishing: golden samples that can be read back, and a folder that appears whole or not at all."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers.asking import golden_of
from optimizers.building import Built
from optimizers.evidence import HeldOut
from optimizers.graph import save_model
from optimizers.isolation import SERVING, Form
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.sanitize import Sanitize
from optimizers.pipeline import optimize
from optimizers.publish import move_into_place, write_golden, write_variants
from optimizers.recipe import Recipe, VariantPlan, read_recipe
from optimizers.report import read_report
from optimizers.request import OptimizeRequest
from optimizers.trial import Chosen
from server.artifact import Golden, LatencyTable, digest_of, read_golden
from server.errors import ArtifactError
from server.providers import CPU
from server.session import Session
from tests import models
from tests.optimizers.graphs import context_of

TABLE = LatencyTable((1,), (1.0,), (1.0,), (1.0,), (1.0,))


def golden_for(model: Path) -> Golden:
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}
    return Golden(inputs, Session(model, CPU, SERVING).run(inputs))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def chosen(model: Path, name: str = "fp32", from_rows: int = 0) -> Chosen:
    built = Built(name, name, "cpu", name == "fp32", Form(model, digest_of(model)))
    return Chosen(name, built, SERVING, None, TABLE, from_rows)


def save_classifier(path: Path) -> Path:
    """x FP32 [1,64] -> label INT64 [1]; one row at a time, nothing but the class."""
    model = onnx.load(models.save_mlp(path, hidden=256))
    model.graph.node.append(helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0))
    for side, shape in ((model.graph.input, [1, 64]), (model.graph.output, [1])):
        del side[:]
        kind = ("x", onnx.TensorProto.FLOAT) if len(shape) == 2 else ("label", onnx.TensorProto.INT64)
        side.append(helper.make_tensor_value_info(*kind, shape))
    onnx.save(model, path)
    return path


def labels_of(model: Path, samples: np.ndarray) -> np.ndarray:
    session = Session(model, CPU, SERVING)
    return np.concatenate([session.run({"x": row[None]})["label"] for row in samples])


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
    ((variant,), refused) = write_variants(tmp_path, [chosen(mlp)], golden_for(mlp), "host")
    assert refused == {}
    assert variant.file == "fp32/model.onnx"
    assert (tmp_path / variant.file).read_bytes() == mlp.read_bytes()
    assert variant.sha256 == digest_of(mlp)
    assert variant.golden_min_sqnr_db == 60.0
    assert variant.host == "host"


def test_last_resort_that_misses_the_golden_samples_is_an_error(tmp_path: Path, mlp: Path):
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


def test_variant_that_misses_the_golden_samples_is_refused_and_the_next_one_serves(tmp_path: Path, mlp: Path):
    other = models.save_mlp(tmp_path / "other.onnx", seed=1)
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}
    golden = Golden(inputs, {"y": -5 * Session(other, CPU, SERVING).run(inputs)["y"] + golden_for(mlp).outputs["y"]})
    exact = Golden(inputs, golden_for(mlp).outputs)
    assert set(write_variants(made(tmp_path / "a"), [chosen(other, "int8"), chosen(mlp)], exact, "host")[1]) == {"int8"}
    variants, refused = write_variants(made(tmp_path / "b"), [chosen(mlp, "int8"), chosen(mlp)], exact, "host")
    assert ([v.name for v in variants], refused) == (["int8", "fp32"], {})
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["fp32"]
    with pytest.raises(ArtifactError, match="variant fp32 reaches"):
        write_variants(made(tmp_path / "c"), [chosen(mlp, "int8"), chosen(mlp)], golden, "host")


def test_variant_for_large_batches_goes_with_the_first_choice(tmp_path: Path, mlp: Path):
    other = models.save_mlp(tmp_path / "other.onnx", seed=1)
    row = [chosen(other, "int4"), chosen(mlp, "int8", from_rows=8), chosen(mlp)]
    variants, refused = write_variants(made(tmp_path / "a"), row, golden_for(mlp), "host")
    assert [variant.name for variant in variants] == ["fp32"]
    assert refused["int8"] == "it serves large batches beside int4 only, which is refused"
    row[0] = chosen(mlp, "int4")
    variants, refused = write_variants(made(tmp_path / "b"), row, golden_for(mlp), "host")
    assert ([variant.from_rows for variant in variants], refused) == ([0, 8, 0], {})


def test_lost_first_choice_is_told_and_the_original_is_served(tmp_path: Path):
    """A classifier without scores: INT8 gives another label to the one golden sample, and the same to the others."""
    model = save_classifier(tmp_path / "model.onnx")
    plan = VariantPlan("int8", "int8-dynamic", ({"pass": "sanitize"}, {"pass": "int8-dynamic"}))
    recipe = Recipe(
        devices=("cpu",), objective="size", min_agreement=0.9, calibration_samples=8, search_samples=8,
        holdout_samples=48, variants=(plan,),
    )  # fmt: skip
    context = context_of(tmp_path)
    quantized = Int8Dynamic().run(Sanitize().run(onnx.load(model), context).model, context).model
    save_model(quantized, tmp_path / "int8.onnx")
    many = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    same = labels_of(model, many) == labels_of(tmp_path / "int8.onnx", many)
    samples = many[same][:64]
    samples[np.random.default_rng(recipe.seed).permutation(64)[16]] = many[~same][0]  # the first one that is held out
    np.savez(tmp_path / "data.npz", x=samples)

    request = OptimizeRequest(
        model=model, repository=tmp_path / "models", name="m", recipe=recipe, calibration=tmp_path / "data.npz",
        time_budget_s=1.0,
    )  # fmt: skip
    artifact = optimize(request)
    reason = "variant int8 reaches 0.0 dB on the golden samples; it must reach more than 0"
    report = read_report(artifact.folder)
    assert [variant.name for variant in artifact.variants] == ["fp32"]
    assert not (artifact.folder / "int8").exists()
    record = next(record for record in report.candidates if record.name == "int8")
    assert (record.verdict, record.reason) == ("refused", reason)
    assert record.fidelity is not None
    assert record.fidelity.agreement == pytest.approx(47 / 48)
    assert report.headline.startswith(f"int8 was the first choice and is refused: {reason}. fp32 is served: ")
    assert report.chosen == "fp32"
    assert {entry.variant for entry in report.served} == {"original", "fp32"}
    assert [choice.variant for choice in report.knobs] == ["fp32"]
    assert [plan.name for plan in read_recipe(artifact.folder / "recipe.toml").variants] == ["fp32"]
