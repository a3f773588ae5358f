import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers import calibration as calibration_module
from optimizers.calibration import (
    LEAST_SAMPLES,
    Samples,
    StoredArray,
    read_samples,
    split,
    synthetic_samples,
    why_no_proof,
)
from optimizers.errors import CalibrationError
from optimizers.graph import signature_of
from server.artifact import SessionOptions
from server.providers import Device
from server.session import Session
from server.tensors import Signature, TensorSpec
from tests.models import save_batch_on_axis_1, save_cnn, save_mlp, save_sequence, save_strings, save_two_inputs
from tests.optimizers.graphs import normal

X = TensorSpec("x", "FP32", ("batch", 4))
STATE = TensorSpec("state", "FP32", (2, "batch", 3))
RATE = TensorSpec("rate", "INT64", ())
IDS = TensorSpec("ids", "INT64", ("batch", "sequence"))


def signature(*inputs: TensorSpec) -> Signature:
    return Signature(inputs, (TensorSpec("y", "FP32", ("batch", 1)),))


def save(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where samples are kept."""
    if request.param == "memory":
        return None
    (tmp_path / "samples").mkdir()
    return tmp_path / "samples"


def all_of(samples: Samples, name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in samples.batches(3)])


def test_rows_are_read_in_the_dtype_of_the_model(tmp_path: Path, folder: Path | None) -> None:
    path = save(tmp_path, x=normal(5, 4).astype(np.float64), ids=np.arange(10, dtype=np.uint8).reshape(5, 2))
    samples = read_samples(path, signature(X, IDS), folder=folder)
    assert (samples.count, samples.batched) == (5, True)
    batch = samples.batch(3, 4)
    assert {name: array.dtype for name, array in batch.items()} == {"x": np.float32, "ids": np.int64}
    assert {name: array.shape for name, array in batch.items()} == {"x": (2, 4), "ids": (2, 2)}
    np.testing.assert_array_equal(batch["x"], normal(5, 4)[3:])


def test_inputs_without_batch_axis_hold_one_complete_tensor_per_sample(tmp_path: Path, folder: Path | None) -> None:
    path = save(tmp_path, x=normal(6, 4), state=normal(6, 2, 1, 3), rate=np.full(6, 16000))
    samples = read_samples(path, signature(X, STATE, RATE), folder=folder)
    assert not samples.batched
    one = samples.batch(2, 1)
    assert {name: array.shape for name, array in one.items()} == {"x": (1, 4), "state": (2, 1, 3), "rate": ()}
    np.testing.assert_array_equal(one["state"], normal(6, 2, 1, 3)[2])
    assert isinstance(one["rate"], np.ndarray)
    assert len(samples.batches(4)) == 6
    with pytest.raises(ValueError, match="one sample a run"):
        samples.batch(0, 2)


def test_a_fixed_axis_of_one_takes_rows_that_cannot_share_a_run(tmp_path: Path) -> None:
    samples = read_samples(save(tmp_path, x=normal(3, 4)), signature(TensorSpec("x", "FP32", (1, 4))))
    assert not samples.batched
    assert [batch["x"].shape for batch in samples.batches(8)] == [(1, 4)] * 3


def test_batches_cover_every_sample_once(tmp_path: Path, folder: Path | None) -> None:
    samples = read_samples(save(tmp_path, x=normal(7, 4)), signature(X), folder=folder)
    parts = [batch["x"] for batch in samples.batches(3)]
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), normal(7, 4))
    with pytest.raises(ValueError, match="asked of 7"):
        samples.batch(7, 1)


# Samples on disk


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_PIECE_BYTES", 100)  # 6 rows of X, or 3 before the cast from FP64


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_pieces_make_the_whole_whatever_the_layout(tmp_path: Path, order: str, store: object, dtype: object) -> None:
    x = np.asarray(normal(17, 3, 4), dtype, order=order)
    path = tmp_path / "data.npz"
    store(path, x=x)
    (tmp_path / "samples").mkdir()
    samples = read_samples(path, signature(TensorSpec("x", "FP32", ("n", 3, 4))), folder=tmp_path / "samples")
    np.testing.assert_array_equal(all_of(samples, "x"), normal(17, 3, 4))
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["0.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "samples" / "0.npy"), normal(17, 3, 4))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("row", "value", "reason"), [(16, np.nan, "holds NaN"), (9, 1e-50, "whose values change")])
def test_a_bad_value_is_found_in_any_piece(
    tmp_path: Path, folder: Path | None, row: int, value: float, reason: str
) -> None:
    x = normal(17, 4).astype(np.float64)
    x[row, 3] = value
    with pytest.raises(CalibrationError, match=reason):
        read_samples(save(tmp_path, x=x), signature(X), folder=folder)


@pytest.mark.usefixtures("small_pieces")
def test_an_array_that_ends_early_is_refused(tmp_path: Path, folder: Path | None) -> None:
    path = tmp_path / "data.npz"
    save(tmp_path, x=normal(17, 4))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("x.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content[:-40])
    with pytest.raises(CalibrationError, match=r"cannot read .*data\.npz"):
        read_samples(path, signature(X), folder=folder)


def test_axes_without_elements_are_kept(tmp_path: Path, folder: Path | None) -> None:
    samples = read_samples(save(tmp_path, ids=np.zeros((5, 0), np.int64)), signature(IDS), folder=folder)
    assert samples.batch(0, 3)["ids"].shape == (3, 0)


def test_batches_on_disk_travel_to_another_process_without_their_content(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    x = normal(5000, 4)
    samples = read_samples(save(tmp_path, x=x), signature(X), folder=tmp_path / "samples").take(range(5000)[::-5])
    batches = samples.batches(300)
    content = pickle.dumps(batches)
    assert len(content) < x.nbytes / 5
    again = pickle.loads(content)
    assert len(again) == 4
    assert [len(batch["x"]) for batch in again] == [300, 300, 300, 100]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in again]), x[::-5])
    np.testing.assert_array_equal(again[-1]["x"], batches[3]["x"])
    assert [len(batch["x"]) for batch in again[1:]] == [300, 300, 100]
    assert [len(batch["x"]) for batch in again[::2]] == [300, 300]
    with pytest.raises(IndexError):
        again[4]


def test_samples_are_chosen_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    samples = read_samples(save(tmp_path, x=normal(9, 4)), signature(X), folder=tmp_path / "samples")
    chosen = samples.take([7, 2, 5]).take([2, 0])
    assert chosen.inputs is samples.inputs
    assert isinstance(chosen.inputs["x"], StoredArray)
    np.testing.assert_array_equal(chosen.batch(0, 2)["x"], normal(9, 4)[[5, 7]])


def test_files_that_vanish_or_shrink_are_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    samples = read_samples(save(tmp_path, x=normal(9, 4)), signature(X), folder=tmp_path / "samples")
    file = tmp_path / "samples" / "0.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert samples.batch(7, 1)["x"].shape == (1, 4)
    with pytest.raises(CalibrationError, match=r"0\.npy was cut: sample 8 of 9 is missing"):
        samples.batch(8, 1)
    file.unlink()
    with pytest.raises(CalibrationError, match=r"cannot read .*0\.npy: No such file"):
        samples.batch(0, 1)


def test_text_becomes_bytes(tmp_path: Path) -> None:
    spec = TensorSpec("text", "BYTES", ("batch",))
    for array in (np.array(["grüße", "a"]), np.array(["grüße".encode(), b"a"])):
        samples = read_samples(save(tmp_path, text=array), signature(spec))
        assert samples.inputs["text"].tolist() == ["grüße".encode(), b"a"]
        assert samples.inputs["text"].dtype == np.object_


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, r"holds \[\]; the model takes \['x', 'ids'\]"),
        ({"x": normal(5, 4)}, r"holds \['x'\]; the model takes \['x', 'ids'\]"),
        ({"x": normal(5, 4), "ids": np.zeros((5, 2), int), "z": normal(5)}, r"holds \['ids', 'x', 'z'\]"),
        ({"x": normal(5, 4), "ids": np.zeros((4, 2), int)}, r"different numbers of samples: \{'x': 5, 'ids': 4\}"),
        ({"x": normal(0, 4), "ids": np.zeros((0, 2), int)}, "holds no samples"),
        ({"x": normal(5, 3), "ids": np.zeros((5, 2), int)}, r"'x' has shape \[5, 3\]; the model takes \[-1, 4\]"),
        ({"x": normal(20), "ids": np.zeros((20, 2), int)}, r"'x' has shape \[20\]"),
        ({"x": np.full((5, 4), 1e-50), "ids": np.zeros((5, 2), int)}, "'x' has dtype float64, whose values change"),
        ({"x": normal(5, 4), "ids": np.full((5, 2), 0.5)}, "'ids' has dtype float64, whose values change"),
        ({"x": np.full((5, 4), np.nan), "ids": np.zeros((5, 2), int)}, "'x' holds NaN or infinite"),
        ({"x": np.full((5, 4), np.inf), "ids": np.zeros((5, 2), int)}, "'x' holds NaN or infinite"),
        ({"x": np.full((5, 4), 1 + 1j), "ids": np.zeros((5, 2), int)}, "'x' has dtype complex128"),
        ({"x": np.full((5, 4), "text"), "ids": np.zeros((5, 2), int)}, "'x' has dtype <U4"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        read_samples(save(tmp_path, **arrays), signature(X, IDS))


def test_numbers_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="'text' has dtype float32; the model takes text"):
        read_samples(save(tmp_path, text=normal(3)), signature(TensorSpec("text", "BYTES", ("batch",))))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"cannot read .*data\.npz"):
        read_samples(path, signature(X))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="without objects"):
        read_samples(save(tmp_path, x=np.array([{}, {}], object)), signature(X))


def test_labels_are_one_integer_per_sample(tmp_path: Path) -> None:
    data, labels = save(tmp_path, x=normal(3, 4)), tmp_path / "labels.npz"
    np.savez(labels, labels=np.array([2, 0, 1], np.uint8))
    assert read_samples(data, signature(X), labels).labels.tolist() == [2, 0, 1]
    for wrong in (np.array([1, 2]), np.array([0.5, 1, 2]), np.zeros((3, 1), int)):
        np.savez(labels, labels=wrong)
        with pytest.raises(CalibrationError, match=r"integers of shape \[3\]"):
            read_samples(data, signature(X), labels)
    np.savez(labels, y=np.zeros(3, int))
    with pytest.raises(CalibrationError, match="must hold 'labels'"):
        read_samples(data, signature(X), labels)


def numbered(count: int) -> Samples:
    rows = np.arange(count, dtype=np.float32)
    return Samples({"x": rows[:, None]}, count, batched=True, labels=np.arange(count))


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (2000, (128, 256, 512)),
        (896, (128, 256, 512)),
        (100, (14, 28, 58)),
        (32, (8, 8, 16)),
        (16, (4, 4, 8)),
        (3, (1, 0, 2)),
        (2, (1, 0, 1)),
        (1, (0, 0, 1)),
    ],
)
def test_parts_are_disjoint_and_as_large_as_the_data_allows(count: int, parts: tuple[int, int, int]) -> None:
    drawn = split(numbered(count), 128, 256, 512, seed=0)
    assert tuple(part.count for part in drawn) == parts
    rows = np.concatenate([all_of(part, "x")[:, 0] for part in drawn if part.count])
    assert len(set(rows)) == len(rows) == min(count, 896)
    assert [*drawn[2].labels] == [*all_of(drawn[2], "x")[:, 0]]


@pytest.mark.parametrize(
    "wanted", [(128, 0, 512), (128, 256, 512), (8, 0, 1000), (1000, 0, 16), (500, 500, 20), (4, 90, 9)]
)
def test_the_proof_keeps_half_and_calibration_a_quarter_of_few_samples(wanted: tuple[int, int, int]) -> None:
    calibration_n, search_n, holdout_n = wanted
    for count in range(1, sum(wanted)):
        calibration, search, holdout = (part.count for part in split(numbered(count), *wanted, seed=0))
        assert holdout >= min(holdout_n, count / 2)
        assert calibration >= min(calibration_n, 8, count // 4)
        assert calibration >= min(1, count - 1)
        assert calibration <= calibration_n
        assert search <= search_n
        assert holdout <= holdout_n
        assert calibration + search + holdout <= count


def test_the_seed_decides_which_samples_are_drawn() -> None:
    first, again, other = (all_of(split(numbered(100), 20, 10, 70, seed)[0], "x") for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(np.sort(first, axis=0), first)


def test_too_few_samples_prove_nothing() -> None:
    assert why_no_proof(numbered(LEAST_SAMPLES)) == ""
    assert "15 samples, at least 16 are needed" in why_no_proof(numbered(15))
    assert "--calibration" in why_no_proof(None)


@pytest.mark.parametrize(
    "build", [save_mlp, save_cnn, save_two_inputs, save_strings, save_batch_on_axis_1, save_sequence]
)
def test_synthetic_samples_run_through_any_model(tmp_path: Path, build: object) -> None:
    path = build(tmp_path / "model.onnx")
    session = Session(path, Device("cpu"), SessionOptions())
    samples = synthetic_samples(signature_of(onnx.load(path)), 4, seed=0)
    assert samples.count == 4
    for batch in samples.batches(3):
        outputs = session.run(batch)
        assert all(np.isfinite(array).all() for array in outputs.values() if array.dtype.kind == "f")


def test_synthetic_samples_of_whole_tensors_are_run_one_by_one() -> None:
    samples = synthetic_samples(signature(X, STATE, RATE), 2, seed=0)
    assert {name: array.shape for name, array in samples.batch(1, 1).items()} == {
        "x": (1, 4),
        "state": (2, 16, 3),
        "rate": (),
    }
