from pathlib import Path

import numpy as np
import onnx
import onnxslim
import pytest

from optimizers.errors import PassFailed
from optimizers.graph import op_counts, signature_of
from optimizers.passes.check import require_equivalent
from optimizers.passes.settle import settle
from optimizers.passes.simplify import Simplify
from tests.models import save_mlp
from tests.optimizers.graphs import NODE, context_of, model_of, normal


def wasteful(rows: object = "batch") -> onnx.ModelProto:
    nodes = [
        NODE("Identity", ["x"], ["i"]),
        NODE("Add", ["one", "one"], ["two"]),
        NODE("Mul", ["i", "two"], ["m"]),
        NODE("Transpose", ["m"], ["t"], perm=[1, 0]),
        NODE("Transpose", ["t"], ["y"], perm=[1, 0]),
    ]
    return model_of(nodes, {"x": [rows, 4]}, {"y": [rows, 4]}, {"one": np.ones(1, np.float32)})


def test_what_changes_nothing_is_removed_and_constants_are_folded(tmp_path: Path) -> None:
    model = wasteful()
    result = Simplify().run(model, context_of(tmp_path))
    assert op_counts(result.model) == {"Mul": 1}
    assert result.counts == {"Transpose": 2, "Identity": 1, "Add": 1}
    for rows in (1, 5):
        require_equivalent(model, result, "exact", [{"x": normal(rows, 4)}], tmp_path)


@pytest.mark.parametrize("rows", [None, "batch"])
def test_variable_axes_stay_variable_and_keep_their_names(tmp_path: Path, rows: object) -> None:
    model = wasteful(rows)
    assert signature_of(Simplify().run(model, context_of(tmp_path)).model) == signature_of(model)


def test_a_lean_model_is_returned_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    result = Simplify().run(model, context_of(tmp_path))
    assert not result.changed
    assert result.model is model
    assert result.note == "nothing to simplify"


def test_the_input_model_stays_as_it_is(tmp_path: Path) -> None:
    model = wasteful()
    before = model.SerializeToString()
    Simplify().run(model, context_of(tmp_path))
    assert model.SerializeToString() == before


def test_a_tool_that_gives_nothing_back_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxslim, "slim", lambda model, **_: None)
    with pytest.raises(PassFailed, match="onnxslim gave no model"):
        Simplify().run(wasteful(), context_of(tmp_path))


def test_patterns_that_raise_are_left_out_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    slim = onnxslim.slim

    def fails_at_first(model: onnx.ModelProto, skip_optimizations: list[str]) -> onnx.ModelProto:
        asked.append(skip_optimizations)
        if not skip_optimizations:
            raise KeyError("a pattern")
        return slim(model, skip_optimizations=skip_optimizations)

    monkeypatch.setattr(onnxslim, "slim", fails_at_first)
    model = wasteful()
    result = Simplify().run(model, context_of(tmp_path))
    assert asked == [[], ["graph_fusion", "weight_tying"]]
    assert result.note == "without onnxslim's patterns: onnxslim raises KeyError: 'a pattern'"
    require_equivalent(model, result, "exact", [{"x": normal(3, 4)}], tmp_path)


def test_a_result_that_is_not_valid_is_a_refusal_after_the_second_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def breaks(model: onnx.ModelProto, **_: object) -> onnx.ModelProto:
        attempts.append(1)
        model.graph.node[0].input[0] = "missing"
        return model

    monkeypatch.setattr(onnxslim, "slim", breaks)
    with pytest.raises(PassFailed, match=r"result is not valid: .*; without its patterns: .* is not valid"):
        Simplify().run(wasteful(), context_of(tmp_path))
    assert len(attempts) == 2


def test_invented_axis_names_are_taken_back_everywhere() -> None:
    model = model_of([NODE("Relu", ["x"], ["h"]), NODE("Relu", ["h"], ["y"])], {"x": [None, 4]}, {"y": [None, 4]})
    renamed = model_of([NODE("Relu", ["x"], ["h"]), NODE("Relu", ["h"], ["y"])], {"x": ["?", 4]}, {"y": ["?", 4]})
    renamed.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["?", 4]))
    settle(renamed, model)
    assert signature_of(renamed) == signature_of(model)
    assert "?" not in str(renamed)
    assert [value.name for value in renamed.graph.value_info] == ["h"]
