from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.passes.activations import float_tensors, largest_magnitudes, minmax_ranges, percentile_ranges
from optimizers.passes.sanitize import Sanitize
from tests.models import save_sequence
from tests.optimizers.graphs import NODE, context_of, model_of, normal


@pytest.fixture
def model(tmp_path: Path) -> onnx.ModelProto:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Relu", ["h"], ["y"])]
    made = model_of(nodes, {"x": ["batch", 3]}, {"y": ["batch", 3]}, {"w": 2 * np.eye(3, dtype=np.float32)})
    return Sanitize().run(made, context_of(tmp_path)).model


def test_ranges_span_all_batches_of_any_size(tmp_path: Path, model: onnx.ModelProto) -> None:
    batches = [{"x": np.float32([[1, 2, -3]])}, {"x": np.float32([[0, 7, 0], [0, 0, -5]])}]
    assert float_tensors(model) == ["x", "h", "y"]
    ranges = minmax_ranges(model, ["x", "h", "y"], batches, tmp_path)
    assert ranges == {"x": (-5, 7), "h": (-10, 14), "y": (0, 14)}
    assert largest_magnitudes(model, ["h"], batches, tmp_path) == {"h": 14}


def test_only_tensors_of_the_wanted_operators_are_named(model: onnx.ModelProto) -> None:
    assert float_tensors(model, frozenset({"MatMul"})) == ["x", "h"]
    assert float_tensors(model, frozenset({"Conv"})) == []


def test_integers_and_weights_are_left_out(tmp_path: Path) -> None:
    made = Sanitize().run(onnx.load(save_sequence(tmp_path / "model.onnx")), context_of(tmp_path)).model
    assert not {"ids", "mask", "table", "axis1"} & set(float_tensors(made))


def test_percentiles_leave_out_rare_values(tmp_path: Path, model: onnx.ModelProto) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (10_000, 3)).astype(np.float32)
    x[0, 0] = 100
    batches = [{"x": x[start : start + 3000]} for start in range(0, len(x), 3000)]
    full = minmax_ranges(model, ["x"], batches, tmp_path)["x"]
    low, high = percentile_ranges(model, ["x"], batches, tmp_path, 99.9)["x"]
    assert full[1] == 100
    assert -1.1 < low < -0.9
    assert 0.9 < high < 1.2


def test_percentile_of_everything_is_the_full_range(tmp_path: Path, model: onnx.ModelProto) -> None:
    batches = [{"x": normal(50, 3)}]
    full = minmax_ranges(model, ["h"], batches, tmp_path)["h"]
    np.testing.assert_allclose(percentile_ranges(model, ["h"], batches, tmp_path, 100)["h"], full, rtol=1e-6)


def test_constant_tensors_have_a_range_of_one_value(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert percentile_ranges(model, ["y"], [{"x": np.full((4, 3), -1, np.float32)}], tmp_path, 99.99) == {"y": (0, 0)}


def test_infinite_values_do_not_count(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert minmax_ranges(model, ["x"], [{"x": np.float32([[1, 2, -np.inf]])}], tmp_path) == {"x": (1, 2)}


def test_data_that_does_not_fit_is_a_refusal(tmp_path: Path, model: onnx.ModelProto) -> None:
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        minmax_ranges(model, ["h"], [{"x": normal(2, 5)}], tmp_path)
