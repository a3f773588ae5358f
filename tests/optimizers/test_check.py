from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.passes import PassResult, copy_of
from optimizers.passes.check import difference, require_equivalent
from tests.models import save_mlp
from tests.optimizers.graphs import normal

Y = normal(4, 10)


def one(array: np.ndarray) -> dict[str, np.ndarray]:
    return {"y": array}


def test_rounding_passes_and_more_does_not() -> None:
    assert difference(one(Y), one(Y * np.float32(1 + 1e-6)), "exact") == ""
    assert "exact passes may only round" in difference(one(Y), one(Y * np.float32(1 + 1e-4)), "exact")
    assert difference(one(Y), one(Y * np.float32(1 + 1e-4)), "tolerance") == ""
    assert "tolerance passes may only round" in difference(one(Y), one(Y * np.float32(1.01)), "tolerance")
    assert difference(one(Y), one(Y * np.float32(1.5)), "lossy") == ""


def test_small_elements_are_measured_by_the_largest_of_their_tensor() -> None:
    large = np.array([1e4, 1e-6], np.float32)
    assert difference(one(large), one(large + np.float32([0, 1e-3])), "exact") == ""
    assert difference(one(large[1:]), one(large[1:] + np.float32([1e-3])), "exact")


@pytest.mark.parametrize("effect", ["exact", "tolerance", "lossy"])
def test_shapes_types_and_finiteness_must_stay(effect: str) -> None:
    assert "is missing" in difference(one(Y), {}, effect)
    assert "was float32[4, 10]" in difference(one(Y), one(Y[:2]), effect)
    assert "is float64" in difference(one(Y), one(Y.astype(np.float64)), effect)
    broken = Y.copy()
    broken[1, 1] = np.nan
    assert "NaN or infinite" in difference(one(Y), one(broken), effect)


def test_values_that_were_infinite_must_stay_so() -> None:
    infinite = np.array([-np.inf, 1], np.float32)
    assert difference(one(infinite), one(infinite), "exact") == ""
    assert "is finite where" in difference(one(infinite), one(np.array([-3e38, 1], np.float32)), "exact")


def test_integers_and_text_must_be_equal_unless_lossy() -> None:
    labels = np.array([1, 2, 3])
    assert "differs in 1 of 3" in difference(one(labels), one(np.array([1, 2, 4])), "tolerance")
    assert difference(one(labels), one(np.array([1, 2, 4])), "lossy") == ""
    text = np.array([b"a"], object)
    assert difference(one(text), one(text), "exact") == ""


def test_a_changed_weight_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    other = onnx.load(save_mlp(tmp_path / "other.onnx", seed=1))
    with pytest.raises(PassFailed, match="output 'y' has an element"):
        require_equivalent(model, PassResult(other, changed=True), "tolerance", [{"x": normal(2, 64)}], tmp_path)


def test_a_renamed_axis_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    renamed = copy_of(model)
    renamed.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    with pytest.raises(PassFailed, match=r"'x' is FP32\['n', 64\], was FP32\['batch', 64\]"):
        require_equivalent(model, PassResult(renamed, changed=True), "exact", [{"x": normal(2, 64)}], tmp_path)


def test_a_renamed_output_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    renamed = copy_of(model)
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "z"
    with pytest.raises(PassFailed, match=r"inputs and outputs are \['x', 'z'\], were \['x', 'y'\]"):
        require_equivalent(model, PassResult(renamed, changed=True), "exact", [{"x": normal(2, 64)}], tmp_path)


def test_a_result_that_does_not_open_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    broken = copy_of(model)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(PassFailed, match="the result is not usable"):
        require_equivalent(model, PassResult(broken, changed=True), "lossy", [{"x": normal(2, 64)}], tmp_path)
