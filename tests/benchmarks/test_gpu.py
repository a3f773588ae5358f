"""The check of a GPU: its counting, its floor, its report; the whole of it rehearsed on the CPU with a tiny model."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import tables
from benchmarks.gpu.floor import Ceilings, Work, bound_run, measure_ceilings, work_of
from benchmarks.gpu.report import Checked, write_report
from benchmarks.gpu.served import Disturbed, failover, serving
from benchmarks.gpu.subjects import Subject, find_subjects, random_cnn, random_encoder
from deploy.quickstart.encoder import EncoderShape
from server.artifact import LatencyTable, SessionOptions
from server.providers import CPU, open_ort_session
from server.session import Session
from tests import models
from tests.artifacts import write_artifact

ROOT = Path(__file__).parents[2]


def test_work_of_dense_layers_is_counted(mlp: Path):
    work = work_of(mlp, {"x": np.zeros((1, 64), np.float32)})
    assert work.flops == 2 * 64 * 64 + 2 * 64 * 10
    assert work.row_bytes == 4 * (64 + 10)
    assert 4 * (64 * 64 + 64 + 64 * 10) <= work.weight_bytes < 4 * (64 * 64 + 64 + 64 * 10) + 100


def test_work_of_convolutions_is_counted(tmp_path: Path):
    work = work_of(models.save_cnn(tmp_path / "cnn.onnx"), {"image": np.zeros((1, 3, 16, 16), np.float32)})
    assert work.flops == 2 * (8 * 16 * 16) * (3 * 3 * 3) + 2 * 8 * 10


def test_floor_is_the_slower_of_arithmetic_and_memory():
    ceilings = Ceilings({"fp32": 100.0, "fp16": 400.0}, 10.0)
    heavy, wide = Work(1000.0, 1, 0), Work(1.0, 100, 10)
    assert ceilings.floor_s(heavy, 2, "fp32") == 20.0
    assert ceilings.floor_s(heavy, 2, "fp16") == 5.0
    assert ceilings.floor_s(wide, 3, "fp32") == 13.0
    assert ceilings.floor_s(wide, 3, "fp16") == 8.0, "half of the weights' bytes"


def test_ceilings_of_the_cpu_are_measured():
    ceilings = measure_ceilings(CPU, 0.05)
    assert ceilings.flops_per_s.keys() == {"fp32"}
    assert 1e9 < ceilings.flops_per_s["fp32"] < 1e13
    assert 1e8 < ceilings.bytes_per_s < 1e12


def test_bound_run_computes_what_run_does(mlp: Path):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    session = open_ort_session(mlp, CPU, SessionOptions())
    binding = []
    bind = session.io_binding
    session.io_binding = lambda: binding.append(bind()) or binding[-1]
    run = bound_run(session, CPU, {"x": x})
    run()
    (seen,) = binding[0].copy_outputs_to_cpu()
    np.testing.assert_array_equal(seen, session.run(None, {"x": x})[0])


def test_models_with_random_weights_run_in_batches(tmp_path: Path):
    small = EncoderShape(hidden=24, heads=2, layers=1, epsilon=1e-12)
    for subject in (random_encoder(tmp_path, small), random_cnn(tmp_path)):
        session = Session(subject.model, CPU, SessionOptions())
        both = session.run(subject.batch(2))["logits"]
        assert both.shape[0] == 2
        assert np.isfinite(both).all()
        assert not np.allclose(both[0], both[1]), "answers depend on the input"
        np.testing.assert_allclose(session.run(subject.batch(1))["logits"], both[:1], rtol=1e-3, atol=1e-4)


def test_prepared_models_are_preferred(tmp_path: Path, mlp: Path):
    prepared = tmp_path / "prepared" / "minilm-l6"
    prepared.mkdir(parents=True)
    mlp.rename(prepared / "model.onnx")
    np.savez(prepared / "data.npz", x=np.zeros((3, 64), np.float32))
    found = find_subjects(tmp_path / "prepared", tmp_path)
    assert (found[0].name, found[0].origin) == ("minilm-l6", "trained")
    assert found[0].batch(5)["x"].shape == (5, 64)


def tiny(mlp: Path) -> Subject:
    x = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    return Subject("mlp", "random weights", mlp, {"x": x})


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """The whole check of a tiny model on the CPU."""
    folder = tmp_path_factory.mktemp("check")
    subject = tiny(models.save_mlp(folder / "mlp.onnx"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "find_subjects", lambda *_: [subject])
        patch.setattr(gpu, "_OPTIMIZE_S", 5.0)
        patch.setattr(tables, "ROWS", (1, 4))
        return gpu.check(CPU, folder, 0.1)


def test_whole_check_runs_and_is_reported(checked: Checked, tmp_path: Path):
    assert checked.failures == []
    (model,) = checked.models
    assert {(t.precision, t.way, t.rows) for t in model.timings} == {
        ("fp32", way, rows) for way in ("run", "bound", "served") for rows in (1, 4)
    }
    assert all(t.ms > 0 and t.floor_ms > 0 and not t.failure for t in model.timings)
    assert model.served.rows_per_s > 0
    assert model.http.failed == model.http.wrong == 0
    assert model.http.requests_per_s > 0
    assert model.swap.failed == {}
    assert model.failover is None, "there is one lane only"
    machine, people = write_report(checked, tmp_path / "out")
    assert msgspec.json.decode(machine.read_bytes(), type=Checked) == checked
    text = people.read_text()
    assert "| fp32 | served | 4 |" in text
    assert "Fail-over: not tried, there is no other lane." in text


def test_what_must_not_be_is_a_failure(checked: Checked):
    (model,) = checked.models
    lost = msgspec.structs.replace(
        model,
        failover=Disturbed(10, {"LaneDown: all fail": 2}, noticed_s=-1.0, recovered_s=-1.0),
        swap=Disturbed(10, {"Draining: gone": 1}),
        http=msgspec.structs.replace(model.http, wrong=3),
    )
    assert list(lost.failures) == [
        "mlp: fail-over lost requests: {'LaneDown: all fail': 2}",
        "mlp: swap lost requests: {'Draining: gone': 1}",
        "mlp: the failing lane was not noticed within a second",
        "mlp: the lane did not come back",
        "mlp: over HTTP 0 answers failed, 3 are wrong",
    ]


async def test_failing_lanes_leave_their_work_to_others_and_come_back(tmp_path: Path, mlp: Path):
    table = LatencyTable((1,), (0.5,), (0.5,), (0.5,), (0.5,))
    write_artifact(tmp_path, "mlp", "1", {"fast": mlp, "safe": mlp}, latency={"fast": table, "safe": table})
    async with serving(tmp_path, "off") as repository:
        seen = await failover(repository, tiny(mlp), 0.1)
    assert seen is not None
    assert seen.failed == {}
    assert seen.requests > 0
    assert 0 <= seen.noticed_s < 1
    assert seen.recovered_s >= 0


def test_without_a_gpu_it_says_why_and_ends_with_its_own_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 0:
        pytest.skip("a GPU works here")
    assert done.returncode == 3
    assert done.stderr.startswith("Error: no GPU can be used: ")
    assert "--rehearse" in done.stderr
