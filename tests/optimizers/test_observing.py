"""Observing: what flows through a model, batch by batch."""

import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.passes.observing import in_groups, observed
from tests.optimizers.graphs import NODE, model_of, normal


@pytest.fixture
def model() -> onnx.ModelProto:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Relu", ["h"], ["y"])]
    return model_of(nodes, {"x": ["batch", 3]}, {"y": ["batch", 3]}, {"w": 2 * np.eye(3, dtype=np.float32)})


def test_inputs_inner_tensors_and_outputs_are_seen_in_batches_of_any_size(model: onnx.ModelProto, tmp_path: Path):
    before = model.SerializeToString(deterministic=True)
    batches = [{"x": normal(4, 3)}, {"x": normal(1, 3, seed=1)}]
    seen = list(observed(model, ["x", "h", "y", "h"], batches, tmp_path))
    for values, batch in zip(seen, batches, strict=True):
        assert set(values) == {"x", "h", "y"}
        np.testing.assert_array_equal(values["x"], batch["x"])
        np.testing.assert_array_equal(values["h"], 2 * batch["x"])
        np.testing.assert_array_equal(values["y"], np.maximum(2 * batch["x"], 0))
    assert model.SerializeToString(deterministic=True) == before
    assert list(tmp_path.iterdir()) == []


def test_array_that_the_caller_drops_is_freed_before_the_next_batch(model: onnx.ModelProto, tmp_path: Path):
    for values in observed(model, ["h"], [{"x": normal(4, 3)}] * 2, tmp_path):
        array = values.pop("h")
        alive = weakref.ref(array)
        del array
        assert alive() is None


def test_only_an_input_is_observed_without_a_run(model: onnx.ModelProto, tmp_path: Path):
    (values,) = observed(model, ["x"], [{"x": normal(2, 5)}], tmp_path)
    assert values["x"].shape == (2, 5)


def test_groups_are_counted_in_bytes_and_a_large_tensor_is_alone(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("optimizers.passes.observing._GROUP_BYTES", 2 * 4 * 30)
    assert in_groups(model, ["x", "h", "y"], [{"x": normal(10, 3)}], tmp_path) == [["x", "h"], ["y"]]
    assert in_groups(model, ["x", "h", "y"], [{"x": normal(99, 3)}], tmp_path) == [["x"], ["h"], ["y"]]
    assert in_groups(model, [], [], tmp_path) == []


@pytest.mark.parametrize("run", [lambda *a: list(observed(*a)), in_groups])
def test_data_that_do_not_fit_are_a_refusal(run, model: onnx.ModelProto, tmp_path: Path):
    with pytest.raises(PassFailed, match="does not run on the calibration data"):
        run(model, ["h"], [{"x": normal(2, 5)}], tmp_path)
    assert list(tmp_path.iterdir()) == []
