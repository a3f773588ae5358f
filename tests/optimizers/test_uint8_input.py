"""UINT8 inputs: the rewritten model against numpy and the untouched one."""

import tomllib
from pathlib import Path

import httpx
import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizers import pipeline
from optimizers.errors import CalibrationError, ModelError, RecipeError
from optimizers.graph import load_model, save_model, signature_of
from optimizers.pipeline import existing, optimize
from optimizers.recipe import Recipe, Uint8Input, read_recipe
from optimizers.request import OptimizeRequest
from optimizers.uint8_input import PROVEN_DB, normalized, require_same, with_uint8_inputs
from server.artifact import SessionOptions, read_golden
from server.golden import sqnr_db
from server.providers import CPU
from server.session import Session
from server.tensors import TensorSpec
from tests import models
from tests.end_to_end.process import Server
from tests.optimizers.graphs import FLOAT, NODE, model_of

PHOTO = Uint8Input(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LAST = msgspec.structs.replace(PHOTO, channels_last=True)


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def run(model: onnx.ModelProto, path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    save_model(model, path)
    session = Session(path, CPU, SessionOptions(graph_level="disable"))
    return session.run(inputs)


def elementwise(shape: list, dtype: int = FLOAT) -> onnx.ModelProto:
    """y = -x."""
    model = model_of([NODE("Neg", ["x"], ["y"])], {"x": shape}, {"y": shape})
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = dtype
    return model


def test_channels_are_normalized_as_torchvision_does(tmp_path: Path) -> None:
    model = with_uint8_inputs(elementwise(["n", 3, 4, 5]), {"x": PHOTO})
    x = pictures(2, 3, 4, 5)
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in (PHOTO.mean, PHOTO.std))
    expected = -(x.astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(run(model, tmp_path / "m.onnx", x=x)["y"], expected, rtol=1e-5, atol=1e-6)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Mul", "Add", "Neg"]
    onnx.checker.check_model(model, full_check=True)


def test_channels_last_bytes_are_moved_before_they_become_floats(tmp_path: Path) -> None:
    model = with_uint8_inputs(elementwise(["n", 3, 4, 5]), {"x": LAST})
    assert signature_of(model).inputs == (TensorSpec("x", "UINT8", ("n", 4, 5, 3)),)
    assert [node.op_type for node in model.graph.node][:2] == ["Transpose", "Cast"]
    x = pictures(2, 3, 4, 5)
    first = run(with_uint8_inputs(elementwise(["n", 3, 4, 5]), {"x": PHOTO}), tmp_path / "a.onnx", x=x)["y"]
    last = run(model, tmp_path / "b.onnx", x=np.moveaxis(x, 1, -1).copy())["y"]
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize(
    ("element", "dtype", "rtol"),
    [(TensorProto.FLOAT16, np.float16, 1e-3), (TensorProto.DOUBLE, np.float64, 1e-12)],
)
def test_other_float_inputs_keep_their_type_inside(tmp_path: Path, element: int, dtype: type, rtol: float) -> None:
    # FP16 has 11 bits: one rounding at the end, 2^-11; FP64 has 53.
    model = with_uint8_inputs(elementwise(["n", 3, 2, 2], element), {"x": PHOTO})
    x = pictures(4, 3, 2, 2)
    y = run(model, tmp_path / "m.onnx", x=x)["y"]
    assert y.dtype == dtype
    expected = -normalized(x, PHOTO, ("n", 3, 2, 2), np.dtype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)


def test_what_has_no_effect_is_left_out() -> None:
    model = with_uint8_inputs(elementwise(["n", 8]), {"x": Uint8Input(scale=1.0)})
    assert [node.op_type for node in model.graph.node] == ["Cast", "Neg"]
    assert [node.op_type for node in with_uint8_inputs(elementwise(["n", 8]), {"x": Uint8Input()}).graph.node] == [
        "Cast",
        "Mul",
        "Neg",
    ]


def test_readers_inside_control_flow_read_the_normalized_tensor(tmp_path: Path) -> None:
    shape = helper.make_tensor_value_info("same", FLOAT, ["n", 2])
    branches = {
        f"{branch}_branch": helper.make_graph([NODE(op, ["x"], ["same"])], branch, [], [shape])
        for branch, op in (("then", "Neg"), ("else", "Abs"))
    }
    model = model_of([NODE("If", ["yes"], ["y"], **branches)], {"x": ["n", 2]}, {"y": ["n", 2]})
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    made = with_uint8_inputs(model, {"x": Uint8Input(scale=1.0)})
    assert run(made, tmp_path / "m.onnx", x=np.array([[3, 255]], np.uint8))["y"].tolist() == [[-3.0, -255.0]]


def test_names_that_are_taken_are_not_used_twice(tmp_path: Path) -> None:
    model = model_of(
        [NODE("Neg", ["x"], ["x/cast"], name="x/mul"), NODE("Neg", ["x/cast"], ["y"])], {"x": ["n"]}, {"y": ["n"]}
    )
    made = with_uint8_inputs(model, {"x": Uint8Input(scale=2.0)})
    assert run(made, tmp_path / "m.onnx", x=np.array([7], np.uint8))["y"].tolist() == [14.0]


def test_old_models_stay_valid(tmp_path: Path) -> None:
    old = model_of([NODE("Neg", ["x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]}, opset=7, ir_version=3)
    made = with_uint8_inputs(old, {"x": PHOTO})
    onnx.checker.check_model(made)
    assert signature_of(made).inputs == (TensorSpec("x", "UINT8", ("n", 3)),)
    x = pictures(2, 3)
    expected = -normalized(x, PHOTO, ("n", 3), np.dtype(np.float32))
    np.testing.assert_allclose(run(made, tmp_path / "m.onnx", x=x)["y"], expected, rtol=1e-5, atol=1e-6)


def test_the_given_model_stays_as_it_is() -> None:
    model = elementwise(["n", 3, 4, 5])
    before = model.SerializeToString(deterministic=True)
    with_uint8_inputs(model, {"x": LAST})
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("model", "name", "plan", "error", "reason"),
    [
        (elementwise(["n", 3]), "image", PHOTO, RecipeError, "names 'image'; the model's inputs are x"),
        (elementwise(["n", 3], TensorProto.INT64), "x", PHOTO, RecipeError, r"which is INT64 \['n', 3\]; it must be"),
        (elementwise([]), "x", Uint8Input(), RecipeError, r"which is FLOAT \[\]; it must be .* with axes"),
        (elementwise(["n", 4, 4]), "x", PHOTO, RecipeError, "0 axes behind the first have the 3 channels"),
        (elementwise(["n", 3, 3]), "x", PHOTO, RecipeError, "2 axes behind the first .* channel_axis"),
        (
            elementwise(["n", 3, 4]),
            "x",
            msgspec.structs.replace(PHOTO, channel_axis=2),
            RecipeError,
            "channel_axis of 'x' is 2; .* 3 channels",
        ),
        (elementwise(["n", 3]), "x", Uint8Input(channel_axis=5, channels_last=True), RecipeError, "is 5"),
        (elementwise(["n", 3]), "x", Uint8Input(channels_last=True), RecipeError, "name one with channel_axis"),
        (model_of([], {"x": ["n"]}, {"x": ["n"]}), "x", Uint8Input(), ModelError, "also an output"),
        (
            model_of([NODE("Neg", ["x"], ["y"])], {"x": ["n"]}, {"y": ["n"]}, opset=6),
            "x",
            Uint8Input(),
            ModelError,
            "needs opset 7, the model has 6",
        ),
    ],
)
def test_what_cannot_be_rewritten_is_refused_with_the_reason(
    model: onnx.ModelProto, name: str, plan: Uint8Input, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        with_uint8_inputs(model, {name: plan})


def test_channel_axis_settles_which_axis_it_is(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(PHOTO, channel_axis=2, channels_last=True)
    model = with_uint8_inputs(elementwise(["n", 3, 3, 2]), {"x": plan})
    x = pictures(1, 3, 2, 3)
    expected = -normalized(x, plan, ("n", 3, 3, 2), np.dtype(np.float32))
    assert expected.shape == (1, 3, 3, 2)
    np.testing.assert_allclose(run(model, tmp_path / "m.onnx", x=x)["y"], expected, rtol=1e-5, atol=1e-6)


def test_one_mean_for_all_channels_may_come_with_channels_last(tmp_path: Path) -> None:
    plan = Uint8Input(mean=(0.5,), std=(0.25,), channel_axis=1, channels_last=True)
    y = run(with_uint8_inputs(elementwise(["n", 3, 1]), {"x": plan}), tmp_path / "m.onnx", x=pictures(2, 1, 3))["y"]
    assert y.shape == (2, 3, 1)


def test_proof_fails_when_the_graph_normalizes_otherwise(tmp_path: Path) -> None:
    cnn = models.save_cnn(tmp_path / "cnn.onnx")
    samples = [{"image": pictures(1, 16, 16, 3, seed=seed)} for seed in range(3)]
    save_model(with_uint8_inputs(load_model(cnn), {"image": LAST}), tmp_path / "good.onnx")
    require_same(cnn, tmp_path / "good.onnx", {"image": LAST}, samples)
    swapped = msgspec.structs.replace(LAST, mean=LAST.mean[::-1])
    save_model(with_uint8_inputs(load_model(cnn), {"image": swapped}), tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"sample 0 is answered with .* dB .* at least 60 dB"):
        require_same(cnn, tmp_path / "bad.onnx", {"image": LAST}, samples)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("std = [0.0]", "std is .*; it must be without 0"),
        ("scale = 0.0", "scale is 0.0"),
        ("scale = nan", "scale is nan"),
        ("mean = []", "mean is "),
        ("mean = [inf]", "mean is "),
        ("mean = [1, 2, 3]\nstd = [1, 2]", "std is 2 numbers; it must be as many as mean, 3, or one"),
        ("median = 1", "median"),
    ],
)
def test_a_wrong_normalization_in_a_recipe_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"[uint8_inputs.x]\n{text}\n")
    with pytest.raises(RecipeError, match=reason):
        read_recipe(path)


RECIPE = Recipe(
    precisions=("fp32",),
    compressions=(),
    batch_rows=(1, 8),
    calibration_samples=8,
    search_samples=8,
    holdout_samples=24,
    devices=("cpu",),
    portable=True,
    uint8_inputs={"image": LAST},
)


@pytest.fixture(scope="module")
def request_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> OptimizeRequest:
    folder = tmp_path_factory.mktemp("bytes")
    np.savez(folder / "data.npz", image=pictures(40, 16, 16, 3))
    made = OptimizeRequest(
        model=models.save_cnn(folder / "cnn.onnx"),
        repository=folder / "models",
        name="cnn",
        recipe=RECIPE,
        calibration=folder / "data.npz",
        time_budget_s=0.1,
    )
    optimize(made)
    return made


def test_artifact_takes_bytes_and_its_golden_answers_are_the_original_s(request_of_bytes: OptimizeRequest) -> None:
    artifact = existing(request_of_bytes)
    assert artifact is not None
    assert artifact.manifest is not None
    assert artifact.manifest.signature.inputs == (TensorSpec("image", "UINT8", ("batch", 16, 16, 3)),)
    assert artifact.manifest.batching.batchable
    golden = read_golden(artifact.folder)
    assert golden.inputs["image"].dtype == np.uint8
    floats = normalized(golden.inputs["image"], LAST, ("batch", 3, 16, 16), np.dtype(np.float32))
    original = Session(request_of_bytes.model, CPU, SessionOptions())
    assert sqnr_db(original.run({"image": floats}), golden.outputs) > PROVEN_DB
    for variant in artifact.variants:
        session = Session(artifact.folder / variant.file, CPU, variant.options)
        assert session.signature.inputs == artifact.manifest.signature.inputs
    replay = tomllib.loads((artifact.folder / "recipe.toml").read_text())
    assert replay["uint8_inputs"]["image"]["channels_last"] is True


def test_another_normalization_is_another_request_with_answers_of_its_own(request_of_bytes: OptimizeRequest) -> None:
    plan = msgspec.structs.replace(LAST, scale=1.0)
    other = msgspec.structs.replace(
        request_of_bytes, name="other", recipe=msgspec.structs.replace(RECIPE, uint8_inputs={"image": plan})
    )
    assert existing(msgspec.structs.replace(other, name="cnn")) is None
    golden = read_golden(optimize(other).folder)  # with the cache of the first one
    floats = normalized(golden.inputs["image"], plan, ("batch", 3, 16, 16), np.dtype(np.float32))
    original = Session(request_of_bytes.model, CPU, SessionOptions())
    assert sqnr_db(original.run({"image": floats}), golden.outputs) > PROVEN_DB


def test_a_run_ends_when_the_rewritten_model_is_not_the_original(
    request_of_bytes: OptimizeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto, inputs: dict[str, Uint8Input]) -> onnx.ModelProto:
        swapped = {name: msgspec.structs.replace(plan, mean=plan.mean[::-1]) for name, plan in inputs.items()}
        return with_uint8_inputs(model, swapped)

    monkeypatch.setattr(pipeline, "with_uint8_inputs", wrong)
    with pytest.raises(ModelError, match="sample 0 is answered with"):
        optimize(msgspec.structs.replace(request_of_bytes, name="wrong"))


def test_floats_between_0_and_1_are_no_pictures(request_of_bytes: OptimizeRequest, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=(pictures(40, 16, 16, 3) / 255).astype(np.float32))
    wrong = msgspec.structs.replace(request_of_bytes, calibration=tmp_path / "data.npz")
    with pytest.raises(CalibrationError, match="values change as UINT8"):
        optimize(wrong)


def test_posted_bytes_are_answered_as_the_original_answers_floats(request_of_bytes: OptimizeRequest) -> None:
    x = pictures(4, 16, 16, 3, seed=9)
    floats = normalized(x, LAST, ("batch", 3, 16, 16), np.dtype(np.float32))
    head = {
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [4, 16, 16, 3], "parameters": {"binary_data_size": x.size}}
        ]
    }
    header = msgspec.json.encode(head)
    body = header + x.tobytes()
    assert 4 * (len(body) - len(header)) == floats.nbytes
    with Server(request_of_bytes.repository) as server:
        answer = httpx.post(
            f"{server.url}/v2/models/cnn/infer",
            content=body,
            headers={"inference-header-content-length": str(len(header))},
            timeout=60,
        )
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    expected = Session(request_of_bytes.model, CPU, SessionOptions()).run({"image": floats})["logits"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, rtol=1e-4, atol=1e-5)
