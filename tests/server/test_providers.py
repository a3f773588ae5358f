import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

from server import providers
from server.artifact import SessionOptions
from server.errors import ArtifactError, EnvironmentConflict, ProviderUnavailable
from server.libraries import Obstacle
from server.providers import (
    CPU,
    PROBE_MODEL,
    Device,
    Devices,
    check_environment,
    find_devices,
    open_ort_session,
    placement_of,
    usable_devices,
)

GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that lists GPU providers which it cannot load, as the GPU wheel does without CUDA; two GPUs."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(GPU_BUILD))
    monkeypatch.setattr(providers, "count_gpus", lambda: (2, None))
    monkeypatch.setattr(providers, "missing_cuda", lambda: None)
    monkeypatch.setattr(providers, "missing_tensorrt", lambda: None)


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


def test_gpu_build_without_driver_is_no_accident(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog, capfd):
    missing = Obstacle("no_driver", "no NVIDIA driver (libcuda.so.1: ...)")
    monkeypatch.setattr(providers, "count_gpus", lambda: (0, missing))
    caplog.set_level(logging.INFO)
    assert find_devices("prefer") == Devices((CPU,), {"gpu": missing})
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", f"not used: {missing.text}")]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ProviderUnavailable, match=r"^no GPU can be used: no NVIDIA driver .*SLIPSTREAM_GPU=prefer$"):
        find_devices("require")


def test_old_driver_is_an_accident_and_no_gpu_is_tried(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(providers, "count_gpus", lambda: (2, Obstacle("old_driver", "update the driver")))
    monkeypatch.setattr(providers, "_try_device", lambda _: pytest.fail("tried"))
    assert usable_devices("prefer") == (CPU,)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", "not used: update the driver")]


def test_missing_libraries_are_told_before_onnxruntime_is_asked(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog):
    absent = Obstacle("missing_library", "libcublas.so.13 not found")
    monkeypatch.setattr(providers, "missing_cuda", lambda: absent)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("asked"))
    names = ["tensorrt:0", "tensorrt:1", "cuda:0", "cuda:1"]
    assert find_devices("prefer") == Devices((CPU,), dict.fromkeys(names, absent))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"not used: {name}: libcublas.so.13 not found" for name in names]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_gpu_that_fails_the_probe_is_not_used_and_each_reason_is_told(gpu_build, monkeypatch):
    monkeypatch.setattr(providers, "missing_tensorrt", lambda: Obstacle("missing_library", "TensorRT 10 is missing"))
    seen = find_devices("prefer")
    assert seen.usable == (CPU,)
    assert [(name, found.code) for name, found in seen.unused.items()] == [
        *(("tensorrt:0", "missing_library"), ("tensorrt:1", "missing_library")),
        *(("cuda:0", "failed"), ("cuda:1", "failed")),
    ]
    assert "asked for CUDAExecutionProvider, but onnxruntime gave ['CPU" in seen.unused["cuda:0"].text
    with pytest.raises(ProviderUnavailable, match=r"(?s)tensorrt:0.*cuda:1.*SLIPSTREAM_GPU=prefer"):
        find_devices("require")


def test_libraries_of_packages_are_loaded_once_and_quietly(gpu_build, monkeypatch: pytest.MonkeyPatch, capsys):
    calls = []
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: calls.append(sys.stdout.write("Failed to load libcublas.so.13\n"))
    )
    monkeypatch.setattr(providers, "missing_cuda", lambda: Obstacle("missing_library", "absent"))
    providers._preload.cache_clear()
    find_devices("prefer")
    assert len(calls) == 1
    assert capsys.readouterr().out == ""


def test_working_gpus_come_before_the_cpu_and_tensorrt_first(gpu_build, monkeypatch: pytest.MonkeyPatch):
    broken = Obstacle("failed", "broken")
    monkeypatch.setattr(providers, "_try_device", lambda device: broken if device.name == "tensorrt:1" else None)
    seen = find_devices("prefer", 1 << 30)
    assert [device.name for device in seen.usable] == ["tensorrt:0", "cuda:0", "cuda:1", "cpu"]
    assert {device.memory_bytes for device in seen.usable if device != CPU} == {1 << 30}
    assert seen.unused == {"tensorrt:1": broken}


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

    # Where the nodes are: provider -> operators.
    placed: ClassVar[dict[str, list[str]]] = {}

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        def node(kind: str) -> SimpleNamespace:
            return SimpleNamespace(domain="", op_type=kind)

        def subgraph(name: str, kinds: list[str]) -> SimpleNamespace:
            return SimpleNamespace(ep_name=name, get_nodes=lambda: [node(kind) for kind in kinds])

        return [subgraph(name, kinds) for name, kinds in self.placed.items()]

    def disable_fallback(self) -> None:
        self.fallback = "disabled"

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.providers]

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [inputs["x"] * 0]


CUDA_DEFAULTS = {
    "use_tf32": "0",
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
}


def test_gpu_session_keeps_fp32_exact_and_never_falls_back(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    opened = open_ort_session(b"", Device("tensorrt", 1), SessionOptions())
    assert opened.providers == [
        ("TensorrtExecutionProvider", {"device_id": "1"}),
        ("CUDAExecutionProvider", {"device_id": "1", **CUDA_DEFAULTS}),
        ("CPUExecutionProvider", {}),
    ]
    assert opened.fallback == "disabled"
    assert _has_entry(opened.options, providers.RECORD_PLACEMENT, "1")


def test_limit_of_memory_and_a_variants_own_options_reach_the_provider(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    own = SessionOptions(provider_options={"use_tf32": "1", "prefer_nhwc": "1"})
    opened = open_ort_session(b"", Device("cuda", 0, 1 << 30), own)
    assert dict(opened.providers)["CUDAExecutionProvider"] == {
        **CUDA_DEFAULTS,
        "device_id": "0",
        "gpu_mem_limit": "1073741824",
        "use_tf32": "1",
        "prefer_nhwc": "1",
    }
    own = SessionOptions(provider_options={"trt_builder_optimization_level": "5"})
    opened = open_ort_session(b"", Device("tensorrt"), own)
    assert opened.providers[0][1] == {"device_id": "0", "trt_builder_optimization_level": "5"}


def test_engines_of_the_provider_are_kept_by_everything_that_the_model_holds(
    gpu_build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    device = Device("tensorrt", cache=str(tmp_path / "kept"))

    def place_of(folder: str, graph: str, weights: str) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.onnx").write_text(graph)
        (tmp_path / folder / "model.data").write_text(weights)
        options = open_ort_session(tmp_path / folder / "model.onnx", device, SessionOptions()).providers[0][1]
        assert options["trt_engine_cache_enable"] == "1"
        assert options["trt_timing_cache_path"] == str(tmp_path / "kept" / "onnxruntime")
        return options["trt_engine_cache_path"]

    first = place_of("a", "graph", "weights")
    assert place_of("b", "graph", "weights") == first
    assert place_of("c", "graph", "other weights") != first, "an equal graph with other weights"
    assert place_of("d", "other graph", "weights") != first


def test_sizes_for_graphs_turn_graphs_on(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    opened = open_ort_session(b"", Device("cuda"), SessionOptions(config={providers.GRAPH_ROWS: "1,8"}))
    assert dict(opened.providers)["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"


@pytest.mark.parametrize(
    ("device", "option", "told"),
    [
        (CPU, "use_tf32", "allowed on cpu: none"),
        (Device("cuda"), "device_id", r"allowed on cuda: arena_extend_strategy, .*use_tf32$"),
        (Device("tensorrt"), "trt_fp16_enable", "allowed on tensorrt: trt_auxiliary_streams"),
    ],
)
def test_option_that_a_provider_does_not_take_is_refused(gpu_build, mlp: Path, device, option, told):
    with pytest.raises(ArtifactError, match=f"provider_options has {option}; {told}"):
        open_ort_session(mlp, device, SessionOptions(provider_options={option: "1"}))


def test_nodes_that_a_gpu_leaves_to_the_cpu_are_told(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog):
    placed = {"CUDAExecutionProvider": ["MatMul"], "CPUExecutionProvider": ["Loop", "NonZero", "Loop"]}
    monkeypatch.setattr(RecordingSession, "placed", placed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    caplog.set_level(logging.INFO)
    opened = open_ort_session(b"", Device("cuda"), SessionOptions())
    assert caplog.messages == ["cuda:0 leaves 3 nodes to the CPU: 2 Loop, 1 NonZero"]
    assert placement_of(opened) == {
        "CUDAExecutionProvider": {"MatMul": 1},
        "CPUExecutionProvider": {"Loop": 2, "NonZero": 1},
    }


def test_active_provider_that_computes_nothing_is_refused(gpu_build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RecordingSession, "placed", {"CPUExecutionProvider": ["Loop"]})
    monkeypatch.setattr(onnxruntime, "InferenceSession", RecordingSession)
    with pytest.raises(ProviderUnavailable, match="no operator of the model runs on cuda:0, all on the CPU: 1 Loop"):
        open_ort_session(b"", Device("cuda"), SessionOptions())


def test_gpu_that_computes_wrongly_is_not_used(gpu_build, monkeypatch: pytest.MonkeyPatch, caplog):
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
