"""Devices and execution providers: which ones really work here, and sessions that are proven to run on them.

onnxruntime replaces a GPU provider that it cannot load by the CPU, without an exception, and lists providers that were
compiled in, not those that work. So a provider counts as usable only after a session on it gave the right answer, and
every session is asked which providers it really holds. This is the only module of the runtime that imports onnxruntime.
"""

import ctypes
import importlib.util
import logging
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from server.artifact import SessionOptions
from server.errors import ArtifactError, EnvironmentConflict, ProviderUnavailable, StartupError, UnsupportedModel

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
_GRAPH_LEVEL = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
EXACT_PRODUCTS = "session.x64quantprecision"
"""Session entry: compute INT8 products exactly where the CPU would saturate them, see ``saturates_int8``."""

_INT8_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni"})
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
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
    """

    kind: Kind
    index: int = 0

    @property
    def name(self) -> str:
        """``cpu``, ``cuda:0``, ``tensorrt:0``: as in labels, logs and response headers."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


def ort_errors() -> tuple[type[Exception], ...]:
    """Return every class that onnxruntime raises; its own ones share no base class."""
    own = [kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use: its affinity, cut by the cgroup's CPU quota, at least 1.

    Args:
        cgroup: Where the cgroup file system is mounted.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *_quotas(cgroup)]))


def saturates_int8(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether this CPU gives wrong INT8 products unless it is told otherwise.

    x86 without VNNI multiplies UINT8 by INT8 and adds two neighbours in 16 bits, which saturates: 2 x 255 x 127 exceeds
    32767. Weights of 7 bits never do, the session entry ``EXACT_PRODUCTS`` avoids it for all weights.

    Args:
        cpuinfo: Where Linux lists the CPU's instruction sets; a file without x86 flags means no.
    """
    flags = next((line for line in "".join(_read(cpuinfo)).splitlines() if line.startswith("flags")), "")
    return bool(flags) and not _INT8_DOT_PRODUCT & set(flags.split())


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


def usable_devices(gpu: str) -> tuple[Device, ...]:
    """Return the devices on which a session really runs, the fastest kind first and the CPU last.

    Blocks while it tries a tiny model on each GPU.

    Args:
        gpu: ``off``, ``prefer`` or ``require``, see ``Settings.gpu``.

    Raises:
        ProviderUnavailable: If ``gpu`` is ``require`` and no GPU works; the message holds every reason.
    """
    if gpu == "off":
        return (CPU,)
    count, reason = _count_gpus()
    reasons = [reason] if reason else []
    devices: list[Device] = []
    kinds: tuple[Kind, ...] = ("tensorrt", "cuda")
    for kind in kinds:
        for index in range(count):
            device = Device(kind, index)
            if failure := _try_device(device):
                reasons.append(f"{device.name}: {failure}")
            else:
                devices.append(device)
    if gpu == "require" and not devices:
        raise ProviderUnavailable(
            f"no GPU can be used: {'; '.join(reasons)}. Cure that, or allow the CPU with SLIPSTREAM_GPU=prefer"
        )
    for text in reasons:
        # A CPU build, or a machine without a driver, is no accident; a GPU that fails is one.
        logger.log(logging.WARNING if count else logging.INFO, "not used: %s", text)
    return (*devices, CPU)


def open_ort_session(model: Path | bytes, device: Device, options: SessionOptions) -> "onnxruntime.InferenceSession":
    """Open a session and prove that it runs on the device that was asked for.

    Nodes that a GPU provider cannot take are still placed on the next provider of the list, the CPU at the end.

    Args:
        model: An ONNX file, or its bytes.
        device: Where it must run.
        options: Threads, optimization level and config entries.

    Raises:
        ArtifactError: If the file cannot be read as a model, or if the options name an unknown optimization level.
        UnsupportedModel: If onnxruntime reads the model but cannot run it.
        ProviderUnavailable: If the device's provider is not built in, cannot be created, or is not the active one.
    """
    providers = _providers(device)
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
    return session


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


def _providers(device: Device) -> list[tuple[str, dict[str, str]]]:
    cpu: tuple[str, dict[str, str]] = (_EXECUTION_PROVIDER["cpu"], {})
    if device.kind == "cpu":
        return [cpu]
    # TF32 would cut FP32 to 10 bits of mantissa, and a variant called fp32 would not be one.
    cuda = (_EXECUTION_PROVIDER["cuda"], {"device_id": str(device.index), "use_tf32": "0"})
    if device.kind == "cuda":
        return [cuda, cpu]
    tensorrt = {"device_id": str(device.index), "trt_engine_cache_enable": "0"}
    return [(_EXECUTION_PROVIDER["tensorrt"], tensorrt), cuda, cpu]


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
    for key, value in {**needed, **options.config}.items():
        made.add_session_config_entry(key, value)
    return made


def _count_gpus() -> tuple[int, str]:
    """Count the GPUs through the driver, which is silent, before onnxruntime, which is not; else say why none."""
    if _EXECUTION_PROVIDER["cuda"] not in onnxruntime.get_available_providers():
        return 0, "the installed onnxruntime is a CPU build, no GPU is tried"
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        return 0, f"no NVIDIA driver ({exc})"
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return 0, f"the NVIDIA driver offers no GPU (CUDA error {code})"
    return count.value, "" if count.value else "the NVIDIA driver offers no GPU"


def _try_device(device: Device) -> str:
    """Run the probe model on a GPU; return why it fails, or nothing."""
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    if device.kind == "tensorrt" and (failure := _load_tensorrt()):
        return failure
    failures: tuple[type[Exception], ...] = (StartupError, *ort_errors())
    try:
        session = open_ort_session(PROBE_MODEL, device, SessionOptions())
        (answer,) = session.run(None, {"x": np.array([1.5], np.float32)})
    except failures as exc:
        return _first_line(exc)
    return "" if answer.tolist() == [3.0] else f"1.5 + 1.5 gave {answer.tolist()}"


def _load_tensorrt() -> str:
    """Load TensorRT 10, for which onnxruntime's provider is linked; return why it is not there, or nothing."""
    spec = importlib.util.find_spec("tensorrt_libs")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        places = [str(folder / library) for folder in folders if (folder / library).is_file()]
        try:
            ctypes.CDLL(next(iter(places), library), mode=ctypes.RTLD_GLOBAL)
        except OSError as exc:
            return f"TensorRT 10 is not installed ({exc})"
    return ""


def _owns_onnxruntime(dist: metadata.Distribution) -> bool:
    if "onnxruntime" in (dist.read_text("top_level.txt") or "").split():
        return True
    record = dist.read_text("RECORD") or ""
    return record.startswith("onnxruntime/") or "\nonnxruntime/" in record


def _quotas(cgroup: Path) -> list[int]:
    """Read whole cores from cgroup v2's ``cpu.max``, also of the groups above, and from v1; empty without a limit."""
    own = "".join(_read(_OWN_CGROUP)).rpartition("0::")[2].strip("/")
    groups = [Path(own), *Path(own).parents]
    limits = [text.split() for group in groups for text in _read(cgroup / group / "cpu.max")]
    limits += [[*_read(cgroup / "cpu/cpu.cfs_quota_us"), *_read(cgroup / "cpu/cpu.cfs_period_us")]]
    return [int(limit[0]) // int(limit[1]) for limit in limits if len(limit) == 2 and limit[0] not in ("max", "-1")]


def _read(path: Path) -> list[str]:
    try:
        return [path.read_text().strip()]
    except OSError:
        return []


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
