"""Magika, a detector of file types: the model as its package ships it, and real files of this machine as data."""

import os
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.quickstart.graph import Array
from deploy.quickstart.packages import Package, QuickstartError, unpack

MODEL = Package(
    name="magika",
    version="1.0.3",
    sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    megabytes=16,
    platform="manylinux_2_28_x86_64",
)
_MEMBER = "magika/models/standard_v3_3/model.onnx"

SAMPLES = 896
EXTENSIONS = 64
"""The most frequent ones are taken: the rest are mostly parts of names."""
# The model's own settings: it sees the ends of a file, each within one block, without the white space around them.
_BLOCK_BYTES = 4096
_END_BYTES = 1024
_PADDING = 256
_LEAST_BYTES = 8
_LARGEST_FOLDER = 400
_WHITESPACE = b" \t\n\r\x0b\x0c"


def prepare(folder: Path, scratch: Path) -> None:
    """Make ``model.onnx`` and ``data.npz`` in an existing folder.

    Args:
        folder: Where the files go.
        scratch: Where the package is unpacked.

    Raises:
        QuickstartError: If the package cannot be downloaded, or if this machine has too few files.
    """
    (model,) = unpack(MODEL, [_MEMBER], scratch).values()
    paths = choose(walk(roots()), SAMPLES)
    if len(paths) < SAMPLES // 2:
        raise QuickstartError(f"found {len(paths)} files to try magika on, wanted {SAMPLES}, in {roots()}")
    np.savez(folder / "data.npz", bytes=np.stack([featurize(*read_ends(path)) for path in paths]))
    model.replace(folder / "model.onnx")


def roots() -> list[Path]:
    """Folders of this machine with files of many types: Python, its packages, what the system shares."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    return [*folders, Path("/usr/share")]


def walk(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield regular files in a fixed order, neither following links nor taking compiled Python, which changes."""
    for root in folders:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
            for name in sorted(names)[:_LARGEST_FOLDER]:
                path = Path(folder, name)
                if not path.is_symlink() and path.is_file() and os.access(path, os.R_OK):
                    yield path


def choose(paths: Iterable[Path], count: int, extensions: int = EXTENSIONS) -> list[Path]:
    """Choose files of many types: of the most frequent extensions one file each in turn, until there are enough.

    Args:
        paths: Files in a fixed order; those of an extension are taken evenly spread over that order.
        count: Files wanted; fewer come back when there are fewer.
        extensions: How many extensions.
    """
    by_extension: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if path.suffix and path.stat().st_size >= _LEAST_BYTES:
            by_extension[path.suffix.lower()].append(path)
    frequent = sorted(by_extension, key=lambda name: (-len(by_extension[name]), name))[:extensions]
    shares = _shares({name: len(by_extension[name]) for name in frequent}, count)
    return [path for name in sorted(shares) for path in _spread(by_extension[name], shares[name])]


def read_ends(path: Path) -> tuple[bytes, bytes]:
    """Read the first and the last block of a file; they overlap in a short one."""
    with path.open("rb") as file:
        first = file.read(_BLOCK_BYTES)
        file.seek(max(file.seek(0, os.SEEK_END) - _BLOCK_BYTES, 0))
        return first, file.read(_BLOCK_BYTES)


def featurize(first: bytes, last: bytes) -> Array:
    """Return the model's input for one file: INT32 [2048], its first and its last 1024 bytes without white space.

    A byte is its value; 256 pads behind a short beginning and before a short end.
    """
    beginning = first.lstrip(_WHITESPACE)[:_END_BYTES]
    end = last.rstrip(_WHITESPACE)[-_END_BYTES:]
    features = np.full(2 * _END_BYTES, _PADDING, np.int32)
    features[: len(beginning)] = np.frombuffer(beginning, np.uint8)
    features[2 * _END_BYTES - len(end) :] = np.frombuffer(end, np.uint8)
    return features


def _shares(available: dict[str, int], count: int) -> dict[str, int]:
    """Divide ``count`` among extensions as evenly as their numbers of files allow."""
    shares = dict.fromkeys(available, 0)
    while sum(shares.values()) < count:
        open_extensions = [name for name in sorted(shares) if shares[name] < available[name]]
        if not open_extensions:
            break
        for name in open_extensions[: count - sum(shares.values())]:
            shares[name] += 1
    return shares


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    return [paths[i * len(paths) // count] for i in range(count)]
