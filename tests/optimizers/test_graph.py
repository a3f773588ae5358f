from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from optimizers import graph
from optimizers.errors import ModelError
from optimizers.graph import (
    check,
    files_of,
    foreign_ops,
    load_model,
    op_counts,
    save_model,
    signature_of,
    tensors_of,
    weight_bytes,
)
from optimizers.passes.check import require_equivalent
from optimizers.passes.fold import Fold
from optimizers.passes.fusion import Fuse, OrtBasic
from optimizers.passes.opset import RaiseOpset
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.simplify import Simplify
from server.artifact import SessionOptions
from server.errors import UnsupportedModel
from server.providers import Device
from server.session import Session
from tests.models import save_batch_on_axis_1, save_cnn, save_mlp, save_sequence, save_strings, save_two_inputs
from tests.optimizers.graphs import NODE, context_of, model_of, normal


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
    outside = [
        t for t in onnx.load(tmp_path / "large.onnx", load_external_data=False).graph.initializer if not t.raw_data
    ]
    offsets = [int(entry.value) for tensor in outside for entry in tensor.external_data if entry.key == "offset"]
    assert len(offsets) > 1
    assert all(offset % 4096 == 0 for offset in offsets)  # so that sessions can map them
    again = load_model(tmp_path / "large.onnx")
    for tensor in again.graph.initializer:
        tensor.ClearField("data_location")  # reading sets it to where the weights are now, which is the default
    assert again == model
    session = Session(tmp_path / "large.onnx", Device("cpu"), SessionOptions())
    assert session.run({"x": np.zeros((1, 64), np.float32)})["y"].shape == (1, 10)


def test_every_field_of_a_large_model_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    model.producer_name, model.graph.doc_string = "a tool", "a graph"
    model.metadata_props.add(key="made", value="once")
    model.graph.initializer[0].segment.end = 7
    monkeypatch.setattr(graph, "_LARGEST_FILE_BYTES", 1000)
    save_model(model, tmp_path / "large.onnx")
    read = load_model(tmp_path / "large.onnx")
    assert (read.producer_name, read.graph.doc_string) == ("a tool", "a graph")
    assert read.metadata_props == model.metadata_props
    assert read.graph.initializer[0].segment.end == 7


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


def with_hidden_weights() -> onnx.ModelProto:
    """Weights as an initializer, in a Constant node, and in both branches of an If."""
    tensors = {name: numpy_helper.from_array(normal(16, seed=index), name) for index, name in enumerate("abcd")}
    then = helper.make_graph([NODE("Add", ["x", "c"], ["t"])], "then", [], [_float("t")], [tensors["c"]])
    otherwise = helper.make_graph(
        [NODE("Constant", [], ["k"], value=tensors["d"]), NODE("Add", ["x", "k"], ["e"])], "else", [], [_float("e")]
    )
    nodes = [
        NODE("Constant", [], ["b"], value=tensors["b"]),
        NODE("ReduceSum", ["x"], ["sum"], keepdims=0),
        NODE("Cast", ["sum"], ["positive"], to=TensorProto.BOOL),
        NODE("If", ["positive"], ["chosen"], then_branch=then, else_branch=otherwise),
        NODE("Add", ["chosen", "a"], ["m"]),
        NODE("Mul", ["m", "b"], ["y"]),
    ]
    return model_of(nodes, {"x": [16]}, {"y": [16]}, {"a": normal(16)})


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [16])


def test_tensors_are_found_wherever_the_file_holds_them() -> None:
    model = with_hidden_weights()
    assert sorted(tensor.name for tensor in tensors_of(model)) == ["a", "b", "c", "d"]
    assert weight_bytes(model) == 4 * 16 * 4


def test_external_weights_of_constants_and_subgraphs_belong_to_the_files_of_a_model(tmp_path: Path) -> None:
    model = with_hidden_weights()
    for tensor in tensors_of(model):
        external_data_helper.set_external_data(tensor, f"{tensor.name}.bin")
    onnx.save(model, tmp_path / "model.onnx")
    names = [path.name for path in files_of(tmp_path / "model.onnx")]
    assert names == ["model.onnx", "a.bin", "b.bin", "c.bin", "d.bin"]
    assert all((tmp_path / name).exists() for name in names)
    again = load_model(tmp_path / "model.onnx")
    assert weight_bytes(again) == weight_bytes(with_hidden_weights())


def test_a_large_model_is_read_back_and_passes_keep_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    monkeypatch.setattr(graph, "_LARGEST_FILE_BYTES", 1000)
    save_model(model, tmp_path / "large.onnx")
    assert [path.name for path in files_of(tmp_path / "large.onnx")] == ["large.onnx", "large.onnx.data"]
    read = load_model(tmp_path / "large.onnx")
    x = {"x": normal(2, 64)}
    for step in (RaiseOpset(), Sanitize(), Fold(), Simplify(), Fuse(), OrtBasic()):
        result = step.run(read, context_of(tmp_path))
        require_equivalent(model, result, "tolerance", [x], tmp_path)
        read = result.model
        assert all(tensor.data_location == TensorProto.DEFAULT for tensor in tensors_of(read))
