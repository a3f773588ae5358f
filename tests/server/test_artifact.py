import io
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from server.artifact import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    PLAIN_MODEL,
    UNOPTIMIZED,
    Fidelity,
    LatencyTable,
    Manifest,
    Padding,
    SessionOptions,
    Slice,
    digest_of,
    is_complete,
    read_artifact,
    read_golden,
)
from server.errors import ArtifactError
from tests import models
from tests.artifacts import edit_manifest, write_artifact, write_plain


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    options = SessionOptions(intra_op_threads=2, config={"session.x64quantprecision": "1"})
    return write_artifact(tmp_path, "mlp", "3", {"int8": mlp, "fp32": mlp}, options=options)


def manifest_text(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new))


def test_reads_what_was_written(folder: Path):
    artifact = read_artifact(folder)
    assert (artifact.name, artifact.version, artifact.folder) == ("mlp", "3", folder)
    assert [variant.name for variant in artifact.variants] == ["int8", "fp32"]
    assert artifact.variants[0].options.config == {"session.x64quantprecision": "1"}
    assert artifact.manifest.signature.inputs[0].shape == ("batch", 64)


def test_plain_model_is_one_unoptimized_variant(tmp_path: Path, mlp: Path):
    artifact = read_artifact(write_plain(tmp_path, "plain", "1", mlp))
    assert artifact.manifest is None
    (variant,) = artifact.variants
    assert (variant.name, variant.file, variant.size_bytes) == (UNOPTIMIZED, PLAIN_MODEL, mlp.stat().st_size)


def test_folder_is_complete_once_a_manifest_or_a_model_is_there(tmp_path: Path, folder: Path):
    assert is_complete(folder)
    (folder / MANIFEST).unlink()
    assert not is_complete(folder)
    (folder / PLAIN_MODEL).touch()
    assert is_complete(folder)


def test_empty_folder_names_what_is_missing(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"neither manifest\.json nor model\.onnx"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_manifest_is_refused(folder: Path, kept: int):
    raw = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(raw[:kept])
    with pytest.raises(ArtifactError, match=r"cannot read .*manifest\.json"):
        read_artifact(folder)


def test_other_format_is_refused_before_its_fields_are_read(folder: Path):
    (folder / MANIFEST).write_text('{"format": 2, "models": []}')
    with pytest.raises(ArtifactError, match=r"has format 2; this server reads 1: optimize the model again"):
        read_artifact(folder)


def test_missing_format_is_refused(folder: Path):
    manifest_text(folder, f'"format":{FORMAT},', "")
    with pytest.raises(ArtifactError, match="has format null"):
        read_artifact(folder)


def test_unknown_fields_are_tolerated(folder: Path):
    manifest_text(folder, f'"format":{FORMAT},', f'"format":{FORMAT},"from_the_future":{{"a":[1]}},')
    assert read_artifact(folder).name == "mlp"


def test_missing_field_is_named(folder: Path):
    manifest_text(folder, '"name":"mlp",', "")
    with pytest.raises(ArtifactError, match="missing required field `name`"):
        read_artifact(folder)


def test_moved_folder_is_refused(folder: Path):
    moved = folder.rename(folder.parent / "4")
    with pytest.raises(ArtifactError, match="describes mlp/3"):
        read_artifact(moved)


@pytest.mark.parametrize("file", [GOLDEN, "fp32/model.onnx"])
def test_changed_file_is_refused(folder: Path, file: str):
    with (folder / file).open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(ArtifactError, match=rf"{file} has SHA-256 \w{{64}}, the manifest says \w{{64}}"):
        read_artifact(folder)


@pytest.mark.parametrize("file", [GOLDEN, "int8/model.onnx"])
def test_missing_file_is_refused(folder: Path, file: str):
    (folder / file).unlink()
    with pytest.raises(ArtifactError, match=rf"{file} is missing"):
        read_artifact(folder)


@pytest.mark.parametrize("file", ["../../x.onnx", "/etc/hostname", "int8/../../../x.onnx"])
def test_file_outside_the_artifact_is_refused(folder: Path, tmp_path: Path, file: str):
    (tmp_path / "x.onnx").write_bytes((folder / "int8/model.onnx").read_bytes())
    manifest_text(folder, "int8/model.onnx", file)
    with pytest.raises(ArtifactError, match="lies outside the artifact"):
        read_artifact(folder)


def test_link_that_leads_outside_is_refused(folder: Path, mlp: Path):
    (folder / "int8/model.onnx").unlink()
    (folder / "int8/model.onnx").symlink_to(mlp)
    with pytest.raises(ArtifactError, match="lies outside the artifact"):
        read_artifact(folder)


def test_two_variants_of_one_name_are_refused(folder: Path):
    variants = read_artifact(folder).variants
    edit_manifest(folder, variants=(variants[0], variants[0]))
    with pytest.raises(ArtifactError, match=r"\['int8', 'int8'\]; each name may occur once"):
        read_artifact(folder)


def test_golden_holds_inputs_and_outputs(folder: Path):
    golden = read_golden(folder)
    assert golden.inputs["x"].shape == (4, 64)
    assert golden.outputs["y"].shape == (4, 10)


def test_golden_text_is_bytes(tmp_path: Path):
    golden = read_golden(
        write_artifact(tmp_path, "text", "1", {"fp32": models.save_strings(tmp_path / "strings.onnx")})
    )
    for array in (golden.inputs["text"], golden.outputs["same"]):
        assert array.dtype == np.object_
        assert all(type(element) is bytes for element in array)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        npz(**{"input/x": np.ones(100)})[:-40],
        npz(**{"input/x": np.array([{}], object)}),
        npz(**{"other/x": np.ones(1)}),
        npz(**{"input/x": np.ones(100)}).replace(np.ones(1).tobytes(), np.zeros(1).tobytes()),
    ],
    ids=["empty", "garbage", "truncated", "pickle", "other key", "damaged"],
)
def test_unreadable_golden_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / GOLDEN).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        read_golden(tmp_path)


def test_missing_golden_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        read_golden(tmp_path)


def test_golden_in_an_archive_without_arrays_is_empty(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / GOLDEN, "w"):
        pass
    assert read_golden(tmp_path).inputs == {}


def table(*times: tuple[int, float]) -> LatencyTable:
    sizes, ms = zip(*times, strict=True)
    return LatencyTable(sizes, ms, ms, ms, ms)


def test_prediction_is_linear_between_sizes_and_beyond():
    found = table((1, 1.0), (4, 2.5), (8, 6.5))
    seen = [round(found.predict_s(rows) * 1e3, 6) for rows in (1, 2, 4, 6, 8, 10)]
    assert seen == [1.0, 1.5, 2.5, 4.5, 6.5, 8.5]
    assert table((4, 2.0)).predict_s(32) == 2e-3
    assert table((4, 2.0), (8, 3.0)).predict_s(1) == 2e-3


def test_best_rows_is_the_smallest_size_near_the_best_rate():
    assert table((1, 1.0), (2, 1.2), (4, 2.35), (8, 4.7)).best_rows() == 2
    assert table((1, 1.0), (2, 1.2), (4, 2.35), (8, 4.7)).best_rows(tolerance=0.0) == 4


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        (((1, 1.0), (2, 1.96), (4, 3.84), (8, 7.6)), 1),  # some per cent, for eight times the wait
        (((1, 1.0), (2, 1.96), (4, 3.0), (8, 6.0)), 4),  # what pays may come late
        (((1, 1.0), (2, 1.9), (4, 3.8)), 2),
        (((1, 1.0), (8, 8.5)), 1),
        (((1, 1.0), (8, 1.5), (32, 5.0)), 32),
    ],
)
def test_larger_batches_must_gain_with_every_doubling(times: tuple[tuple[int, float], ...], rows: int):
    assert table(*times).paying_rows() == rows


@pytest.mark.parametrize(
    ("rows", "times"), [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 2.0)), ((1, 1), (1.0, 1.0)), ((0, 1), (1.0, 1.0))]
)
def test_inconsistent_table_is_refused(rows: tuple[int, ...], times: tuple[float, ...]):
    with pytest.raises(ValueError, match="batch size"):
        LatencyTable(rows, times, times, times, times)


def test_inconsistent_table_makes_the_manifest_unreadable(folder: Path):
    raw = msgspec.json.decode((folder / MANIFEST).read_bytes())
    raw["variants"][0]["latency"] = {"rows": [1, 2], "p50_ms": [1], "p99_ms": [1], "low_ms": [1], "high_ms": [1]}
    (folder / MANIFEST).write_bytes(msgspec.json.encode(raw))
    with pytest.raises(ArtifactError, match="one time per batch size"):
        read_artifact(folder)


def test_manifest_survives_a_round_trip(folder: Path):
    manifest = read_artifact(folder).manifest
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest


def test_manifest_of_before_the_proofs_grew_still_reads(folder: Path):
    """Only what the first manifests had; the rest is unknown, not zero."""
    edit_manifest(folder)
    raw = msgspec.json.decode((folder / MANIFEST).read_bytes())
    raw.pop("padding", None)
    raw["variants"][0]["fidelity"] = {
        "samples": 512,
        "agreement": 1.0,
        "agreement_low": 0.99,
        "decision": "top1",
        "cosine": 1.0,
        "cosine_worst": 0.9,
        "sqnr_db": 40.0,
    }
    (folder / MANIFEST).write_bytes(msgspec.json.encode(raw))
    manifest = read_artifact(folder).manifest
    found = manifest.variants[0].fidelity
    assert manifest.padding is None
    assert (found.top5_agreement, found.kl, found.worst_slice, found.cosine_low) == (None, None, None, None)
    assert (found.sqnr_by_output, found.accuracy_drop_high) == ({}, None)


def test_proofs_survive_a_round_trip(folder: Path):
    fidelity = Fidelity(
        64,
        1.0,
        0.94,
        "tokens",
        1.0,
        0.9,
        40.0,
        0.9,
        0.91,
        None,
        0.01,
        {"y": 40.0},
        Slice("class 3", 16, 0.9, 0.7),
        0.99,
    )
    padding = Padding(True, "proven", {"ids": 1}, {"y": 1})
    variants = read_artifact(folder).variants
    edit_manifest(folder, variants=(msgspec.structs.replace(variants[0], fidelity=fidelity),), padding=padding)
    manifest = read_artifact(folder).manifest
    assert manifest.variants[0].fidelity == fidelity
    assert manifest.padding == padding


def test_weights_beside_a_model_file_are_checked_and_the_name_stays(folder: Path):
    weights = folder / "fp32" / "model.onnx.data"
    weights.write_bytes(b"weights")
    int8, fp32 = read_artifact(folder).variants
    fp32 = msgspec.structs.replace(fp32, weights={weights.name: digest_of(weights)})
    edit_manifest(folder, variants=(int8, fp32))
    artifact = read_artifact(folder)
    assert (artifact.name, artifact.version) == ("mlp", "3")
    weights.write_bytes(b"others")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data has SHA-256"):
        read_artifact(folder)
