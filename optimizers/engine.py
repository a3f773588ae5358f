"""TensorRT engines: an ONNX model and its shape profiles become a plan.

Two builders have the same interface. TensorRT builds for the GPU that is present. TensorRT-RTX builds without a GPU for
every compute capability it is asked for, and its plan runs on those only (Hopper, 9.0, is none of them). The network is
strongly typed in both: precision is what the ONNX file says, INT8 as symmetric pairs of QuantizeLinear and
DequantizeLinear (see ``passes.int8_static.tensorrt_int8_options``), BF16 and FP8 likewise: there is no option for them.
"""

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

from optimizers.errors import EngineBuildError
from optimizers.gpu import read_gpu
from optimizers.graph import load_graph
from optimizers.timings import load_timings, save_timings, timing_file, write_whole
from optimizers.unsigned import unsigned_nodes
from server.artifact import Profile

Flavour = Literal["tensorrt", "tensorrt-rtx"]

HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]

Observe = Callable[[str, float], bool]
"""Called with the builder's current phase and the share of it that is done, 0 to 1; ``False`` cancels the build.

It is called from the builder's threads.
"""

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""Ampere, Ada and Blackwell: what one TensorRT-RTX plan is built for by default."""

_MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    # The bindings' own name: ``tensorrt_rtx`` comes with a meta package that adds nothing else.
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_EXTRA: dict[Flavour, str] = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_MOST_LEVEL = 5
_LOGGERS: dict[str, Any] = {}  # TensorRT keeps the first logger of a process and warns about any other

logger = logging.getLogger(__name__)


class EngineOptions(msgspec.Struct, frozen=True):
    """How to build. An option that the builder would ignore is an error, not a surprise.

    Attributes:
        flavour: ``auto`` takes TensorRT when it can be imported, else TensorRT-RTX.
        workspace_bytes: Limit of the memory that tactics may use while running.
        capabilities: Compute capabilities to build for; TensorRT-RTX only.
        level: Effort of the search for tactics, 0 (fast build) to 5 (fast engine); ``None`` is the builder's default,
            3. TensorRT only.
        hardware_compatibility: Which other GPUs the plan runs on; TensorRT only.
        version_compatible: Whether later versions of the runtime read the plan; TensorRT only.
        tf32: Whether FP32 products may round their inputs to 10 bits of mantissa, which the builder itself allows
            unless told otherwise; off, so that an engine called FP32 is one.
        sparse_weights: Whether weights with a 2:4 pattern may use sparse tensor cores.
        timings: Folder of timing caches; ``None`` keeps none. TensorRT-RTX times nothing and needs none. Changes the
            time of a build, not what is built, and is no part of a cache key.
    """

    flavour: Flavour | Literal["auto"] = "auto"
    workspace_bytes: int = 1 << 30
    capabilities: tuple[str, ...] = RTX_CAPABILITIES
    level: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    tf32: bool = False
    sparse_weights: bool = False
    timings: Path | None = None


class EngineBuild(msgspec.Struct, frozen=True):
    """What was built.

    Attributes:
        flavour: The builder.
        version: Its version.
        capabilities: Compute capabilities that the plan runs on; empty for the GPU that was present.
        plan_bytes: Size of the plan.
        seconds: Time of the build.
        cached: Whether the plan came from a cache, whose builder then took these seconds.
    """

    flavour: Flavour
    version: str
    capabilities: tuple[str, ...]
    plan_bytes: int
    seconds: float
    cached: bool = False


def build_engine(
    model: Path,
    profiles: Profile | Sequence[Profile],
    plan: Path,
    options: EngineOptions | None = None,
    observe: Observe = lambda _phase, _share: True,
) -> EngineBuild:
    """Build a plan and write it in one step, so that no reader sees a part of it. Blocks for seconds to minutes.

    Args:
        model: An ONNX file; external weights lie beside it.
        profiles: One profile, or several for one engine, which then has tactics for each. A profile has shapes for
            every input with a variable axis, minimum <= optimum <= maximum.
        plan: Where to write; its folder is created.
        options: How to build.
        observe: Told about progress; may cancel, and then nothing is written.

    Raises:
        EngineBuildError: If no builder can be imported or it does not know an option, if the file is missing or the
            parser refuses it (with all of the parser's errors), if a profile does not fit, if the build fails or is
            cancelled, if the plan cannot be written.
    """
    options = options or EngineOptions()
    if not model.is_file():
        raise EngineBuildError(f"{model} is missing")
    flavour, trt = import_builder(options.flavour)
    start = time.monotonic()
    builder = trt.Builder(_logger(flavour, trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    _configure(trt, config, flavour, options)
    capabilities = _target(trt, config, flavour, options.capabilities)
    _parse(trt, network, model, flavour)
    for profile in [profiles] if isinstance(profiles, Profile) else profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    timings = _timings(flavour, trt, options)
    if timings is not None:
        load_timings(config, timings)
    monitor = config.progress_monitor = _monitor(trt, observe)
    log = _logger(flavour, trt)
    log.last_error = ""
    blob = builder.build_serialized_network(network, config)
    if monitor.cancelled or not observe("write", 1.0):
        raise EngineBuildError(f"no engine for {model}: cancelled")
    if blob is None:
        reason = log.last_error or "the builder gave no plan and no reason"
        raise EngineBuildError(f"no engine for {model}: {reason}")
    content = bytes(blob)
    if timings is not None:
        save_timings(config, timings)
    write_plan(plan, content)
    seconds = time.monotonic() - start
    logger.info("built %s with %s %s in %.1f s, %d bytes", plan, flavour, trt.__version__, seconds, len(content))
    return EngineBuild(flavour, trt.__version__, capabilities, len(content), seconds)


def write_plan(plan: Path, content: bytes) -> None:
    """Write a plan in one step; its folder is created.

    Raises:
        EngineBuildError: If it cannot be written; an older plan is then as it was.
    """
    try:
        write_whole(plan, content)
    except OSError as exc:
        raise EngineBuildError(f"cannot write {plan}: {exc.strerror or exc}") from exc


def import_builder(flavour: Flavour | Literal["auto"]) -> tuple[Flavour, Any]:
    """Import a builder; their libraries have hundreds of megabytes, so this happens on the first build.

    Returns:
        Its flavour and its Python module.

    Raises:
        EngineBuildError: If none of the wanted ones can be imported; says what to install.
    """
    wanted: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx") if flavour == "auto" else (flavour,)
    failures = []
    for candidate in wanted:
        for name in _MODULES[candidate]:
            try:
                return candidate, _complete(importlib.import_module(name))
            except (ImportError, OSError) as exc:  # OSError: the bindings are there, a library that they load is not
                failures.append(f"{name}: {exc}")
    extras = " or ".join(f"'slipstream-server[{_EXTRA[candidate]}]'" for candidate in wanted)
    raise EngineBuildError(f"no TensorRT builder: {'; '.join(failures)}. Install one: pip install {extras}")


def _configure(trt: Any, config: Any, flavour: Flavour, options: EngineOptions) -> None:
    if options.level is not None and not 0 <= options.level <= _MOST_LEVEL:
        raise EngineBuildError(f"builder level {options.level}; it is 0 to {_MOST_LEVEL}")
    if flavour == "tensorrt-rtx":
        _refuse_unknown_to_rtx(options)
    elif options.capabilities != RTX_CAPABILITIES:
        raise EngineBuildError(
            f"tensorrt builds for the GPU that is present, not for compute capabilities {list(options.capabilities)}; "
            "leave them out or build with tensorrt-rtx"
        )
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    for flag, wanted in (
        ("TF32", options.tf32),
        ("SPARSE_WEIGHTS", options.sparse_weights),
        ("VERSION_COMPATIBLE", options.version_compatible),
    ):
        (config.set_flag if wanted else config.clear_flag)(getattr(trt.BuilderFlag, flag))
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.hardware_compatibility != "none":
        name = options.hardware_compatibility.upper().replace("-", "_")
        value = getattr(trt.HardwareCompatibilityLevel, name, None)  # SAME_COMPUTE_CAPABILITY came with 10.11
        if value is None:
            raise EngineBuildError(f"{flavour} {trt.__version__} has no hardware compatibility {name}; update it")
        config.hardware_compatibility_level = value


def _refuse_unknown_to_rtx(options: EngineOptions) -> None:
    """Refuse what TensorRT-RTX takes and ignores: it optimizes when the plan is opened, for the GPU it finds there."""
    ignored = {
        "a builder level": options.level is not None,
        "hardware compatibility": options.hardware_compatibility != "none",
        "version compatibility": options.version_compatible,
    }
    if names := [name for name, given in ignored.items() if given]:
        raise EngineBuildError(
            f"tensorrt-rtx does not know {', '.join(names)}; leave it out and choose GPUs by compute capability, or "
            "build with tensorrt"
        )


def _timings(flavour: Flavour, trt: Any, options: EngineOptions) -> Path | None:
    if options.timings is None or flavour == "tensorrt-rtx":
        return None
    return timing_file(options.timings, f"{flavour} {trt.__version__}", read_gpu())


def _complete(module: ModuleType) -> ModuleType:
    if not hasattr(module, "Builder"):  # a stub of the same name, e.g. an empty namespace package
        raise ImportError(f"{module.__name__} has no Builder")
    return module


def _logger(flavour: Flavour, trt: Any) -> Any:
    """Return the process's one logger, which hands TensorRT's messages to Python's logging."""
    if flavour not in _LOGGERS:
        severity_of = trt.ILogger.Severity

        class _Bridge(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.last_error = ""

            def log(self, severity: Any, message: str) -> None:
                if severity in (severity_of.ERROR, severity_of.INTERNAL_ERROR):
                    self.last_error = message  # it becomes the text of the exception
                level = logging.WARNING if severity == severity_of.WARNING else logging.DEBUG
                logger.log(level, "%s: %s", flavour, message)

        _LOGGERS[flavour] = _Bridge()
    return _LOGGERS[flavour]


def _parse(trt: Any, network: Any, model: Path, flavour: Flavour) -> None:
    parser = trt.OnnxParser(network, _logger(flavour, trt))
    # The parser takes some files that are no models for empty ones.
    if not (parser.parse_from_file(str(model)) and network.num_outputs):
        reasons = dict.fromkeys(_reason(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineBuildError(f"{flavour} cannot read {model}: {'; '.join(reasons) or 'not an ONNX model'}")
    if unsigned := unsigned_nodes(load_graph(model)):
        raise EngineBuildError(
            f"{flavour} would take UINT8 for INT8 in {len(unsigned)} nodes of {model} ({', '.join(unsigned[:3])}), "
            "which changes the results; quantize activations and weights to INT8, symmetrically"
        )


def _reason(error: Any) -> str:
    where = f"{error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    lines = error.desc().strip().splitlines()
    # Without a driver every error drags along that there is none, which a build for other machines does not need.
    return where + " ".join(line for line in lines if "catchCudaError" not in line)


def _profile(builder: Any, network: Any, profile: Profile) -> Any:
    """Make the optimization profile, after checking it against the network's inputs."""
    made = builder.create_optimization_profile()
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    unknown = sorted(set(profile.optimum) - set(inputs))
    if unknown:
        raise EngineBuildError(f"the profile names {unknown}; the model takes {sorted(inputs)}")
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape)
        if name in profile.optimum:
            bounds = [shapes.get(name, ()) for shapes in (profile.minimum, profile.optimum, profile.maximum)]
            _check_bounds(name, shape, bounds)
            made.set_shape(name, *bounds)
        elif -1 in shape:
            raise EngineBuildError(f"the profile has no shapes for '{name}' {list(shape)} (-1 = any size)")
    return made


def _check_bounds(name: str, shape: tuple[int, ...], bounds: list[tuple[int, ...]]) -> None:
    if any(len(bound) != len(shape) for bound in bounds):
        raise EngineBuildError(f"the profile of '{name}' has shapes {bounds}; the model takes {list(shape)}")
    for size, low, best, high in zip(shape, *bounds, strict=True):
        if not 0 < low <= best <= high or (size >= 0 and {low, best, high} != {size}):
            raise EngineBuildError(
                f"the profile of '{name}' is {bounds} for {list(shape)} (-1 = any size); every size must be "
                "minimum <= optimum <= maximum, and fixed sizes must stay as they are"
            )


def _target(trt: Any, config: Any, flavour: Flavour, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the compute capabilities; TensorRT itself always builds for the GPU that is present."""
    if flavour == "tensorrt":
        return ()
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        value = known.get(f"SM{capability.replace('.', '')}")
        if value is None or not config.set_compute_capability(value, index):
            allowed = sorted(f"{name[2:-1]}.{name[-1]}" for name in known)
            raise EngineBuildError(f"{flavour} cannot build for compute capability {capability}; it can for {allowed}")
    return wanted


def _monitor(trt: Any, observe: Observe) -> Any:
    """Make a progress monitor; its base class exists only once the builder is imported."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            share = (step + 1) / max(self.steps.get(phase_name, 1), 1)
            if not self.cancelled and not observe(phase_name, min(share, 1.0)):
                self.cancelled = True
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return _Monitor()
