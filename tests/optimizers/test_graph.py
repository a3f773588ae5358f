from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from optimizers import graph
from optimizers.errors import ModelError
from optimizers.graph import check, foreign_ops, load_model, op_counts, save_model, signature_of
from server.artifact import SessionOptions
from server.errors import UnsupportedModel
from server.providers import Device
from server.session import Session
from tests.models import save_batch_on_axis_1, save_cnn, save_mlp, save_sequence, save_strings, save_two_inputs
from tests.optimizers.graphs import NODE, model_of, normal


@pytest.mark.parametrize(
    "save", [save_mlp, save_cnn, save_two_inputs, save_strings, save_batch_on_axis_1, save_sequence]
)
def test_signature_is_the_one_that_a_session_declares(tmp_path: Path, save: object) -> None:
    path = save(tmp_path / "model.onnx")
    session = Session(path, Device("cpu"), SessionOptions())
    assert signature_of(load_model(path)) == session.signature


def test_unnamed_axes_and_weights_among_the_inputs_match_the_session(tmp_path: Path) -> None:
    weight = normal(3, 4)
    inputs = {"x": [None, 3], "w": [3, 4]}
    model = model_of([NODE("MatMul", ["x", "w"], ["y"])], inputs, {"y": [None, 4]}, {"w": weight})
    save_model(model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", Device("cpu"), SessionOptions())
    assert signature_of(model) == session.signature
    assert signature_of(model).inputs[0].shape == (None, 3)
    assert len(signature_of(model).inputs) == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1]), "'x' is a sequence"),
        (helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1]), "'x' has datatype BFLOAT16"),
    ],
)
def test_tensors_that_cannot_be_served_are_named(value: onnx.ValueInfoProto, reason: str) -> None:
    made = helper.make_model(helper.make_graph([NODE("Identity", ["x"], ["y"])], "g", [value], [value]))
    with pytest.raises(UnsupportedModel, match=reason):
        signature_of(made)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x08"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not an ONNX model"):
        load_model(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*none\.onnx"):
        load_model(tmp_path / "none.onnx")


def test_missing_external_weights_are_refused(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    onnx.save_model(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    assert signature_of(load_model(tmp_path / "big.onnx")) == signature_of(load_model(tmp_path / "model.onnx"))
    (tmp_path / "big.data").unlink()
    with pytest.raises(ModelError):
        load_model(tmp_path / "big.onnx")


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx", seed=1))
    save_model(model, tmp_path / "deeper" / "model.onnx")
    save_model(model, tmp_path / "deeper" / "model.onnx")
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["model.onnx"]
    assert load_model(tmp_path / "deeper" / "model.onnx") == model


def test_large_weights_go_into_a_second_file_and_stay_in_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    before = model.SerializeToString()
    monkeypatch.setattr(graph, "_LARGEST_FILE_BYTES", 1000)
    save_model(model, tmp_path / "large.onnx")
    assert model.SerializeToString() == before
    assert (tmp_path / "large.onnx.data").stat().st_size > 1000
    session = Session(tmp_path / "large.onnx", Device("cpu"), SessionOptions())
    assert session.run({"x": np.zeros((1, 64), np.float32)})["y"].shape == (1, 10)


def test_checked_models_are_valid_and_below_the_ceilings() -> None:
    relu = [NODE("Relu", ["x"], ["y"])]
    check(model_of(relu, {"x": [1]}, {"y": [1]}, opset=26, ir_version=13))
    with pytest.raises(ModelError, match="opset 27 is above 26"):
        check(model_of(relu, {"x": [1]}, {"y": [1]}, opset=27, ir_version=13))
    with pytest.raises(ModelError, match="IR version 14 is above 13"):
        check(model_of(relu, {"x": [1]}, {"y": [1]}, opset=26, ir_version=14))
    with pytest.raises(ModelError, match="checker refuses"):
        check(model_of([NODE("Relu", ["missing"], ["y"])], {"x": [1]}, {"y": [1]}))


def test_operators_are_counted_in_subgraphs_too_with_their_domain() -> None:
    branch = helper.make_graph([NODE("Gelu", ["x"], ["b"], domain="com.microsoft")], "b", [], [])
    model = model_of(
        [NODE("Relu", ["x"], ["y"]), NODE("If", ["c"], ["z"], then_branch=branch, else_branch=branch)], {}, {}
    )
    assert op_counts(model) == {"com.microsoft:Gelu": 2, "If": 1, "Relu": 1}
    assert foreign_ops(model) == ["com.microsoft:Gelu"]
