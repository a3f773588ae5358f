"""Weights out of a file that torch before 1.6 wrote, read without torch and without running what is in it."""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deploy.quickstart.graph import Array
from deploy.quickstart.packages import QuickstartError

_STORAGES = {"FloatStorage": np.float32, "LongStorage": np.int64}

_Placed = tuple[str, int, Sequence[int], Sequence[int]]
"""Storage, offset, shape and strides of a tensor, the last three in elements."""


def read_weights(path: Path) -> dict[str, Array]:
    """Read a state dictionary.

    The file is three pickles that say how it was written, one with the names and places of the tensors, one with the
    order of the storages, and then each storage as its length (INT64) and its elements.

    Raises:
        QuickstartError: If the file is no such file, or refers to anything but tensors.
    """
    with path.open("rb") as file:
        try:
            for _ in range(3):
                _Reader(file).load()
            names = _Reader(file)
            placed: dict[str, _Placed] = names.load()
            storages = {key: _storage(file, names.kinds[key]) for key in _Reader(file).load()}
            return {name: _tensor(storages[place[0]], place) for name, place in placed.items()}
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, struct.error) as exc:
            raise QuickstartError(f"{path.name} is not a state dictionary of torch before 1.6: {exc}") from exc


class _Reader(pickle.Unpickler):
    """A pickle reader that knows tensors and dictionaries, and refuses everything else."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        _, kind, key, *_ = pid
        self.kinds[key] = kind
        return str(key)


def _storage(file: BinaryIO, kind: str) -> Array:
    (length,) = struct.unpack("<q", file.read(8))
    dtype = np.dtype(_STORAGES[kind])
    return np.frombuffer(file.read(length * dtype.itemsize), dtype)


def _tensor(storage: Array, place: _Placed) -> Array:
    _, offset, shape, strides = place
    steps = [stride * storage.itemsize for stride in strides]
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset < 0 or min(strides, default=0) < 0 or end > len(storage):
        raise ValueError("a tensor lies outside of its storage")
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(storage[offset:], shape, steps))
