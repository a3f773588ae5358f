from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.passes import activations, observing
from optimizers.passes.activations import float_tensors, largest_magnitudes, minmax_ranges, ranges
from optimizers.passes.ranges import Histogram, range_of
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


# Two runs over the data: extremes, then histograms

METHODS = ("minmax", "percentile", "entropy", "mse")


def with_outliers(rows: int = 10_000) -> np.ndarray:
    x = normal(rows, 3)
    x[0, 0], x[5, 2] = 100, -90
    return x


def in_batches(x: np.ndarray, size: int = 3000) -> list[dict[str, np.ndarray]]:
    return [{"x": x[start : start + size]} for start in range(0, len(x), size)]


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_all_values_at_once(tmp_path: Path, model: onnx.ModelProto, method: str) -> None:
    x = with_outliers()
    low, high = float(2 * x.min()), float(2 * x.max())
    expected = range_of(Histogram(np.histogram(2 * x, 2048, (low, high))[0], low, high), method)
    found = ranges(model, ["x", "h"], in_batches(x), tmp_path, method)
    assert found["h"] == pytest.approx(expected)
    assert found["x"] == pytest.approx([end / 2 for end in expected])
    assert (found["h"] == (low, high)) == (method == "minmax")


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_ranges_are_those_of_magnitudes(tmp_path: Path, model: onnx.ModelProto, method: str) -> None:
    x = with_outliers()
    largest = float(np.abs(x).max())
    _, expected = range_of(Histogram(np.histogram(np.abs(x), 2048, (0, largest))[0], 0, largest), method, 128)
    assert ranges(model, ["x"], in_batches(x), tmp_path, method, symmetric=True) == {"x": (-expected, expected)}


@pytest.mark.parametrize("method", METHODS)
def test_tensors_without_spread_have_a_range_all_the_same(tmp_path: Path, model: onnx.ModelProto, method: str) -> None:
    batches = [{"x": np.full((4, 3), -1, np.float32)}]
    assert ranges(model, ["y"], batches, tmp_path, method) == {"y": (0, 0)}
    low, high = ranges(model, ["x"], batches, tmp_path, method)["x"]
    assert low == pytest.approx(-1, rel=1e-3)
    assert -1 <= high <= 0
    tiny = [{"x": np.full((4, 3), 1e-44, np.float32)}]
    assert ranges(model, ["x"], tiny, tmp_path, method)["x"][1] <= 1e-43


@pytest.mark.parametrize("method", METHODS)
def test_values_near_the_largest_float_do_not_overflow(tmp_path: Path, model: onnx.ModelProto, method: str) -> None:
    batches = [{"x": np.float32([[3e38, -3e38, 1]])}]
    low, high = ranges(model, ["x"], batches, tmp_path, method)["x"]
    assert np.isfinite([low, high]).all()
    assert low < -1e38
    assert high > 1e38


# Groups: what is observed at once is bounded


@pytest.mark.parametrize(("limit_bytes", "runs"), [(256 << 20, 1), (2 * 4 * 30, 2), (1, 3)])
def test_large_tensors_are_observed_in_groups(
    tmp_path: Path, model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, limit_bytes: int, runs: int
) -> None:
    monkeypatch.setattr(observing, "_GROUP_BYTES", limit_bytes)
    groups = []
    observe = activations.observed
    monkeypatch.setattr(activations, "observed", lambda *args: groups.append(args[1]) or observe(*args))
    batches = [{"x": normal(10, 3)}, {"x": normal(2, 3, seed=1)}]  # 120 bytes a tensor
    found = minmax_ranges(model, ["x", "h", "y"], batches, tmp_path)
    assert len(groups) == runs
    assert [name for group in groups for name in group] == ["x", "h", "y"]
    assert found["h"] == pytest.approx([2 * end for end in found["x"]])
    assert found["y"] == (0, found["h"][1])


def test_nothing_to_observe_is_no_error(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert ranges(model, [], [{"x": normal(2, 3)}], tmp_path, "mse") == {}


def test_infinite_values_do_not_count(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert minmax_ranges(model, ["x"], [{"x": np.float32([[1, 2, -np.inf]])}], tmp_path) == {"x": (1, 2)}


def test_data_that_does_not_fit_is_a_refusal(tmp_path: Path, model: onnx.ModelProto) -> None:
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        minmax_ranges(model, ["h"], [{"x": normal(2, 5)}], tmp_path)
