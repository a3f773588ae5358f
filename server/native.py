"""Native sessions: a TensorRT plan, opened and run by TensorRT itself, which TensorRT 11 and TensorRT-RTX need.

onnxruntime's provider is linked to TensorRT 10. A native session takes the place of a ``Session`` and keeps its
promises: it may be called from several threads, its answers own their memory, and what does not fit is an error.

::

    caller's array -> pinned host memory -> device -> execute_async_v3 -> device -> pinned host memory -> new array

Everything of one run is on one stream, and a session has two of them with a context and buffers each, so that the
copies of one batch overlap with the computation of the other. Unverified on GPU: no runtime opens a plan without one.

Source: TensorRT's Python API, the part that is the same in 10.12 and later, 11 and TensorRT-RTX.
"""

import contextlib
import ctypes
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from queue import LifoQueue
from typing import Any

import numpy as np

from server.bound import RUNNERS
from server.cudart import Cudart
from server.errors import ArtifactError, InferenceFailed, ProviderUnavailable, UnsupportedModel
from server.faults import fault_of
from server.libraries import Obstacle
from server.providers import Device
from server.tensors import NUMPY_DTYPE, Array, Signature, Tensors, TensorSpec

logger = logging.getLogger(__name__)

RUNTIMES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Modules, the first that imports is taken; the last one is TensorRT-RTX without its meta package."""

SUFFIX = ".plan"

_DATATYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "INT64": "INT64",
    "INT32": "INT32",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}
_LOGGERS: dict[str, Any] = {}  # TensorRT keeps the first logger of a process and warns about any other

Shape = tuple[int, ...]


def obstacle_of(device: Device) -> Obstacle | None:
    """Say why no plan can be opened on a device, if so."""
    try:
        runtime = _import_runtime()
        Cudart(device.index).use()
        _runtime_of(runtime)
    except (ProviderUnavailable, OSError) as exc:
        return Obstacle("missing_library", str(exc))
    except InferenceFailed as exc:
        return Obstacle("failed", str(exc))
    return None


class NativeSession:
    """One plan, opened on one GPU; takes the place of a ``Session``.

    Args:
        path: The plan.
        device: Where; ``tensorrt:N``.

    Attributes:
        signature: From the engine; variable axes have no names.
        device: As given.
        providers: ``TensorRT``, or ``TensorRT-RTX``.

    Raises:
        ArtifactError: If the file cannot be read, or the plan does not fit the runtime or the GPU.
        UnsupportedModel: If a tensor has a type that cannot be served.
        ProviderUnavailable: If the runtime or CUDA is not there.
    """

    signature: Signature
    device: Device
    providers: tuple[str, ...]

    def __init__(self, path: Path, device: Device) -> None:
        trt = _import_runtime()
        self.device = device
        self.providers = ("TensorRT-RTX" if "rtx" in trt.__name__ else "TensorRT",)
        self._path, self._runners = path, LifoQueue[_Runner]()
        try:
            self._cuda = Cudart(device.index)
        except OSError as exc:
            raise ProviderUnavailable(f"the CUDA runtime is not there: {exc}") from exc
        try:
            self._cuda.use()
            self._runtime = _runtime_of(trt)  # must outlive the engine
            engine = self._open(trt)
            self.signature = _signature_of(trt, engine)
            made = [_Runner(trt, engine, self._cuda, self.signature) for _ in range(RUNNERS)]
        except InferenceFailed as exc:
            raise ProviderUnavailable(f"{path} cannot be opened on {device.name}: {exc}") from exc
        for runner in made:
            self._runners.put(runner)
        self._open_runners: list[_Runner] = made
        logger.info("opened %s on %s with %s %s", path, device.name, self.providers[0], trt.__version__)

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run the engine; thread-safe, see ``Session.run``.

        Raises:
            InferenceFailed: If the shapes lie outside of every profile, if the run fails, or if the session is closed;
                ``OutOfMemory`` or ``DeviceLost`` where the cause is known.
        """
        if not self._open_runners:
            raise InferenceFailed(f"{self._path} is closed")
        names = list(outputs) or [spec.name for spec in self.signature.outputs]
        runner = self._runners.get()
        try:
            answers = runner.run(inputs)
        except InferenceFailed as exc:
            raise type(exc)(f"{self._path} on {self.device.name}: {exc}") from exc
        finally:
            self._runners.put(runner)
        return {name: answers[name] for name in names}

    def placement(self) -> dict[str, dict[str, int]]:
        """Return an empty placement: an engine runs as a whole, and its layers are not the file's nodes."""
        return {}

    def close(self) -> None:
        """Release contexts, streams and buffers once the runs in progress have ended; later runs fail."""
        closing, self._open_runners = self._open_runners, []
        for _ in closing:
            self._runners.get().close()
        for runner in closing:  # whoever waits for one finds it closed
            self._runners.put(runner)

    def _open(self, trt: Any) -> Any:
        try:
            content = self._path.read_bytes()
        except OSError as exc:
            raise ArtifactError(f"cannot read {self._path}: {exc.strerror or exc}") from exc
        log = _logger_of(trt)
        log.last_error = ""
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = log.last_error or "it gives no reason"
            raise ArtifactError(
                f"{self.providers[0]} {trt.__version__} does not open {self._path} on {self.device.name}: {reason}. A "
                "plan fits the version and the kind of GPU that it was built for: build it again, slipstream "
                "build-engine"
            )
        return engine


class _Runner:
    """A context with its stream and buffers, for one run at a time."""

    def __init__(self, trt: Any, engine: Any, cuda: Cudart, signature: Signature) -> None:
        self._trt, self._engine, self._cuda, self._signature = trt, engine, cuda, signature
        self._context = engine.create_execution_context()
        if self._context is None:
            raise fault_of(RuntimeError(text := _logger_of(trt).last_error or "out of memory"))(
                f"no execution context: {text}"
            )
        self._stream = cuda.stream()
        self._buffers = {spec.name: _Buffer(cuda) for spec in (*signature.inputs, *signature.outputs)}
        self._allocators: dict[str, Any] = {}
        self._is_closed = False

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Copy in, execute, copy out."""
        if self._is_closed:
            raise InferenceFailed("the session is closed")
        self._cuda.use()
        self._choose_profile(inputs)
        for spec in self._signature.inputs:
            array = np.ascontiguousarray(inputs[spec.name])
            buffer = self._buffers[spec.name]
            buffer.fill(array, self._stream)
            if not self._context.set_input_shape(spec.name, array.shape):
                raise self._failure(f"input '{spec.name}' cannot have shape {list(array.shape)}")
            self._context.set_tensor_address(spec.name, buffer.device)
        if missing := self._context.infer_shapes():
            raise self._failure(f"the shapes do not follow from the inputs: {', '.join(missing)}")
        shapes = {spec.name: tuple(self._context.get_tensor_shape(spec.name)) for spec in self._signature.outputs}
        for spec in self._signature.outputs:
            self._place(spec, shapes[spec.name])
        if not self._context.execute_async_v3(self._stream):
            raise self._failure("the engine failed")
        return self._answers(shapes)

    def close(self) -> None:
        """Release everything; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(InferenceFailed):  # of a lost device nothing can be released
                self._cuda.use()
                for buffer in self._buffers.values():
                    buffer.close()
                self._cuda.destroy_stream(self._stream)
            self._context = None

    def _choose_profile(self, inputs: Tensors) -> None:
        shapes = {spec.name: inputs[spec.name].shape for spec in self._signature.inputs}
        count = self._engine.num_optimization_profiles
        chosen = next((index for index in range(count) if self._covers(index, shapes)), None)
        if chosen is None:
            ranges = "; ".join(self._range_of(index) for index in range(count))
            seen = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InferenceFailed(f"the engine was not built for {seen}; it takes {ranges}")
        if chosen != self._context.active_optimization_profile:
            if not self._context.set_optimization_profile_async(chosen, self._stream):
                raise self._failure(f"profile {chosen} cannot be chosen")
            self._cuda.wait(self._stream)

    def _covers(self, index: int, shapes: dict[str, Shape]) -> bool:
        for name, shape in shapes.items():
            low, _, high = (tuple(bound) for bound in self._engine.get_tensor_profile_shape(name, index))
            sizes = zip(low, shape, high, strict=False)
            if len(shape) != len(low) or not all(least <= size <= most for least, size, most in sizes):
                return False
        return True

    def _range_of(self, index: int) -> str:
        bounds = {
            spec.name: [list(bound) for bound in self._engine.get_tensor_profile_shape(spec.name, index)]
            for spec in self._signature.inputs
        }
        return ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in bounds.items())

    def _place(self, spec: TensorSpec, shape: Shape) -> None:
        """Give an output its memory; one whose size the data decide gets it while the engine runs."""
        if all(size >= 0 for size in shape):
            self._buffers[spec.name].reserve(_bytes_of(spec, shape))
            self._context.set_tensor_address(spec.name, self._buffers[spec.name].device)
            return
        if spec.name not in self._allocators:
            self._allocators[spec.name] = _allocator_of(self._trt, self._buffers[spec.name])
        self._context.set_output_allocator(spec.name, self._allocators[spec.name])

    def _answers(self, shapes: dict[str, Shape]) -> dict[str, Array]:
        waits = any(size < 0 for shape in shapes.values() for size in shape)
        if waits:
            self._cuda.wait(self._stream)  # only then are these sizes known
        known = {
            name: shape if all(size >= 0 for size in shape) else self._allocators[name].shape
            for name, shape in shapes.items()
        }
        for spec in self._signature.outputs:
            self._buffers[spec.name].fetch(_bytes_of(spec, known[spec.name]), self._stream)
        self._cuda.wait(self._stream)
        return {
            spec.name: self._buffers[spec.name].array(NUMPY_DTYPE[spec.datatype], known[spec.name])
            for spec in self._signature.outputs
        }

    def _failure(self, text: str) -> InferenceFailed:
        reason = _logger_of(self._trt).last_error
        return fault_of(RuntimeError(reason))(f"{text}: {reason}" if reason else text)


class _Buffer:
    """Memory of one tensor on the device and, pinned, on the host; it grows and is kept."""

    def __init__(self, cuda: Cudart) -> None:
        self._cuda = cuda
        self.device = self._host = 0
        self._device_bytes = self._host_bytes = 0

    def reserve(self, n_bytes: int) -> None:
        """Have at least so many bytes on the device; what was there is lost when it grows."""
        n_bytes = max(n_bytes, 1)  # an address is needed for a tensor without elements, too
        if n_bytes > self._device_bytes:
            self._release_device()
            self.device = self._cuda.allocate(n_bytes)
            self._device_bytes = n_bytes

    def fill(self, array: Array, stream: int) -> None:
        """Begin to copy an array to the device."""
        self.reserve(array.nbytes)
        self._reserve_host(array.nbytes)
        ctypes.memmove(self._host, array.ctypes.data, array.nbytes)
        self._cuda.copy_in(self.device, self._host, array.nbytes, stream)

    def fetch(self, n_bytes: int, stream: int) -> None:
        """Begin to copy from the device to the host."""
        self._reserve_host(n_bytes)
        self._cuda.copy_out(self._host, self.device, n_bytes, stream)

    def array(self, dtype: "np.dtype[Any]", shape: Shape) -> Array:
        """Return what was fetched, in memory of its own."""
        made = np.empty(shape, dtype)
        ctypes.memmove(made.ctypes.data, self._host, made.nbytes)
        return made

    def close(self) -> None:
        """Release both."""
        self._release_device()
        self._release_host()

    def _reserve_host(self, n_bytes: int) -> None:
        n_bytes = max(n_bytes, 1)
        if n_bytes > self._host_bytes:
            self._release_host()
            self._host = self._cuda.allocate_host(n_bytes)
            self._host_bytes = n_bytes

    def _release_device(self) -> None:
        if self.device:
            address, self.device, self._device_bytes = self.device, 0, 0
            self._cuda.free(address)

    def _release_host(self) -> None:
        if self._host:
            address, self._host, self._host_bytes = self._host, 0, 0
            self._cuda.free_host(address)


def _allocator_of(trt: Any, buffer: _Buffer) -> Any:
    """Make an output allocator for a buffer; its base class exists only once the runtime is imported."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shape: Shape = ()

        def reallocate_output(self, _name: str, _memory: int, size: int, _alignment: int) -> int:
            buffer.reserve(size)
            return buffer.device

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, _stream: int) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, _name: str, shape: Sequence[int]) -> None:
            self.shape = tuple(shape)

    return Allocator()


def _import_runtime() -> Any:
    failures = []
    for name in RUNTIMES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as exc:  # OSError: the bindings are there, a library that they load is not
            failures.append(f"{name}: {exc}")
            continue
        if hasattr(module, "Runtime"):
            return module
        failures.append(f"{name}: it has no Runtime")
    raise ProviderUnavailable(
        f"no TensorRT runtime: {'; '.join(failures)}. Install one: pip install 'slipstream-server[gpu]' or [rtx]"
    )


def _runtime_of(trt: Any) -> Any:
    log = _logger_of(trt)
    log.last_error = ""
    runtime = trt.Runtime(log)
    if runtime is None:
        raise ProviderUnavailable(f"{trt.__name__} has no runtime here: {log.last_error}")
    return runtime


def _logger_of(trt: Any) -> Any:
    """Return the process's one logger, which hands TensorRT's messages to Python's logging."""
    if trt.__name__ not in _LOGGERS:
        errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        class Bridge(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.last_error = ""

            def log(self, severity: Any, message: str) -> None:
                if severity in errors:
                    self.last_error = message  # it becomes the text of the exception
                logger.debug("%s: %s", trt.__name__, message)

        _LOGGERS[trt.__name__] = Bridge()
    return _LOGGERS[trt.__name__]


def _signature_of(trt: Any, engine: Any) -> Signature:
    specs: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in _DATATYPES:
            raise UnsupportedModel(f"tensor '{name}' has type {dtype}; served are {', '.join(_DATATYPES.values())}")
        shape = tuple(size if size >= 0 else None for size in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        specs[is_input].append(TensorSpec(name, _DATATYPES[dtype], shape))
    return Signature(tuple(specs[True]), tuple(specs[False]))


def _bytes_of(spec: TensorSpec, shape: Shape) -> int:
    return NUMPY_DTYPE[spec.datatype].itemsize * int(np.prod(shape, dtype=np.int64))
