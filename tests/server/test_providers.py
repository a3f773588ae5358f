import ctypes
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from server import providers
from server.artifact import SessionOptions
from server.errors import ArtifactError, EnvironmentConflict, ProviderUnavailable
from server.providers import (
    CPU,
    PROBE_MODEL,
    Device,
    check_environment,
    open_ort_session,
    saturates_int8,
    usable_cores,
    usable_devices,
)

GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class Driver:
    """Stands in for libcuda.so.1, and fails to be any other library."""

    def __init__(self, gpus: int, status: int = 0) -> None:
        self.gpus, self.status = gpus, status

    def __call__(self, name: str, mode: int = 0) -> "Driver":
        if name != "libcuda.so.1":
            raise OSError(f"{name}: cannot open shared object file")
        return self

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return 0


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that lists GPU providers which it cannot load, as the GPU wheel does without CUDA."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(GPU_BUILD))


def install(folder: Path, name: str, version: str, *, top_level: str | None = None, record: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)
    if top_level is not None:
        (info / "top_level.txt").write_text(top_level)


def test_probe_model_is_a_valid_model_that_adds():
    model = onnx.load_model_from_string(PROBE_MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, list(node.input), list(node.output)) for node in model.graph.node] == [
        ("Add", ["x", "x"], ["y"])
    ]
    session = open_ort_session(PROBE_MODEL, CPU, SessionOptions())
    assert session.run(None, {"x": np.array([1.5], np.float32)})[0].tolist() == [3.0]


def test_this_environment_has_one_onnxruntime():
    name, version = check_environment().split()
    assert name.startswith("onnxruntime")
    assert version == onnxruntime.__version__


def test_two_distributions_conflict(tmp_path: Path):
    install(tmp_path, "onnxruntime", "1.32.0", top_level="onnxruntime\n")
    install(tmp_path, "onnxruntime-gpu", "1.31.1", top_level="onnxruntime\n")
    with pytest.raises(EnvironmentConflict) as caught:
        check_environment([str(tmp_path)])
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in str(caught.value)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)


def test_owner_is_found_by_its_files_when_it_lists_no_top_level_package(tmp_path: Path):
    install(tmp_path, "onnxruntime-openvino", "1.24.1", record="a.py,,\nonnxruntime/__init__.py,,\n")
    assert check_environment([str(tmp_path)]) == "onnxruntime-openvino 1.24.1"


def test_packages_beside_onnxruntime_do_not_count(tmp_path: Path):
    install(tmp_path, "onnxruntime", "1.32.0", top_level="onnxruntime\n")
    install(tmp_path, "onnxruntime-extensions", "0.14", top_level="onnxruntime_extensions\n")
    install(tmp_path, "onnxruntime-ep-openvino", "1.8", record="onnxruntime_ep_openvino/__init__.py,,\n")
    assert check_environment([str(tmp_path)]) == "onnxruntime 1.32.0"


def test_missing_onnxruntime_names_both_extras(tmp_path: Path):
    with pytest.raises(EnvironmentConflict, match=r"not installed.*\[cpu\].*\[gpu\]"):
        check_environment([str(tmp_path)])


def test_onnxruntime_that_does_not_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, "onnxruntime", "1.32.0", top_level="onnxruntime\n")
    monkeypatch.setattr(providers, "IMPORT_FAILURE", "cannot import name 'capi'")
    with pytest.raises(EnvironmentConflict, match=r"cannot import name 'capi'.*onnxruntime==1\.32\.0"):
        check_environment([str(tmp_path)])


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [
        ("cpu.max", "max 100000", 8),
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "50000 100000", 1),
        ("pods/one/cpu.max", "300000 100000", 3),
        ("pods/cpu.max", "400000 100000", 4),
    ],
)
def test_cores_are_cut_by_cgroup_v2_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file, text, cores):
    (tmp_path / "own").write_text("0::/pods/one\n")
    monkeypatch.setattr(providers, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_cores_are_cut_by_cgroup_v1_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path) == cores


def test_cores_are_cut_by_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert usable_cores(tmp_path) == 2


def test_device_names():
    assert [Device("cpu").name, Device("cuda", 1).name, Device("tensorrt").name] == ["cpu", "cuda:1", "tensorrt:0"]


def test_gpu_off_looks_at_nothing(monkeypatch: pytest.MonkeyPatch):
    def never() -> list[str]:
        raise AssertionError("asked for providers")

    monkeypatch.setattr(onnxruntime, "get_available_providers", never)
    assert usable_devices("off") == (CPU,)


def test_cpu_build_is_quiet_and_serves_on_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog, capfd):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    caplog.set_level(logging.INFO)
    assert usable_devices("prefer") == (CPU,)
    assert "CPU build" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert capfd.readouterr() == ("", "")


def test_gpu_build_without_driver_says_so(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog, capfd):
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    caplog.set_level(logging.INFO)
    assert usable_devices("prefer") == (CPU,)
    assert "no NVIDIA driver (libcuda.so.1: cannot open shared object file)" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("driver", "reason"), [(Driver(0), "offers no GPU"), (Driver(1, status=100), r"offers no GPU \(CUDA error 100\)")]
)
def test_driver_without_gpu_is_refused_when_a_gpu_is_required(gpu_build, monkeypatch, driver, reason):
    monkeypatch.setattr(ctypes, "CDLL", driver)
    with pytest.raises(ProviderUnavailable, match=reason):
        usable_devices("require")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_gpu_that_fails_the_probe_is_not_used_and_each_reason_is_warned_of(gpu_build, monkeypatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", Driver(2))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    assert usable_devices("prefer") == (CPU,)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 4
    assert sum("TensorRT 10 is not installed (libnvinfer.so.10" in text for text in warned) == 2
    assert sum("asked for CUDAExecutionProvider, but onnxruntime gave" in text for text in warned) == 2
    with pytest.raises(ProviderUnavailable, match=r"(?s)tensorrt:0.*cuda:1.*SLIPSTREAM_GPU=prefer"):
        usable_devices("require")


def test_working_gpus_come_before_the_cpu_and_tensorrt_first(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", Driver(2))
    monkeypatch.setattr(providers, "_try_device", lambda device: "broken" if device.name == "tensorrt:1" else "")
    assert [device.name for device in usable_devices("prefer")] == ["tensorrt:0", "cuda:0", "cuda:1", "cpu"]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_session_that_fell_back_to_the_cpu_is_refused(gpu_build, mlp: Path):
    with pytest.raises(ProviderUnavailable, match=r"asked for CUDAExecutionProvider, but onnxruntime gave \['CPU"):
        open_ort_session(mlp, Device("cuda"), SessionOptions())


def test_provider_that_is_not_built_in_is_refused(mlp: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailable, match="built without CUDAExecutionProvider"):
        open_ort_session(mlp, Device("cuda"), SessionOptions())


class RecordingSession:
    """Records what onnxruntime.InferenceSession would be given."""

    def __init__(self, model, sess_options, providers, enable_fallback) -> None:
        self.options, self.providers, self.fallback = sess_options, providers, enable_fallback

    def disable_fallback(self) -> None:
        self.fallback = "disabled"

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.providers]

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [inputs["x"] * 0]


def test_gpu_session_keeps_fp32_exact_and_never_falls_back(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    opened = open_ort_session(b"", Device("tensorrt", 1), SessionOptions())
    assert opened.providers == [
        ("TensorrtExecutionProvider", {"device_id": "1", "trt_engine_cache_enable": "0"}),
        ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"}),
        ("CPUExecutionProvider", {}),
    ]
    assert opened.fallback == "disabled"


def test_gpu_that_computes_wrongly_is_not_used(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", Driver(1))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    assert usable_devices("prefer") == (CPU,)
    assert "cuda:0: 1.5 + 1.5 gave [0.0]" in caplog.text


def test_provider_that_raises_is_unavailable(gpu_build, monkeypatch: pytest.MonkeyPatch):
    def fail(*args, **kwargs) -> None:
        assert kwargs["enable_fallback"] == 0
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nat somewhere.cc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(
        ProviderUnavailable, match=r"fails on cuda:0: CUDA failure 100: no CUDA-capable device is detected$"
    ):
        open_ort_session(b"", Device("cuda"), SessionOptions())


def test_session_options_are_handed_over(mlp: Path):
    options = SessionOptions(
        intra_op_threads=2, spinning=True, graph_level="basic", config={"session.x64quantprecision": "1"}
    )
    seen = open_ort_session(mlp, CPU, options).get_session_options()
    assert (seen.intra_op_num_threads, seen.inter_op_num_threads) == (2, 1)
    assert seen.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert seen.get_session_config_entry("session.x64quantprecision") == "1"
    assert seen.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    quiet = open_ort_session(mlp, CPU, SessionOptions()).get_session_options()
    assert quiet.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("cpuinfo", "saturates"),
    [
        ("flags\t\t: fpu avx2 avx512f", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx2 avx_vnni", False),
        ("Features\t: fp asimd asimddp", False),
        ("", False),
    ],
)
def test_x86_without_int8_dot_product_saturates(tmp_path: Path, cpuinfo: str, saturates: bool):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert saturates_int8(file) is saturates
    assert not saturates_int8(tmp_path / "missing")


@pytest.mark.parametrize("saturates", [True, False])
def test_exact_int8_products_are_asked_for_where_the_cpu_would_saturate(
    mlp: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
):
    monkeypatch.setattr(providers, "saturates_int8", lambda: saturates)
    seen = open_ort_session(mlp, CPU, SessionOptions()).get_session_options()
    assert _has_entry(seen, providers.EXACT_PRODUCTS, "1") is saturates
    # A variant whose weights cannot saturate says so, and that wins.
    own = SessionOptions(config={providers.EXACT_PRODUCTS: "0"})
    assert _has_entry(open_ort_session(mlp, CPU, own).get_session_options(), providers.EXACT_PRODUCTS, "0")


def _has_entry(options: onnxruntime.SessionOptions, key: str, value: str) -> bool:
    try:
        return options.get_session_config_entry(key) == value
    except RuntimeError:  # no such entry
        return False


def test_unknown_graph_level_names_the_allowed_ones(mlp: Path):
    with pytest.raises(ArtifactError, match=r"'most'; allowed: disable, basic, extended, all"):
        open_ort_session(mlp, CPU, SessionOptions(graph_level="most"))


@pytest.mark.gpu
def test_gpu_really_works(mlp: Path):
    devices = usable_devices("prefer")
    if devices[0] == CPU:
        pytest.skip("no GPU works here")
    session = open_ort_session(mlp, devices[0], SessionOptions())
    x = np.ones((2, 64), np.float32)
    expected = open_ort_session(mlp, CPU, SessionOptions()).run(None, {"x": x})[0]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
