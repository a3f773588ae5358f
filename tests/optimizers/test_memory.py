"""What a session costs in memory, measured in a process of its own."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from optimizers import memory
from optimizers.memory import session_memory
from server.artifact import SessionOptions
from server.providers import CPU
from tests.models import save_mlp

BATCH = {"x": np.zeros((1, 64), np.float32)}
OPTIONS = SessionOptions(intra_op_threads=1)


def test_larger_weights_cost_more_memory(tmp_path: Path):
    small, large = (save_mlp(tmp_path / f"{hidden}.onnx", hidden=hidden) for hidden in (64, 131_072))
    costs = [session_memory(model, CPU, OPTIONS, BATCH) for model in (small, large)]
    assert costs[0] is not None
    assert costs[1] is not None
    added = large.stat().st_size - small.stat().st_size
    assert 0.9 * added < costs[1] - costs[0] < 3 * added


@pytest.mark.parametrize("failure", ["model", "batch", "time"])
def test_what_was_not_measured_is_nothing(failure: str, mlp: Path, monkeypatch: pytest.MonkeyPatch):
    batch = BATCH
    if failure == "model":
        mlp.write_bytes(b"not a model")
    elif failure == "batch":
        batch = {"x": np.zeros((1, 3), np.float32)}
    else:
        monkeypatch.setattr(memory, "_TIMEOUT_S", 0.01)
    assert session_memory(mlp, CPU, OPTIONS, batch) is None


def test_system_that_does_not_tell_ends_the_child(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "smaps").write_text("Rss: 1 kB\n")
    (tmp_path / "job").write_bytes(pickle.dumps(memory._Job(mlp, CPU, OPTIONS, BATCH)))
    monkeypatch.setattr(memory, "_SMAPS", tmp_path / "smaps")
    with pytest.raises(SystemExit) as raised:
        memory.main(str(tmp_path / "job"))
    assert raised.value.code == 1
