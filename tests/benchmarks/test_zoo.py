"""The zoo's models: those that need no download in full, of the others what can be tried without one."""

import dataclasses
import io
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.zoo import __main__ as command
from benchmarks.zoo import centerface, efficientnet, models
from benchmarks.zoo.photographs import random_crops, to_input
from benchmarks.zoo.torch_file import read_weights
from deploy.quickstart.packages import QuickstartError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "zoo"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    assert command.main(["digits-cnn", "digits-mlp", "--into", str(folder)]) == 0
    return folder


def session_of(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # CenterFace declares its weights as inputs
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def test_digits_cnn_is_right_on_digits_that_it_has_not_seen(zoo: Path) -> None:
    images, labels = (np.load(zoo / "digits-cnn" / f"{n}.npz")[k] for n, k in (("data", "input"), ("labels", "labels")))
    assert (images.shape, images.dtype, labels.dtype) == ((700, 1, 8, 8), np.float32, np.int64)
    (logits,) = session_of(zoo / "digits-cnn").run(None, {"input": images})
    assert (logits.argmax(axis=1) == labels).mean() > 0.95


def test_digits_mlp_has_two_outputs_that_agree(zoo: Path) -> None:
    images, labels = (np.load(zoo / "digits-mlp" / f"{n}.npz")[k] for n, k in (("data", "X"), ("labels", "labels")))
    session = session_of(zoo / "digits-mlp")
    assert [output.name for output in session.get_outputs()] == ["label", "probabilities"]
    label, probabilities = session.run(None, {"X": images})
    assert (label == labels).mean() > 0.95
    assert (probabilities.argmax(axis=1) == label).all()


def test_a_second_run_takes_what_is_there(zoo: Path, capsys: pytest.CaptureFixture) -> None:
    made = (zoo / "digits-cnn" / "model.onnx").stat().st_mtime_ns
    assert command.main(["digits-cnn", "--into", str(zoo)]) == 0
    assert (zoo / "digits-cnn" / "model.onnx").stat().st_mtime_ns == made
    assert (
        f"digits-cnn, a convolutional classifier: built from scikit-learn in {zoo / 'digits-cnn'}"
        in capsys.readouterr().out
    )


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["digits-cnn", "resnet"])
    assert stopped.value.code == 2
    assert "no model is called resnet; there are digits-cnn, digits-mlp, efficientnet-lite0" in capsys.readouterr().err


def test_a_model_that_cannot_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(folder: Path, scratch: Path) -> None:
        raise QuickstartError("no network")

    def write(folder: Path, scratch: Path) -> None:
        (folder / "model.onnx").touch()

    first, second = (dataclasses.replace(models.DIGITS_CNN, name=n, prepare=p) for n, p in (("a", fail), ("b", write)))
    monkeypatch.setattr(command, "ZOO", {"a": first, "b": second})
    assert command.main(["--into", str(tmp_path)]) == 1
    assert "a: no network" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_crops_are_reproducible_and_differ() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    first, second = (list(random_crops(pictures, 4, 16, np.random.default_rng(0))) for _ in range(2))
    assert {(crop.shape, crop.dtype.name) for crop in first} == {((16, 16, 3), "uint8")}
    np.testing.assert_array_equal(first, second)
    assert len({crop.tobytes() for crop in first}) == 4


def test_inputs_are_scaled_and_have_channels_first() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 1] = (255, 127, 0)
    seen = to_input([picture, picture], 2, 127.0, 128.0)
    assert (seen.shape, seen.dtype) == ((2, 3, 2, 2), np.float32)
    np.testing.assert_array_equal(seen[1, :, 0, 1], [1.0, 0.0, -127 / 128])


def test_the_middle_of_a_wide_picture_is_taken() -> None:
    columns = np.repeat(np.linspace(0, 255, 600).astype(np.uint8)[None, :, None], 300, axis=0).repeat(3, axis=2)
    seen = np.asarray(efficientnet.centre(Image.fromarray(columns)))
    assert seen.shape == (224, 224, 3)
    assert abs(float(seen.mean()) - 127.5) < 2


def test_declared_shapes_are_replaced() -> None:
    shape = [10, 3, 32, 32]
    outputs = [helper.make_tensor_value_info(f"o{i}", TensorProto.FLOAT, [10, 1, 8, 8]) for i in range(4)]
    names = ("w1", "w2", "w3", "w4")
    nodes = [helper.make_node("Conv", ["x", n], [f"o{i}"], strides=[4, 4]) for i, n in enumerate(names)]
    weights = [
        numpy_helper.from_array(np.ones((c, 3, 4, 4), np.float32), n)
        for c, n in zip(centerface.OUTPUT_CHANNELS, names, strict=True)
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in weights]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = centerface.with_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["N", 3, 128, 128]
    seen = session.run(None, {"x": np.zeros((3, 3, 128, 128), np.float32)})
    declared = [output.shape for output in session.get_outputs()]
    assert declared == [["N", *array.shape[1:]] for array in seen]


def torch_file(path: Path, tensors: dict[str, object], monkeypatch: pytest.MonkeyPatch, elements: np.ndarray) -> Path:
    """Write a file as torch before 1.6 did; each tensor is what ``__reduce__`` of a tensor gave."""

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", storage, "0", "cpu", elements.size, None) if obj == "STORAGE" else None

    modules = {"torch": ModuleType("torch"), "torch._utils": ModuleType("torch._utils")}
    storage = type("FloatStorage", (), {"__module__": "torch"})
    modules["torch"].FloatStorage = storage  # type: ignore[attr-defined]

    def _rebuild_tensor_v2(*_: object) -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]

    class Tensor:
        def __init__(self, place: tuple) -> None:
            self.place = place

        def __reduce__(self) -> tuple:
            return _rebuild_tensor_v2, ("STORAGE", *self.place, False, OrderedDict())

    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        content = io.BytesIO()
        for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(head, content, protocol=2)
        places = ((n, Tensor(t) if isinstance(t, tuple) else t) for n, t in tensors.items())
        Writer(content, protocol=2).dump(OrderedDict(places))
        pickle.dump(["0"], content, protocol=2)
    path.write_bytes(content.getvalue() + struct.pack("<q", elements.size) + elements.tobytes())
    return path


def test_weights_with_strides_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = np.arange(10, dtype=np.float32)
    tensors = {"plain": (0, (2, 3), (3, 1)), "transposed": (4, (3, 2), (1, 3)), "scalar": (9, (), ())}
    seen = read_weights(torch_file(tmp_path / "w.pth", tensors, monkeypatch, elements))
    np.testing.assert_array_equal(seen["plain"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(seen["transposed"], [[4, 7], [5, 8], [6, 9]])
    assert seen["scalar"] == 9


def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(tmp_path / "w.pth", {"long": (0, (11,), (1,))}, monkeypatch, np.zeros(10, np.float32))
    with pytest.raises(QuickstartError, match="outside of its storage"):
        read_weights(path)


def test_a_file_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(tmp_path / "w.pth", {"evil": print}, monkeypatch, np.zeros(1, np.float32))
    with pytest.raises(QuickstartError, match=r"it refers to (builtins|__builtin__)\.print"):
        read_weights(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(QuickstartError, match=r"w\.pth is not a state dictionary"):
        read_weights(tmp_path / "w.pth")


def cached(name: str) -> Path:
    stamp = CACHE / name / "made-by"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != models.ZOO[name].stamp:
        pytest.skip(f"{name} is not in {CACHE}, or out of date; run: python -m benchmarks.zoo {name}")
    return CACHE / name


@pytest.mark.real_model
def test_efficientnet_knows_what_is_on_the_labelled_pictures() -> None:
    folder = cached("efficientnet-lite0")
    labelled = np.load(folder / "labelled.npz")
    (logits,) = session_of(folder).run(None, {"input": labelled["input"]})
    assert (logits.argmax(axis=1) == labelled["labels"]).mean() >= 0.9  # with another preprocessing it is 0.75


@pytest.mark.real_model
def test_centerface_finds_the_faces_and_little_else() -> None:
    folder = cached("centerface")
    images = np.load(folder / "data.npz")["input.1"]
    assert images.shape == (704, 3, 128, 128)
    outputs = session_of(folder).run(None, {"input.1": images[:32]})
    assert [array.shape[1] for array in outputs] == list(centerface.OUTPUT_CHANNELS)
    best = outputs[0].reshape(32, -1).max(axis=1)
    assert np.median(best[1::2]) > 0.5 > 0.1 > np.median(best[::2])  # every other picture has a face in it


def test_every_package_is_pinned_by_digest() -> None:
    for package in (package for model in models.ZOO.values() for package in model.packages):
        assert len(package.sha256) == 64
