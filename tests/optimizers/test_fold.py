import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.graph import op_counts, signature_of
from optimizers.passes import fold
from optimizers.passes.check import require_equivalent
from optimizers.passes.fold import Fold
from tests.models import save_mlp
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of

X = {"x": normal(3, 4)}


def fold_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], work: Path) -> tuple[onnx.ModelProto, dict]:
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]}, weights)
    before = model.SerializeToString()
    result = Fold().run(model, context_of(work))
    assert model.SerializeToString() == before
    assert signature_of(result.model) == signature_of(model)
    require_equivalent(model, result, "exact", [X], work)
    return result.model, result.counts


def test_what_is_constant_is_computed_once(tmp_path: Path) -> None:
    nodes = [
        NODE("Add", ["a", "a"], ["b"]),
        NODE("Sqrt", ["b"], ["c"]),
        NODE("Mul", ["x", "c"], ["y"]),
    ]
    model, counts = fold_of(nodes, {"a": np.abs(normal(4)) + np.float32(1)}, tmp_path)
    assert counts == {"constant": 2}
    assert op_counts(model) == {"Mul": 1}
    assert len(weights_of(model)) == 1


def test_the_shape_of_what_has_a_fixed_shape_is_constant(tmp_path: Path) -> None:
    nodes = [
        NODE("Transpose", ["w"], ["t"]),
        NODE("Shape", ["t"], ["s"]),
        NODE("Cast", ["s"], ["f"], to=onnx.TensorProto.FLOAT),
        NODE("Mul", ["x", "f"], ["y"]),
    ]
    _, counts = fold_of(nodes, {"w": normal(1, 2, 3, 4)}, tmp_path)
    assert counts == {"constant": 3}


def test_what_is_computed_twice_is_computed_once(tmp_path: Path) -> None:
    nodes = [NODE("Exp", ["x"], ["a"]), NODE("Exp", ["x"], ["b"]), NODE("Add", ["a", "b"], ["y"])]
    model, counts = fold_of(nodes, {}, tmp_path)
    assert counts == {"duplicate": 1}
    assert op_counts(model) == {"Add": 1, "Exp": 1}


def test_random_numbers_are_drawn_as_often_as_before(tmp_path: Path) -> None:
    nodes = [
        NODE("RandomUniformLike", ["x"], ["a"]),
        NODE("RandomUniformLike", ["x"], ["b"]),
        NODE("Sub", ["a", "b"], ["y"]),
    ]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]})
    assert op_counts(Fold().run(model, context_of(tmp_path)).model)["RandomUniformLike"] == 2


def test_what_has_no_effect_or_no_reader_is_removed(tmp_path: Path) -> None:
    nodes = [
        NODE("Mul", ["x", "one"], ["a"]),
        NODE("Exp", ["x"], ["unused"]),
        NODE("Transpose", ["a"], ["t"], perm=[1, 0]),
        NODE("Transpose", ["t"], ["u"], perm=[1, 0]),
        NODE("Relu", ["u"], ["y"]),
    ]
    model, counts = fold_of(nodes, {"one": np.array(1, np.float32)}, tmp_path)
    assert op_counts(model) == {"Relu": 1}
    assert (counts["no effect"], counts["chains"], counts["unused"]) == (1, 1, 1)


def test_a_factor_of_one_that_adds_axes_stays(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["x", "one"], ["y"])]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": [1, "batch", 4]}, {"one": np.ones((1, 1, 1), np.float32)})
    result = Fold().run(model, context_of(tmp_path))
    require_equivalent(model, result, "exact", [X], tmp_path)


def test_equal_small_initializers_are_merged_and_large_weights_keep_their_copies(tmp_path: Path) -> None:
    large = normal(40, 40)
    nodes = [
        NODE("Add", ["x", "a"], ["h"]),
        NODE("Mul", ["h", "b"], ["i"]),
        NODE("MatMul", ["i", "v"], ["j"]),
        NODE("MatMul", ["j", "w"], ["y"]),
    ]
    weights = {"a": np.float32([2]), "b": np.float32([2]), "v": large, "w": large}
    model = model_of(nodes, {"x": ["batch", 40]}, {"y": ["batch", 40]}, weights)
    result = Fold().run(model, context_of(tmp_path))
    assert result.counts == {"duplicate initializers": 1}
    assert len(weights_of(result.model)) == 3
    require_equivalent(model, result, "exact", [{"x": normal(2, 40)}], tmp_path)


def test_an_output_that_is_the_input_stays_one(tmp_path: Path) -> None:
    nodes = [NODE("Identity", ["x"], ["y"]), NODE("Relu", ["x"], ["unused"])]
    fold_of(nodes, {}, tmp_path)


def test_two_outputs_of_one_value_stay_two(tmp_path: Path) -> None:
    nodes = [NODE("Exp", ["x"], ["y"]), NODE("Exp", ["x"], ["z"])]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4], "z": ["batch", 4]})
    result = Fold().run(model, context_of(tmp_path))
    require_equivalent(model, result, "exact", [X], tmp_path)


def test_a_lean_model_is_returned_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    result = Fold().run(model, context_of(tmp_path))
    assert not result.changed
    assert result.model is model
    assert result.note == "nothing is constant, unused or computed twice"


def test_a_result_too_large_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "_LARGEST_FOLDED", 8)
    nodes = [NODE("Expand", ["a", "to"], ["b"]), NODE("Add", ["x", "b"], ["y"])]
    model = model_of(nodes, {"x": [3, 4]}, {"y": [3, 4]}, {"a": normal(4), "to": np.array([3, 4])})
    assert not Fold().run(model, context_of(tmp_path)).changed


def test_a_rewriter_that_fails_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no such graph")

    monkeypatch.setattr(fold.optimizer, "fold_constants", fails)
    with pytest.raises(PassFailed, match="onnx-ir cannot rewrite the model: ValueError: no such graph"):
        Fold().run(onnx.load(save_mlp(tmp_path / "model.onnx")), context_of(tmp_path))


def test_no_note_of_the_rewriter_stays_in_the_file(tmp_path: Path) -> None:
    nodes = [NODE("Relu", ["x"], ["a"]), NODE("Relu", ["a"], ["y"])]
    model = model_of(nodes, {"x": ["batch", 4]}, {"y": ["batch", 4]})
    result = Fold().run(model, context_of(tmp_path))
    assert result.counts == {"chains": 1}
    assert not any(node.metadata_props for node in result.model.graph.node)
    assert op_counts(result.model) == {"Relu": 1}


def test_it_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(Fold())).spec.name == "fold"
