"""Native sessions: the contract that they share with onnxruntime's, on a runtime and a device that stand for real ones.

``fake_tensorrt`` runs the plan's model on the addresses that it is given; ``stubs/cudart.c`` has the memory. That the
fake has the names of the real runtime is checked against TensorRT-RTX, where that is installed.
"""

import ctypes
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import cudart, native, opening
from server.artifact import LatencyTable, SessionOptions
from server.errors import ArtifactError, DeviceLost, InferenceFailed, OutOfMemory, ProviderUnavailable, UnsupportedModel
from server.metrics import Metrics
from server.native import NativeSession, obstacle_of
from server.providers import CPU, Device, Devices
from server.repository import Repository
from server.session import Opened, Session
from server.settings import Settings
from server.tensors import InferRequest
from tests import models
from tests.artifacts import write_artifact
from tests.server import fake_tensorrt, stubs
from tests.server.test_recovery import until

GPU = Device("tensorrt")
PROFILE = {"x": ((1, 64), (4, 64), (16, 64))}
LARGE = {"x": ((17, 64), (32, 64), (64, 64))}
RTX = "tensorrt_rtx_bindings"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(RTX) is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stubs.build(tmp_path_factory.mktemp("cuda"), "libcudart.so.13", "cudart.c")


@pytest.fixture
def cuda(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stub of the CUDA runtime, in the place of the real one."""
    monkeypatch.setattr(cudart, "LIBRARIES", (str(library),))
    return ctypes.CDLL(str(library))


@pytest.fixture
def runtime(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fake_tensorrt", fake_tensorrt)
    monkeypatch.setattr(fake_tensorrt, "__name__", "fake_tensorrt")
    monkeypatch.setattr(native, "RUNTIMES", ("fake_tensorrt",))


@pytest.fixture
def plan(tmp_path: Path, mlp: Path) -> Path:
    file = tmp_path / "mlp.plan"
    file.write_bytes(fake_tensorrt.plan_of(mlp.read_bytes(), PROFILE, LARGE))
    return file


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)


# The contract, for both.


@pytest.fixture(params=["onnxruntime", "native"])
def session(request: pytest.FixtureRequest, mlp: Path) -> Iterator[Opened]:
    if request.param == "onnxruntime":
        made: Opened = Session(mlp, CPU, SessionOptions())
    else:
        request.getfixturevalue("runtime")
        made = NativeSession(request.getfixturevalue("plan"), GPU)
    yield made
    made.close()


@pytest.fixture
def expected(mlp: Path) -> Callable[[np.ndarray], np.ndarray]:
    reference = Session(mlp, CPU, SessionOptions())
    return lambda x: reference.run({"x": x})["y"]


def test_signature_is_the_models(session: Opened):
    inputs, outputs = session.signature.inputs, session.signature.outputs
    assert [(spec.name, spec.datatype, spec.protocol_shape) for spec in inputs] == [("x", "FP32", [-1, 64])]
    assert [(spec.name, spec.datatype, spec.protocol_shape) for spec in outputs] == [("y", "FP32", [-1, 10])]


def test_batches_that_grow_and_shrink_are_right(session: Opened, expected):
    for count in (1, 16, 2, 64, 17, 3, 16):
        x = rows(count, count)
        np.testing.assert_allclose(session.run({"x": x})["y"], expected(x), rtol=1e-5, atol=1e-5)


def test_answers_own_their_memory(session: Opened, expected):
    first = session.run({"x": rows(4)})["y"]
    kept = first.copy()
    session.run({"x": rows(4, 1)})
    session.run({"x": rows(16, 2)})
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    np.testing.assert_allclose(session.run({"x": rows(4)})["y"], expected(rows(4)), rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous_and_are_not_written_to(session: Opened, expected):
    x = np.asfortranarray(rows(8))
    x.setflags(write=False)
    np.testing.assert_allclose(session.run({"x": x})["y"], expected(np.ascontiguousarray(x)), rtol=1e-5, atol=1e-5)


def test_only_wanted_outputs_come(session: Opened):
    assert session.run({"x": rows(1)}, ("y",)).keys() == {"y"}


def test_threads_get_their_own_answers(session: Opened, expected):
    def ask(number: int) -> bool:
        x = rows(1 + number % 20, number)
        return np.allclose(session.run({"x": x})["y"], expected(x), rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_closed_session_fails(session: Opened):
    session.close()
    with pytest.raises(InferenceFailed, match="is closed"):
        session.run({"x": rows(1)})
    session.close()


# Plans.


def test_shape_outside_of_every_profile_names_what_fits(runtime, plan: Path):
    session = NativeSession(plan, GPU)
    told = "the engine was not built for x [65, 64]; it takes x [1, 64] to [16, 64]; x [17, 64] to [64, 64]"
    with pytest.raises(InferenceFailed, match=re.escape(told)):
        session.run({"x": rows(65)})
    assert session.run({"x": rows(1)})["y"].shape == (1, 10)


def test_size_that_the_data_decide_is_allocated_while_the_engine_runs(runtime, tmp_path: Path):
    model = models.save_nonzero(tmp_path / "nonzero.onnx")
    file = tmp_path / "nonzero.plan"
    file.write_bytes(fake_tensorrt.plan_of(model.read_bytes(), {"x": ((1,), (8,), (64,))}))
    session = NativeSession(file, GPU)
    for values in ([0, 1, 0, 2], [0, 0, 0, 0], list(range(20)), [1]):
        x = np.array(values, np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["places"], np.array(np.nonzero(x)))


def test_everything_is_released(runtime, cuda, plan: Path):
    before = cuda.stub_live()
    session = NativeSession(plan, GPU)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda count: session.run({"x": rows(count)}), (1, 4, 16, 64) * 4))
    assert cuda.stub_live() > before
    session.close()
    assert cuda.stub_live() == before


def test_plan_of_another_version_is_refused_with_the_fix(runtime, tmp_path: Path):
    (tmp_path / "other.plan").write_bytes(b"ftrt" + bytes(100))
    told = r"TensorRT 11.0.fake does not open .*other.plan on tensorrt:0: .*kMAGIC_TAG.*slipstream build-engine"
    with pytest.raises(ArtifactError, match=told):
        NativeSession(tmp_path / "other.plan", GPU)


def test_missing_plan_is_named(runtime, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"cannot read .*gone\.plan: No such file"):
        NativeSession(tmp_path / "gone.plan", GPU)


def test_type_that_cannot_be_served_is_refused(runtime, tmp_path: Path):
    file = tmp_path / "double.plan"
    model = models.save_double(tmp_path / "double.onnx")
    file.write_bytes(fake_tensorrt.plan_of(model.read_bytes(), {"x": ((1,), (1,), (1,))}))
    with pytest.raises(UnsupportedModel, match="tensor 'x' has type DOUBLE; served are FP32"):
        NativeSession(file, GPU)


# Failures of the device.


@pytest.mark.parametrize(
    ("function", "code", "kind"),
    [
        ("cudaMalloc", 2, OutOfMemory),
        ("cudaHostAlloc", 2, OutOfMemory),
        ("cudaMemcpyAsync", 719, DeviceLost),
        ("cudaStreamSynchronize", 719, DeviceLost),
        ("cudaSetDevice", 1, InferenceFailed),
    ],
)
def test_failure_of_cuda_is_told_apart_and_the_next_run_works(runtime, cuda, plan: Path, function, code, kind):
    session = NativeSession(plan, GPU)
    cuda.stub_fail(function.encode(), code)
    with pytest.raises(InferenceFailed, match=rf"mlp.plan on tensorrt:0: CUDA failure {code}: .*{function}") as caught:
        session.run({"x": rows(4)})
    assert type(caught.value) is kind
    assert session.run({"x": rows(4)})["y"].shape == (4, 10)


def test_failure_of_the_engine_has_its_reason(runtime, plan: Path, monkeypatch: pytest.MonkeyPatch):
    session = NativeSession(plan, GPU)

    def fail(context: Any, stream: int) -> bool:
        return context._error("[genericReformat.cu::execute::1] Error Code 1: Cuda Runtime (out of memory)")

    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", fail)
    with pytest.raises(OutOfMemory, match=r"the engine failed: .*genericReformat"):
        session.run({"x": rows(1)})


def test_device_without_memory_for_streams_is_unavailable(runtime, cuda, plan: Path):
    cuda.stub_fail(b"cudaStreamCreateWithFlags", 2)
    with pytest.raises(ProviderUnavailable, match="cannot be opened on tensorrt:0: CUDA failure 2: out of memory"):
        NativeSession(plan, GPU)


# What is installed.


def test_missing_runtime_names_what_to_install(cuda, plan: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "RUNTIMES", ("no_such_tensorrt", "json"))
    told = (
        r"no_such_tensorrt: No module.*; json: it has no Runtime\. Install one: pip install 'slipstream-server\[gpu\]'"
    )
    with pytest.raises(ProviderUnavailable, match=f"no TensorRT runtime: {told}"):
        NativeSession(plan, GPU)
    obstacle = obstacle_of(GPU)
    assert obstacle is not None
    assert (obstacle.code, "no TensorRT runtime" in obstacle.text) == ("missing_library", True)


def test_missing_cuda_runtime_is_named(runtime, plan: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cudart, "LIBRARIES", ("libcudart.so.99",))
    with pytest.raises(ProviderUnavailable, match=r"the CUDA runtime is not there: libcudart\.so\.99"):
        NativeSession(plan, GPU)
    obstacle = obstacle_of(GPU)
    assert obstacle is not None
    assert "libcudart.so.99" in obstacle.text


def test_nothing_is_in_the_way_where_both_are_there(runtime, cuda):
    assert obstacle_of(GPU) is None
    cuda.stub_fail(b"cudaSetDevice", 719)
    obstacle = obstacle_of(GPU)
    assert obstacle is not None
    assert obstacle.code == "failed"


@needs_rtx
def test_fake_has_no_name_that_the_real_runtime_lacks():
    real = importlib.import_module(RTX)
    for name in ("Runtime", "ICudaEngine", "IExecutionContext", "ILogger"):
        fake, there = getattr(fake_tensorrt, name), getattr(real, name)
        own = {attribute for attribute in vars(fake) if not attribute.startswith("_")}
        assert {attribute for attribute in own if not hasattr(there, attribute)} <= {"log"}, name
    assert {member.name for member in fake_tensorrt.TensorIOMode} <= set(dir(real.TensorIOMode))
    assert {name for name in native._DATATYPES if not hasattr(real.DataType, name)} == set()
    assert hasattr(real, "IOutputAllocator")
    for attribute in ("num_io_tensors", "num_optimization_profiles"):
        assert hasattr(real.ICudaEngine, attribute)
    assert hasattr(real.IExecutionContext, "active_optimization_profile")


@needs_rtx
def test_real_runtime_refuses_a_plan_without_a_gpu_and_says_so(cuda, plan: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "RUNTIMES", (RTX,))
    with pytest.raises((ArtifactError, ProviderUnavailable), match=r"TensorRT-RTX .*does not open|has no runtime here"):
        NativeSession(plan, GPU)


# In the server.


BUILDER = """
import pathlib, sys
sys.path.insert(0, {root!r})
from tests.server.fake_tensorrt import plan_of
model, options = pathlib.Path(sys.argv[1]), sys.argv[2:]
name, _, shapes = options[options.index("--profile") + 1].partition("=")
profile = {{name: [[int(size) for size in shape.split("x")] for shape in shapes.split(":")]}}
plan = pathlib.Path(options[options.index("--out") + 1])
plan.parent.mkdir(parents=True)
plan.write_bytes(plan_of(model.read_bytes(), profile))
"""


async def test_engine_built_beside_the_server_serves_in_a_native_session(
    runtime, cuda, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected
):
    monkeypatch.setattr(opening, "_find_devices", lambda _: Devices((GPU, CPU)))
    slow = LatencyTable((1,), (100.0,), (100.0,), (100.0,), (100.0,))
    write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp}, latency={"fp32": slow})
    script = tmp_path / "builder.py"
    script.write_text(BUILDER.format(root=str(Path(__file__).parents[2])))
    settings = Settings(
        repository=tmp_path / "models",
        cpu_instances=1,
        engine_cache=tmp_path / "engines",
        engine_builder=shlex.join([sys.executable, str(script)]),
    )
    before = cuda.stub_live()
    repository = Repository(settings, Metrics())
    await repository.open()
    model = repository.get("mlp")
    await until(lambda: model.variants == ("fp32-engine", "fp32"))
    for count in (1, 5, 32, 40):  # 40 rows are more than the profile has: parted, or run by the source
        x = rows(count, count)
        answer = await model.infer(InferRequest({"x": x}))
        assert answer.device.startswith("tensorrt:0")
        np.testing.assert_allclose(answer.outputs["y"], expected(x), rtol=1e-5, atol=1e-5)
    cuda.stub_fail(b"cudaStreamSynchronize", 719)
    answer = await model.infer(InferRequest({"x": rows(1)}))
    assert answer.device == "cpu", "the device was lost, and the request was not"
    await until(lambda: not repository.lanes_down)
    await repository.stop()
    repository.close()
    assert cuda.stub_live() == before
