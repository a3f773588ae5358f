"""Stages that stand for devices: real sessions on the CPU, run as a pipeline."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from optimizers.cutting import Cutter
from optimizers.graph import load_model, save_model
from server.artifact import SessionOptions
from server.errors import ArtifactError, InferenceFailed
from server.providers import CPU
from server.session import Session
from server.staged import StagedSession
from server.tensors import Array, Tensors
from tests import models

PATIENCE_S = 10.0


def opened(model: Path, folder: Path, stages: int = 2) -> tuple[Session, StagedSession]:
    """Open a model whole, and cut into about equal numbers of nodes."""
    whole = Session(model, CPU, SessionOptions())
    cutter = Cutter(load_model(model))
    cuts = cutter.cuts()
    chosen = [cuts[round((i + 1) * len(cuts) / stages) - 1] for i in range(stages - 1)]
    parts = []
    for number, part in enumerate(cutter.stages(chosen)):
        save_model(part, folder / f"stage-{number}.onnx")
        parts.append(Session(folder / f"stage-{number}.onnx", CPU, SessionOptions()))
    return whole, StagedSession("fp32", parts, whole.signature)


def rows(session: Session, count: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        spec.name: [count, *(s if isinstance(s, int) else 5 for s in spec.shape[1:])]
        for spec in session.signature.inputs
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("save", [models.save_mlp, models.save_cnn])
def test_stages_answer_as_the_whole_model(tmp_path: Path, save, stages: int):
    whole, staged = opened(save(tmp_path / "model.onnx"), tmp_path, stages)
    assert staged.signature == whole.signature
    assert len(staged.devices) == stages
    for count in (1, 3):
        inputs = rows(whole, count)
        expected, seen = whole.run(inputs), staged.run(inputs)
        assert list(seen) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(seen[name], array, rtol=1e-5, atol=1e-6)


def test_many_threads_get_their_own_answers(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path, 3)

    def answer(seed: int) -> bool:
        inputs = rows(whole, 1 + seed % 4, seed)
        return all(np.allclose(staged.run(inputs)[k], v, atol=1e-6) for k, v in whole.run(inputs).items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(answer, range(64)))


class Stage:
    """A real stage that waits for a sign before it runs, and says that it was reached."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.signature, self.device, self.providers = session.signature, session.device, session.providers
        self.reached, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.inside = self.most_inside = 0

    def run(self, inputs: Tensors) -> dict[str, Array]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.reached.release()
        assert self.go_on.acquire(timeout=PATIENCE_S)
        self.inside -= 1
        return self._session.run(inputs)


def test_stages_overlap_on_successive_batches(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path)
    first, second = (Stage(stage) for stage in staged._stages)
    pipeline = StagedSession("fp32", [first, second], whole.signature)
    inputs = rows(whole, 2)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(pipeline.run, inputs) for _ in range(2)]
        assert first.reached.acquire(timeout=PATIENCE_S)
        first.go_on.release()
        assert second.reached.acquire(timeout=PATIENCE_S), "the first batch is in the second stage"
        assert first.reached.acquire(timeout=PATIENCE_S), "meanwhile the second batch is in the first stage"
        first.go_on.release()
        second.go_on.release(2)
        for answer in answers:
            np.testing.assert_allclose(answer.result(PATIENCE_S)["y"], whole.run(inputs)["y"], atol=1e-6)
    assert (first.most_inside, second.most_inside) == (1, 1)


def test_wanted_outputs_only(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path)
    assert list(staged.run(rows(whole, 1), ("y",))) == ["y"]


def test_failed_stage_fails_the_batch_and_lets_the_next_one_in(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path)
    with pytest.raises(InferenceFailed):
        staged.run({"x": np.zeros((1, 3), np.float32)})
    assert staged.run(rows(whole, 1))["y"].shape[0] == 1


def test_closed_stages_run_no_more(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path)
    staged.close()
    with pytest.raises(InferenceFailed, match="is closed"):
        staged.run(rows(whole, 1))


def test_stages_in_the_wrong_order_or_incomplete_are_refused(tmp_path: Path):
    whole, staged = opened(models.save_mlp(tmp_path / "model.onnx"), tmp_path)
    first, second = staged._stages
    with pytest.raises(ArtifactError, match=r"stage 1 of fp32 takes \[.*\], which nothing before it gives"):
        StagedSession("fp32", [second, first], whole.signature)
    with pytest.raises(ArtifactError, match=r"no stage of fp32 gives the outputs \['y'\]"):
        StagedSession("fp32", [first], whole.signature)
