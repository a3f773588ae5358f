"""A TensorRT runtime for tests: it runs the ONNX model of which a plan was made, on the memory that it was given.

It has the names of the real one (``test_native.py`` checks that against TensorRT-RTX) and refuses what the real one
refuses: plans of another kind, shapes outside of the active profile, tensors without an address, the default stream.
"""

import ctypes
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime

__version__ = "11.0.fake"
_MAGIC = b"FAKE-PLAN"
_DATA_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(double)": "DOUBLE",
}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}

Bounds = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def plan_of(model: bytes, *profiles: Bounds) -> bytes:
    """Make a plan; profiles give minimum, best and maximum shape of every input."""
    return _MAGIC + json.dumps(profiles).encode() + b"\n" + model


class TensorIOMode(Enum):
    INPUT, OUTPUT = 1, 2


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IOutputAllocator:
    """Base of output allocators."""


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> "ICudaEngine | None":
        if not plan.startswith(_MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        profiles, _, model = plan.removeprefix(_MAGIC).partition(b"\n")
        return ICudaEngine(self._logger, model, json.loads(profiles))


class ICudaEngine:
    def __init__(self, logger: ILogger, model: bytes, profiles: list[Bounds]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.logger, self.profiles = logger, profiles
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        class DataType:
            pass

        made = DataType()
        made.name = _DATA_TYPES[self.tensors[name].type]
        return made

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [list(bound) for bound in self.profiles[profile_index][name]]

    def create_execution_context(self) -> "IExecutionContext":
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return bool(stream_handle) or self._error("the default stream")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.profiles[self.active_optimization_profile][name]
        if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
            return self._error(f"Static dimension mismatch or out of profile: {name} {shape}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocators[name] = output_allocator
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[Any, int] = {}
        for given, shape in self._shapes.items():
            sizes |= dict(zip(self._engine.inputs[given].shape, shape, strict=True))
        declared = self._engine.tensors[name].shape
        return tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in declared)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not stream_handle:
            return self._error("the default stream")
        missing = [
            name for name in self._engine.tensors if not self._addresses.get(name) and name not in self._allocators
        ]
        if missing or self.infer_shapes():
            return self._error(f"Neither address nor allocator is set for {missing}")
        feeds = {name: self._read(name) for name in self._engine.inputs}
        try:
            results = self._engine.session.run(list(self._engine.outputs), feeds)
        except Exception as exc:  # noqa: BLE001  (whatever fails, the real one returns False)
            return self._error(str(exc))
        for name, array in zip(self._engine.outputs, results, strict=True):
            address = self._addresses.get(name, 0)
            if -1 in self.get_tensor_shape(name):
                allocator = self._allocators[name]
                address = allocator.reallocate_output_async(name, address, array.nbytes, 256, stream_handle)
                allocator.notify_shape(name, array.shape)
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True

    def _read(self, name: str) -> np.ndarray:
        dtype = _NUMPY[_DATA_TYPES[self._engine.inputs[name].type]]
        array = np.empty(self._shapes[name], dtype)
        ctypes.memmove(array.ctypes.data, self._addresses[name], array.nbytes)
        return array

    def _error(self, message: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, message)
        return False
