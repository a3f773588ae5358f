import logging
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from server import artifact, session
from server.artifact import LatencyTable, SessionOptions, read_artifact
from server.errors import ArtifactError, InferenceFailed, StartupError
from server.host import read_host
from server.lanes import Lanes
from server.providers import CPU, Device, open_ort_session
from server.split import Finding, Split, Splits, Trial
from server.tensors import TensorSpec
from tests import models
from tests.artifacts import edit_manifest, signature_of, write_artifact, write_plain

CUDA, TENSORRT = Device("cuda"), Device("tensorrt")


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.lanes.measure_latency", lambda session, sizes, budget_s, inputs: None)


@pytest.fixture
def every_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opens on the CPU whatever device is asked for."""
    monkeypatch.setattr(session, "open_ort_session", lambda path, device, options: open_ort_session(path, CPU, options))


def placed(lanes: Lanes) -> list[tuple[str, str]]:
    return [(spec.variant, spec.device) for spec in lanes.specs]


def test_first_cpu_variant_gets_lanes_that_share_a_session(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"int8": mlp, "fp32": mlp})
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=3)
    assert placed(lanes) == [("int8", "cpu")] * 3 + [("fp32", "cpu")]
    assert len({id(spec.runner) for spec in lanes.specs[:3]}) == 1
    assert lanes.specs[3].runner is not lanes.specs[0].runner
    assert [spec.threads for spec in lanes.specs] == [1] * 4


@pytest.mark.parametrize(("threads", "count", "cores"), [(1, 4, 1), (2, 2, 2), (3, 1, 3), (8, 1, 4), (0, 1, 4)])
def test_lanes_by_default_fill_the_cores(tmp_path: Path, mlp: Path, monkeypatch, threads, count, cores):
    monkeypatch.setattr("server.lanes.usable_cores", lambda: 4)
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp}, options=SessionOptions(intra_op_threads=threads))
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=0)
    assert len(lanes.specs) == count
    assert {spec.threads for spec in lanes.specs} == {cores}


def test_lanes_of_several_threads_have_sessions_of_their_own(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp}, options=SessionOptions(intra_op_threads=2))
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=2)
    assert lanes.specs[0].runner is not lanes.specs[1].runner


def give_large_batches(folder: Path, variant: str) -> None:
    variants = read_artifact(folder).variants
    edit_manifest(
        folder, variants=tuple(msgspec.structs.replace(v, from_rows=8 * (v.name == variant)) for v in variants)
    )


def test_variant_for_large_batches_gets_lanes_of_its_own(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp, "int8": mlp, "fp16": mlp})
    give_large_batches(folder, "int8")
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=2)
    assert placed(lanes) == [("fp32", "cpu")] * 2 + [("int8", "cpu")] * 2 + [("fp16", "cpu")]
    assert [spec.from_rows for spec in lanes.specs] == [0, 0, 8, 8, 0]


def test_variant_for_large_batches_takes_all_when_the_first_is_refused(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp, "int8": mlp})
    give_large_batches(folder, "int8")
    (folder / "fp32/model.onnx").write_bytes(models.save_mlp(tmp_path / "wrong.onnx", seed=1).read_bytes())
    lanes = Lanes(read_artifact_without_digests(folder), (CPU,), cpu_instances=1)
    assert [(spec.variant, spec.from_rows) for spec in lanes.specs] == [("int8", 0)]


def test_latency_and_batching_come_from_the_manifest(tmp_path: Path, mlp: Path):
    table = LatencyTable((1, 2), (1.0, 1.5), (1.0, 1.5), (1.0, 1.5), (1.0, 1.5))
    folder = write_artifact(tmp_path, "mlp", "1", {"a": mlp, "b": mlp}, latency={"a": table}, batchable=False)
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=1)
    assert [spec.latency for spec in lanes.specs] == [table, None]
    assert not lanes.batchable


def test_variant_that_is_wrong_on_this_host_is_left_out_with_a_warning(tmp_path: Path, mlp: Path, caplog):
    wrong = models.save_mlp(tmp_path / "wrong.onnx", seed=1)
    folder = write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp, "int8": wrong})
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=1)
    assert placed(lanes) == [("fp32", "cpu")]
    assert "dB on this host, at least 20.0 dB are required" in lanes.refused["int8"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "mlp/1: not served on cpu: variant int8" in warning


def test_next_variant_takes_the_place_of_a_refused_one(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path / "models", "mlp", "1", {"int8": mlp, "fp32": mlp})
    (folder / "int8/model.onnx").write_bytes(models.save_mlp(tmp_path / "wrong.onnx", seed=1).read_bytes())
    variants = read_artifact_without_digests(folder)
    lanes = Lanes(variants, (CPU,), cpu_instances=2)
    assert placed(lanes) == [("fp32", "cpu")] * 2
    assert list(lanes.refused) == ["int8"]


def read_artifact_without_digests(folder: Path) -> artifact.Artifact:
    raw = (folder / artifact.MANIFEST).read_bytes()
    manifest = msgspec.json.decode(raw, type=artifact.Manifest)
    return artifact.Artifact(folder, folder.parent.name, folder.name, manifest)


def test_model_without_a_variant_that_serves_fails_with_every_reason(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"a": mlp, "b": mlp}, min_sqnr_db=201.0)
    with pytest.raises(StartupError, match=r"no variant of mlp/1 .*a: variant a .*; b: variant b .*201\.0 dB"):
        Lanes(read_artifact(folder), (CPU,), cpu_instances=1)


def test_missing_golden_is_an_error(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp})
    (folder / artifact.GOLDEN).unlink()
    edit_manifest(folder, golden_sha256="")
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        Lanes(read_artifact(folder), (CPU,), cpu_instances=1)


def test_variant_without_its_device_is_refused_quietly(tmp_path: Path, mlp: Path, caplog):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp16": mlp, "fp32": mlp})
    fp16, fp32 = read_artifact(folder).variants
    edit_manifest(folder, variants=(msgspec.structs.replace(fp16, provider="cuda"), fp32))
    lanes = Lanes(read_artifact(folder), (CPU,), cpu_instances=1)
    assert placed(lanes) == [("fp32", "cpu")]
    assert lanes.refused == {"fp16": "no cuda device is usable here"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_lanes_of_a_gpu_come_first_and_two_share_a_session(tmp_path: Path, mlp: Path, every_device_works):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp, "fp16": mlp, "int8": mlp})
    fp32, fp16, int8 = read_artifact(folder).variants
    on = msgspec.structs.replace
    edit_manifest(folder, variants=(fp32, on(fp16, provider="cuda"), on(int8, provider="tensorrt")))
    devices = (TENSORRT, CUDA, Device("cuda", 1), CPU)
    lanes = Lanes(read_artifact(folder), devices, cpu_instances=2)
    assert placed(lanes) == [
        *[("int8", "tensorrt:0")] * 2,
        *[("fp16", "cuda:0")] * 2,
        *[("fp16", "cuda:1")] * 2,
        *[("fp32", "cpu")] * 2,
    ]
    assert lanes.specs[0].runner is lanes.specs[1].runner
    assert lanes.specs[2].runner is not lanes.specs[4].runner


def test_plain_model_goes_to_cuda_and_to_the_cpu(tmp_path: Path, mlp: Path, every_device_works, no_measuring):
    folder = write_plain(tmp_path, "mlp", "1", mlp)
    lanes = Lanes(read_artifact(folder), (TENSORRT, CUDA, CPU), cpu_instances=1)
    assert placed(lanes) == [*[("unoptimized", "cuda:0")] * 2, ("unoptimized", "cpu")]


def test_plain_model_that_fails_on_the_gpu_still_serves_on_the_cpu(tmp_path: Path, mlp: Path, no_measuring, caplog):
    folder = write_plain(tmp_path, "mlp", "1", mlp)
    lanes = Lanes(read_artifact(folder), (CUDA, CPU), cpu_instances=1)
    assert placed(lanes) == [("unoptimized", "cpu")]
    assert "CUDAExecutionProvider" in lanes.refused["unoptimized"]
    assert "mlp/1: not served on cuda:0" in caplog.text


def test_plain_model_is_measured(tmp_path: Path, mlp: Path):
    lanes = Lanes(read_artifact(write_plain(tmp_path, "mlp", "1", mlp)), (CPU,), cpu_instances=1)
    assert lanes.batchable
    assert lanes.specs[0].latency.rows == (1, 2, 4, 8, 16, 32)
    assert lanes.signature == signature_of(mlp)


@pytest.mark.parametrize(
    ("save", "batchable"),
    [(models.save_sequence, True), (models.save_strings, True), (models.save_batch_on_axis_1, False)],
)
def test_plain_model_of_open_sizes_is_not_measured(tmp_path: Path, save, batchable: bool):
    lanes = Lanes(read_artifact(write_plain(tmp_path, "m", "1", save(tmp_path / "m.onnx"))), (CPU,), 1)
    assert lanes.specs[0].latency is None
    assert lanes.batchable == batchable


def save_graph(path: Path, nodes: list, inputs: list, outputs: list, weights: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("target", [[1, 4], [1, -1]], ids=["fails with two rows", "gives one row for two"])
def test_plain_model_whose_batch_axis_is_a_pretence_is_not_batched(tmp_path: Path, target: list[int], caplog):
    # The target shape depends on data, so that onnxruntime cannot infer what the file hides.
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Mul", ["s", "zero"], ["z"]),
        helper.make_node("Cast", ["z"], ["i"], to=TensorProto.INT64),
        helper.make_node("Add", ["i", "shape"], ["target"]),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    weights = {"zero": np.zeros((), np.float32), "shape": np.array(target, np.int64)}
    model = save_graph(tmp_path / "m.onnx", nodes, [("x", ["batch", 4])], [("y", ["batch", None])], weights)
    assert signature_of(model).shares_batch_axis
    lanes = Lanes(read_artifact(write_plain(tmp_path, "m", "1", model)), (CPU,), cpu_instances=1)
    assert not lanes.batchable
    assert "it is not batched" in caplog.text


def test_plain_model_that_refuses_ones_still_loads(tmp_path: Path):
    # Gathers row 1 of a table with a single row.
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"]),
    ]
    shapes = [("x", ["batch"])], [("y", ["batch", 2])]
    model = save_graph(tmp_path / "m.onnx", nodes, *shapes, {"table": np.ones((1, 2), np.float32)})
    lanes = Lanes(read_artifact(write_plain(tmp_path, "m", "1", model)), (CPU,), cpu_instances=1)
    assert lanes.specs[0].latency is None
    assert lanes.specs[0].runner.run({"x": np.zeros(3, np.float32)})["y"].shape == (3, 2)


@pytest.mark.parametrize(
    ("side", "spec"),
    [
        ("inputs", TensorSpec("x", "FP32", (None, 63))),
        ("inputs", TensorSpec("z", "FP32", ("batch", 64))),
        ("inputs", TensorSpec("x", "FP32", (4, 64))),
        ("outputs", TensorSpec("y", "FP16", ("batch", 10))),
        ("outputs", TensorSpec("y", "FP32", ("batch", 11))),
    ],
)
def test_variant_of_another_signature_is_refused(tmp_path: Path, mlp: Path, side: str, spec: TensorSpec):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp})
    edit_manifest(folder, signature=msgspec.structs.replace(signature_of(mlp), **{side: (spec,)}))
    with pytest.raises(StartupError, match=r"variant fp32 (takes|gives) .*, the manifest says"):
        Lanes(read_artifact(folder), (CPU,), cpu_instances=1)


def test_names_of_axes_and_open_outputs_do_not_matter(tmp_path: Path, mlp: Path):
    folder = write_artifact(tmp_path, "mlp", "1", {"fp32": mlp})
    signature = signature_of(mlp)
    declared = msgspec.structs.replace(
        signature, inputs=(TensorSpec("x", "FP32", ("n", 64)),), outputs=(TensorSpec("y", "FP32", (None, None)),)
    )
    edit_manifest(folder, signature=declared)
    assert Lanes(read_artifact(folder), (CPU,), cpu_instances=1).signature == declared


def test_closed_lanes_run_nothing(tmp_path: Path, mlp: Path):
    lanes = Lanes(read_artifact(write_artifact(tmp_path, "mlp", "1", {"a": mlp, "b": mlp})), (CPU,), cpu_instances=1)
    lanes.close()
    for spec in lanes.specs:
        with pytest.raises(Exception, match="is closed"):
            spec.runner.run({})


TABLE = LatencyTable((1,), (1.0,), (1.0,), (1.0,), (1.0,))


class Measured:
    """Stands in for the comparison of splits on a machine of four cores."""

    def __init__(self) -> None:
        self.split, self.failure = Split(2, 2), ""
        self.error: Exception | None = None
        self.subjects: list[str] = []

    def __call__(self, bench, cores: int) -> Finding:
        assert cores == 4
        self.subjects.append(str(bench._subject.session._path))
        bench.alone((Split(2, 2), Split(1, 4)))
        if self.error is not None:
            raise self.error
        return Finding((Trial(self.split, TABLE, 100.0),), self.failure)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    made = Measured()
    monkeypatch.setattr("server.lanes.compare", made)
    monkeypatch.setattr("server.lanes.usable_cores", lambda: 4)
    monkeypatch.setattr("server.lanes.INLINE_LANE_S", 0.0)
    return made


@pytest.fixture
def cnn(tmp_path: Path) -> Path:
    return models.save_cnn(tmp_path / "cnn.onnx")


def shape(lanes: Lanes) -> list[tuple[str, int, int]]:
    return [(group["variant"], group["instances"], group["threads"]) for group in lanes.summary()]


def threads_of_open_sessions(lanes: Lanes) -> list[int]:
    opened = [found._session for found in lanes._sessions if found._session is not None]
    return [found.get_session_options().intra_op_num_threads for found in opened]


def quiet() -> Splits:
    return Splits(lambda: True)


def test_plain_model_splits_the_cores_as_measured(tmp_path: Path, cnn: Path, measured: Measured, caplog):
    caplog.set_level(logging.INFO)
    splits = quiet()
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 0, splits=splits)
    assert shape(lanes) == [("unoptimized", 2, 2)]
    assert threads_of_open_sessions(lanes) == [2, 2]
    assert {spec.runner for spec in lanes.specs} == {found for found in lanes._sessions if found._session is not None}
    assert lanes.specs[0].latency.rows == (1, 2, 4, 8, 16, 32)  # of the sessions that serve
    assert splits.known("cnn") == Split(2, 2)
    assert "cnn/1: the cores are split as measured best, 2 x 2 threads (2 x 2 threads: 100 rows/s, 1 ms" in caplog.text


def test_lanes_of_one_thread_still_share_a_session_when_measured(tmp_path: Path, cnn: Path, measured: Measured):
    measured.split = Split(4, 1)
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 0, splits=quiet())
    assert shape(lanes) == [("unoptimized", 4, 1)]
    assert len({id(spec.runner) for spec in lanes.specs}) == 1
    assert lanes.specs[0].runner.run(lanes.specs[0].probe)


@pytest.mark.parametrize("error", [None, InferenceFailed("a run failed"), StartupError("does not open")])
def test_split_that_cannot_be_measured_is_one_lane_for_each_core(
    tmp_path: Path, cnn: Path, measured: Measured, caplog, error: Exception | None
):
    caplog.set_level(logging.INFO)
    measured.failure, measured.error = "something else runs on them", error
    splits = quiet()
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 0, splits=splits)
    assert shape(lanes) == [("unoptimized", 4, 1)]
    assert threads_of_open_sessions(lanes) == [1]
    assert lanes.specs[0].runner.run(lanes.specs[0].probe)
    assert splits.known("cnn") is None
    assert str(error or measured.failure) in caplog.text


def test_cores_are_not_taken_from_requests_that_are_served(tmp_path: Path, cnn: Path, measured: Measured, caplog):
    caplog.set_level(logging.INFO)
    splits = Splits(lambda: False)
    folder = write_plain(tmp_path, "cnn", "1", cnn)
    assert shape(Lanes(read_artifact(folder), (CPU,), 0, splits=splits)) == [("unoptimized", 4, 1)]
    assert "cnn/1: requests are served, so the split of the cores is not measured: as many lanes as fit" in caplog.text
    splits.remember("cnn", Split(1, 4))
    assert shape(Lanes(read_artifact(folder), (CPU,), 0, splits=splits)) == [("unoptimized", 1, 4)]
    assert "not measured: as for the version before" in caplog.text
    assert measured.subjects == []


def test_number_of_instances_that_was_set_is_not_measured(tmp_path: Path, cnn: Path, measured: Measured):
    splits = quiet()
    splits.remember("cnn", Split(1, 4))
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 3, splits=splits)
    assert shape(lanes) == [("unoptimized", 3, 1)]
    assert measured.subjects == []


def test_models_that_run_on_the_event_loop_are_not_measured(tmp_path: Path, mlp: Path, measured: Measured, monkeypatch):
    monkeypatch.setattr("server.lanes.INLINE_LANE_S", 10.0)
    lanes = Lanes(read_artifact(write_plain(tmp_path, "mlp", "1", mlp)), (CPU,), 0, splits=quiet())
    assert shape(lanes) == [("unoptimized", 4, 1)]
    assert measured.subjects == []


def test_single_core_has_nothing_to_split(tmp_path: Path, cnn: Path, measured: Measured, monkeypatch):
    monkeypatch.setattr("server.lanes.usable_cores", lambda: 1)
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 0, splits=quiet())
    assert shape(lanes) == [("unoptimized", 1, 1)]
    assert measured.subjects == []


def artifact_of(tmp_path: Path, mlp: Path, host: str, threads: int = 1) -> Path:
    """Write variants fp32, int8 (for large batches) and fp16, measured on a host with these threads."""
    table = LatencyTable((1, 2), (5e3, 9e3), (5e3, 9e3), (5e3, 9e3), (5e3, 9e3))
    folder = write_artifact(
        tmp_path,
        "mlp",
        "1",
        {"fp32": mlp, "int8": mlp, "fp16": mlp},
        latency=dict.fromkeys(("fp32", "int8", "fp16"), table),
        options=SessionOptions(intra_op_threads=threads, spinning=threads > 1),
        host=host,
    )
    give_large_batches(folder, "int8")
    return folder


@pytest.mark.parametrize(("threads", "instances"), [(1, 4), (4, 1)])
def test_artifact_of_this_host_is_served_as_its_manifest_says(
    tmp_path: Path, mlp: Path, measured: Measured, threads: int, instances: int
):
    folder = artifact_of(tmp_path, mlp, read_host().fingerprint, threads)
    splits = quiet()
    splits.remember("mlp", Split(2, 2))
    lanes = Lanes(read_artifact(folder), (CPU,), 0, splits=splits)
    assert shape(lanes) == [("fp32", instances, threads), ("int8", instances, threads), ("fp16", 1, threads)]
    assert {spec.latency.p50_ms for spec in lanes.specs} == {(5e3, 9e3)}
    assert measured.subjects == []


def test_artifact_of_another_host_is_measured_here(tmp_path: Path, mlp: Path, measured: Measured):
    lanes = Lanes(read_artifact(artifact_of(tmp_path, mlp, "another")), (CPU,), 0, splits=quiet())
    assert shape(lanes) == [("fp32", 2, 2), ("int8", 2, 2), ("fp16", 1, 1)]
    assert [Path(subject).parent.name for subject in measured.subjects] == ["fp32"]
    assert all(spec.latency.p50_ms[0] < 1e3 for spec in lanes.specs)
    assert all(spec.latency.rows == (1, 2, 4, 8, 16, 32) for spec in lanes.specs)


def test_artifact_of_another_host_keeps_its_threads_when_they_cannot_be_measured(
    tmp_path: Path, mlp: Path, measured: Measured
):
    measured.failure = "something else runs on them"
    lanes = Lanes(read_artifact(artifact_of(tmp_path, mlp, "another", threads=2)), (CPU,), 0, splits=quiet())
    assert shape(lanes) == [("fp32", 2, 2), ("int8", 2, 2), ("fp16", 1, 2)]
    assert threads_of_open_sessions(lanes) == [2] * 5
    assert all(spec.runner.run(spec.probe)["y"].shape == (1, 10) for spec in lanes.specs)


def test_split_is_really_measured_and_serves(tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.lanes.usable_cores", lambda: 2)
    monkeypatch.setattr("server.lanes.INLINE_LANE_S", 0.0)
    lanes = Lanes(read_artifact(write_plain(tmp_path, "cnn", "1", cnn)), (CPU,), 0, splits=quiet())
    assert shape(lanes) in ([("unoptimized", 2, 1)], [("unoptimized", 1, 2)])
    answers = [spec.runner.run(spec.probe)["logits"] for spec in lanes.specs]
    assert all(np.allclose(answer, answers[0], rtol=1e-4, atol=1e-5) for answer in answers)
    lanes.close()
