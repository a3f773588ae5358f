from pathlib import Path

import numpy as np
import pytest

from server.artifact import Batching, Golden, SessionOptions
from server.providers import CPU
from server.sample import TYPICAL_SIZE, sample_of_golden, sample_of_plain
from server.session import MEASURED_ROWS, Session
from tests import models


def opened(path: Path) -> Session:
    return Session(path, CPU, SessionOptions())


def test_golden_rows_are_repeated_to_the_size_of_a_batch():
    golden = Golden({"x": np.arange(6.0).reshape(3, 2)}, {})
    sample = sample_of_golden(golden, Batching(True, "proven", max_rows=8))
    assert sample.sizes == (1, 2, 4, 8)
    assert sample.probe["x"].tolist() == [[0, 1]]
    assert sample.inputs(5)["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert sample.batchable
    assert sample.tells_times


def test_golden_inputs_that_are_no_rows_stay_whole():
    golden = Golden({"x": np.zeros((3, 2))}, {})
    sample = sample_of_golden(golden, Batching(False, "no batch axis"))
    assert (sample.batchable, sample.sizes) == (False, (1,))
    assert sample.probe["x"].shape == sample.inputs(1)["x"].shape == (3, 2)


def test_plain_model_of_fixed_sizes_tells_its_times(mlp: Path):
    sample = sample_of_plain(opened(mlp))
    assert (sample.batchable, sample.sizes, sample.tells_times) == (True, MEASURED_ROWS, True)
    assert sample.inputs(7)["x"].shape == (7, 64)


def test_plain_model_of_open_sizes_is_tried_with_a_typical_one(tmp_path: Path):
    session = opened(models.save_sequence(tmp_path / "m.onnx"))
    sample = sample_of_plain(session)
    assert (sample.batchable, sample.tells_times) == (True, False)
    assert sample.probe["ids"].shape == (1, 1)
    assert sample.inputs(2)["ids"].shape == (2, TYPICAL_SIZE)
    assert session.run(sample.inputs(2))["vector"].shape[0] == 2


@pytest.mark.parametrize("save", [models.save_strings, models.save_batch_on_axis_1])
def test_inputs_that_nobody_can_guess_are_not_made(tmp_path: Path, save):
    sample = sample_of_plain(opened(save(tmp_path / "m.onnx")))
    assert not sample.tells_times
    if sample.inputs is not None:  # it runs with a typical size, one request at a time
        assert sample.sizes == (1,)
