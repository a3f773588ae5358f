"""Devices and execution providers: which ones really work here, and sessions that are proven to run on them.

onnxruntime replaces a GPU provider that it cannot load by the CPU, without an exception, and lists providers that were
compiled in, not those that work. So a provider counts as usable only after a session on it gave the right answer, and
every session is asked which providers it really holds. Beside this module only ``bound`` and ``device_memory`` import
onnxruntime.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from server.artifact import SessionOptions, digest_of
from server.cores import saturates_int8
from server.errors import ArtifactError, EnvironmentConflict, ProviderUnavailable, StartupError, UnsupportedModel
from server.libraries import Obstacle, count_gpus, missing_cuda, missing_tensorrt

IMPORT_FAILURE = ""
try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
except ImportError as exc:  # onnxruntime is one of two extras; check_environment() tells the user which to install.
    IMPORT_FAILURE = str(exc)

logger = logging.getLogger(__name__)

Kind = Literal["cpu", "cuda", "tensorrt"]
_EXECUTION_PROVIDER: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PROVIDER_OPTIONS: dict[str, frozenset[str]] = {
    "cpu": frozenset(),
    "cuda": frozenset(
        {
            *("arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace"),
            *("cudnn_conv1d_pad_to_nc1d", "enable_cuda_graph", "enable_cudnn", "fuse_conv_bias", "gpu_mem_limit"),
            *("prefer_nhwc", "sdpa_kernel", "use_tf32"),
        }
    ),
    "tensorrt": frozenset(
        {
            *("trt_auxiliary_streams", "trt_builder_optimization_level", "trt_cuda_graph_enable"),
            *(
                "trt_engine_cache_enable",
                "trt_engine_cache_path",
                "trt_engine_cache_prefix",
                "trt_engine_hw_compatible",
            ),
            *("trt_max_workspace_size", "trt_op_types_to_exclude", "trt_profile_max_shapes", "trt_profile_min_shapes"),
            *("trt_profile_opt_shapes", "trt_sparsity_enable", "trt_timing_cache_enable", "trt_timing_cache_path"),
        }
    ),
}
"""What a variant may set. Not the number of the GPU, which is its lane's, nor a precision, which is its file's."""

_CUDA_OPTIONS = {
    "use_tf32": "0",  # it would cut FP32 to 10 bits of mantissa, and a variant called fp32 would not be one
    "arena_extend_strategy": "kSameAsRequested",  # doubling would keep memory from the other models of the GPU
    "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive one would stop the first batch of every new size
}
_GRAPH_LEVEL = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
EXACT_PRODUCTS = "session.x64quantprecision"
"""Session entry: compute INT8 products exactly where the CPU would saturate them, see ``saturates_int8``."""

RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Session entry: remember which provider got which node, see ``placement_of``."""

GRAPH_ROWS = "slipstream.cuda_graph_rows"
"""Session entry of our own: batch sizes to capture as CUDA graphs, e.g. ``1,8,32``."""

_INSTALL = "pip install 'slipstream-server[cpu]' or pip install 'slipstream-server[gpu]'"

# A ModelProto by hand, because the runtime goes without the onnx package: IR version 8, opset 17, y = x + x, where x
# and y are FP32 [1]. Comments name the protobuf fields.
PROBE_MODEL = (
    b"\x08\x08"  # ir_version: 8
    b"\x3a\x35"  # graph, 53 bytes:
    b"\x0a\x0e" + b"\x0a\x01x" + b"\x0a\x01x" + b"\x12\x01y" + b"\x22\x03Add"  # node: inputs x and x, output y, op_type
    b"\x12\x01g"  # name: g
    b"\x5a\x0f"
    + b"\x0a\x01x"
    + b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # input x: FLOAT, one axis of size 1
    b"\x62\x0f" + b"\x0a\x01y" + b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # output y: the same
    b"\x42\x02\x10\x11"  # opset_import: version 17
)


class Device(msgspec.Struct, frozen=True):
    """Where a session runs.

    Attributes:
        kind: ``tensorrt`` is the GPU through TensorRT, ``cuda`` the GPU without it.
        index: Number of the GPU; 0 for the CPU.
        memory_bytes: Most memory that a session's arena may take on the GPU; 0 sets no limit.
        cache: Folder for engines that onnxruntime's TensorRT provider builds; empty keeps none.
    """

    kind: Kind
    index: int = 0
    memory_bytes: int = 0
    cache: str = ""

    @property
    def name(self) -> str:
        """``cpu``, ``cuda:0``, ``tensorrt:0``: as in labels, logs and response headers."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


def ort_errors() -> tuple[type[Exception], ...]:
    """Return every class that onnxruntime raises; its own ones share no base class."""
    own = [kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


def check_environment(search_path: Sequence[str] | None = None) -> str:
    """Require exactly one distribution that owns the package ``onnxruntime``; return its name and version.

    Two of them overwrite each other's files, and the CPU one silently takes the GPU away.

    Args:
        search_path: Where to look; ``sys.path`` by default.

    Raises:
        EnvironmentConflict: If there are two or none, or if the one does not import.
    """
    found = metadata.distributions() if search_path is None else metadata.distributions(path=list(search_path))
    owners = {dist.name.lower(): f"{dist.name} {dist.version}" for dist in found if _owns_onnxruntime(dist)}
    if not owners:
        raise EnvironmentConflict(f"onnxruntime is not installed; install one form: {_INSTALL}")
    if len(owners) > 1:
        raise EnvironmentConflict(
            f"{' and '.join(sorted(owners.values()))} overwrite each other's files; "
            f"run: pip uninstall -y {' '.join(sorted(owners))}; then install one form: {_INSTALL}"
        )
    (owner,) = owners.values()
    if IMPORT_FAILURE:
        raise EnvironmentConflict(
            f"{owner} is installed but does not import ({IMPORT_FAILURE}); "
            f"run: pip install --force-reinstall --no-deps {owner.replace(' ', '==')}"
        )
    return owner


class Devices(msgspec.Struct, frozen=True):
    """What there is to run on.

    Attributes:
        usable: The devices on which a session really runs, the fastest kind first and the CPU last.
        unused: Why others are not among them, by the device's name, or ``gpu`` for all GPUs.
    """

    usable: tuple[Device, ...]
    unused: dict[str, Obstacle] = {}


def find_devices(gpu: str, memory_bytes: int = 0, cache: str = "") -> Devices:
    """Find out on which devices a session really runs.

    Blocks while it tries a tiny model on each GPU.

    Args:
        gpu: ``off``, ``prefer`` or ``require``, see ``Settings.gpu``.
        memory_bytes: Of each session on a GPU, see ``Device``.
        cache: Of engines, see ``Device``.

    Raises:
        ProviderUnavailable: If ``gpu`` is ``require`` and no GPU works; the message holds every reason.
    """
    if gpu == "off":
        return Devices((CPU,))
    count, obstacle = _count_gpus()
    unused = {"gpu": obstacle} if obstacle is not None else {}
    devices: list[Device] = []
    kinds: tuple[Kind, ...] = ("tensorrt", "cuda")
    for kind in kinds:
        for index in range(0 if obstacle is not None else count):
            device = Device(kind, index, memory_bytes, cache)
            if (failure := _try_device(device)) is not None:
                unused[device.name] = failure
            else:
                devices.append(device)
    reasons = [f"{name}: {found.text}" if name != "gpu" else found.text for name, found in unused.items()]
    if gpu == "require" and not devices:
        raise ProviderUnavailable(
            f"no GPU can be used: {'; '.join(reasons)}. Cure that, or allow the CPU with SLIPSTREAM_GPU=prefer"
        )
    for text in reasons:
        # A CPU build, or a machine without a driver, is no accident; a GPU that fails is one.
        logger.log(logging.WARNING if count else logging.INFO, "not used: %s", text)
    return Devices((*devices, CPU), unused)


def usable_devices(gpu: str) -> tuple[Device, ...]:
    """Return what ``find_devices`` finds usable."""
    return find_devices(gpu).usable


def open_ort_session(model: Path | bytes, device: Device, options: SessionOptions) -> "onnxruntime.InferenceSession":
    """Open a session and prove that it runs on the device that was asked for.

    Nodes that a GPU provider cannot take are still placed on the next provider of the list, the CPU at the end.

    Args:
        model: An ONNX file, or its bytes.
        device: Where it must run.
        options: Threads, optimization level and config entries.

    Raises:
        ArtifactError: If the file cannot be read as a model, or if the options name an unknown optimization level, or
            an option that its provider does not have.
        UnsupportedModel: If onnxruntime reads the model but cannot run it.
        ProviderUnavailable: If the device's provider is not built in, cannot be created, is not the active one, or
            takes no node of the model.
    """
    providers = _providers(device, options, _engines_of(model, device))
    wanted = providers[0][0]
    if wanted not in onnxruntime.get_available_providers():
        raise ProviderUnavailable(f"this onnxruntime is built without {wanted}; {device.name} needs the gpu extra")
    session = _create(model, device, providers, _ort_options(device, options))
    session.disable_fallback()  # or run() would quietly rebuild the session on the CPU after a provider's failure
    active = session.get_providers()
    if active[0] != wanted:
        raise ProviderUnavailable(
            f"asked for {wanted}, but onnxruntime gave {active}; its own message is on stderr, "
            "most often a missing CUDA or cuDNN library"
        )
    if device.kind != "cpu":
        _require_nodes(session, device)
    return session


def placement_of(session: "onnxruntime.InferenceSession") -> dict[str, dict[str, int]]:
    """Return execution provider -> operator -> count of its nodes.

    Sessions on a GPU tell; others only with the session entry ``session.record_ep_graph_assignment_info`` = ``1``.
    onnxruntime lists the nodes as they were before it fused them for the provider.
    """
    placed: dict[str, dict[str, int]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        ops = placed.setdefault(subgraph.ep_name, {})
        for node in subgraph.get_nodes():
            name = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
            ops[name] = ops.get(name, 0) + 1
    return placed


def _require_nodes(session: "onnxruntime.InferenceSession", device: Device) -> None:
    """Require that the GPU computes something, and say what it leaves to the CPU."""
    placed = placement_of(session)
    on_cpu = placed.pop(_EXECUTION_PROVIDER["cpu"], {})
    if on_cpu and not placed:
        raise ProviderUnavailable(f"no operator of the model runs on {device.name}, all on the CPU: {_told(on_cpu)}")
    if on_cpu:
        logger.info("%s leaves %d nodes to the CPU: %s", device.name, sum(on_cpu.values()), _told(on_cpu))


def _told(ops: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(ops.items()))


def _create(
    model: Path | bytes, device: Device, providers: list[tuple[str, dict[str, str]]], options: Any
) -> "onnxruntime.InferenceSession":
    source = "the given bytes" if isinstance(model, bytes) else str(model)
    given = model if isinstance(model, bytes) else str(model)
    unreadable = (ort_state.InvalidProtobuf, ort_state.NoSuchFile, ort_state.NoModel, ort_state.InvalidArgument)
    try:
        return onnxruntime.InferenceSession(given, sess_options=options, providers=providers, enable_fallback=0)
    except unreadable as exc:
        raise ArtifactError(f"onnxruntime cannot read {source}: {_first_line(exc)}") from exc
    except ort_errors() as exc:
        # A provider that fails raises RuntimeError; a model that fails raises one of onnxruntime's own classes.
        if device.kind != "cpu" and isinstance(exc, RuntimeError):
            raise ProviderUnavailable(f"{providers[0][0]} fails on {device.name}: {_first_line(exc)}") from exc
        raise UnsupportedModel(f"onnxruntime cannot open {source} on {device.name}: {_first_line(exc)}") from exc


def _engines_of(model: Path | bytes, device: Device) -> dict[str, str]:
    """Return where TensorRT's provider keeps its engines of a model.

    It names them by the graph; models of equal graphs and other weights must not share one.
    """
    if device.kind != "tensorrt" or not device.cache or isinstance(model, bytes):
        return {}
    folder = Path(device.cache) / "onnxruntime"
    weights = sorted(file for file in model.parent.iterdir() if file.is_file())
    digest = hashlib.sha256("".join(digest_of(file) for file in weights).encode()).hexdigest()
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder / digest[:32]),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _providers(device: Device, options: SessionOptions, engines: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    cpu: tuple[str, dict[str, str]] = (_EXECUTION_PROVIDER["cpu"], {})
    own = options.provider_options
    if unknown := sorted(own.keys() - PROVIDER_OPTIONS[device.kind]):
        allowed = ", ".join(sorted(PROVIDER_OPTIONS[device.kind])) or "none"
        raise ArtifactError(f"provider_options has {', '.join(unknown)}; allowed on {device.kind}: {allowed}")
    if device.kind == "cpu":
        return [cpu]
    cuda = {"device_id": str(device.index), **_CUDA_OPTIONS}
    if device.memory_bytes:
        cuda["gpu_mem_limit"] = str(device.memory_bytes)
    if device.kind == "cuda":
        if options.config.get(GRAPH_ROWS):
            cuda["enable_cuda_graph"] = "1"
        return [(_EXECUTION_PROVIDER["cuda"], {**cuda, **own}), cpu]
    tensorrt = {"device_id": str(device.index), **engines, **own}
    return [(_EXECUTION_PROVIDER["tensorrt"], tensorrt), (_EXECUTION_PROVIDER["cuda"], cuda), cpu]


def _ort_options(device: Device, options: SessionOptions) -> "onnxruntime.SessionOptions":
    if options.graph_level not in _GRAPH_LEVEL:
        raise ArtifactError(f"graph_level is {options.graph_level!r}; allowed: {', '.join(_GRAPH_LEVEL)}")
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = options.intra_op_threads
    made.inter_op_num_threads = 1
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _GRAPH_LEVEL[options.graph_level])
    # Errors of the CPU provider are raised, and logged by who catches them; a GPU's reasons come only on stderr.
    made.log_severity_level = 4 if device.kind == "cpu" else 3
    made.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    # Only there: on other CPUs it would give up the dot product, and most of INT8's gain.
    needed = {EXACT_PRODUCTS: "1"} if device.kind == "cpu" and saturates_int8() else {}
    if device.kind != "cpu":
        needed[RECORD_PLACEMENT] = "1"
    for key, value in {**needed, **options.config}.items():
        made.add_session_config_entry(key, value)
    return made


def _count_gpus() -> tuple[int, Obstacle | None]:
    if _EXECUTION_PROVIDER["cuda"] not in onnxruntime.get_available_providers():
        return 0, Obstacle("cpu_build", "the installed onnxruntime is a CPU build, no GPU is tried")
    return count_gpus()


@cache
def _preload() -> None:
    """Load what lies in the packages of CUDA, which no path of the linker names."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; ``missing_cuda`` tells that better
            onnxruntime.preload_dlls()


def _try_device(device: Device) -> Obstacle | None:
    """Run the probe model on a GPU; return why it fails."""
    _preload()
    missing = missing_cuda()
    if missing is None and device.kind == "tensorrt":
        missing = missing_tensorrt()
    if missing is not None:
        return missing
    failures: tuple[type[Exception], ...] = (StartupError, *ort_errors())
    try:
        session = open_ort_session(PROBE_MODEL, device, SessionOptions())
        (answer,) = session.run(None, {"x": np.array([1.5], np.float32)})
    except failures as exc:
        return Obstacle("failed", _first_line(exc))
    return None if answer.tolist() == [3.0] else Obstacle("failed", f"1.5 + 1.5 gave {answer.tolist()}")


def _owns_onnxruntime(dist: metadata.Distribution) -> bool:
    if "onnxruntime" in (dist.read_text("top_level.txt") or "").split():
        return True
    record = dist.read_text("RECORD") or ""
    return record.startswith("onnxruntime/") or "\nonnxruntime/" in record


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
