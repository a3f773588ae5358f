"""What a process of the server holds, counted inside of it: it starts with ``install``, and SIGUSR1 has it count.

The server itself knows nothing of this. ``hook`` writes a ``sitecustomize`` module, which Python imports when it starts
if the module's folder is on ``PYTHONPATH``; the processes that the server starts inherit that path.
"""

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

_ROOT = Path(__file__).parents[2]
_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Counts(msgspec.Struct, frozen=True):
    """What a process holds after a garbage collection.

    Attributes:
        objects: Name of a type with its module -> its instances that the garbage collector knows.
        open_futures: Futures and tasks that are not done.
        busy_lanes: Lanes that run a batch.
        slab_bytes: Bytes of shared memory that are handed out.
        blocks: Blocks of memory that Python's allocator has handed out: nearly everything that an object can leak.
        malloc_bytes: What the C library's allocator has handed out: arrays, buffers, sessions; 0 where it cannot say.
        free_bytes: What it keeps in free blocks, as part of the process.
    """

    objects: dict[str, int]
    open_futures: int
    busy_lanes: int
    slab_bytes: int
    blocks: int
    malloc_bytes: int
    free_bytes: int


class _Mallinfo(ctypes.Structure):
    """The C library's ``struct mallinfo2``."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def count() -> Counts:
    """Count in this process."""
    gc.unfreeze()  # what is kept out of collections is not among the known objects either
    gc.collect()
    blocks = sys.getallocatedblocks()
    malloc = _mallinfo()
    known = gc.get_objects()
    names = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, known))
    return Counts(
        objects=dict(names),
        open_futures=sum(not each.done() for each in known if isinstance(each, asyncio.Future)),
        busy_lanes=sum(each.run is not None for each in known if _is(each, "server.worker", "Worker")),
        slab_bytes=sum(each.used_bytes for each in known if _is(each, "server.slab", "Allocator")),
        blocks=blocks,
        malloc_bytes=malloc.uordblks + malloc.hblkhd,
        free_bytes=malloc.fordblks,
    )


def install(folder: str) -> None:
    """Write what this process holds to ``<folder>/<pid>.json`` whenever it gets SIGUSR1."""
    signal.signal(signal.SIGUSR1, partial(_write, Path(folder)))


def hook(folder: Path) -> str:
    """Return the ``PYTHONPATH`` with which processes count into ``folder``."""
    path = folder / "sitecustomize.py"
    path.write_text(f"from benchmarks.soak.counting import install\n\ninstall({str(folder)!r})\n")
    return os.pathsep.join((str(folder), str(_ROOT)))


def _write(folder: Path, _signal: int, _frame: FrameType | None) -> None:
    path = folder / f"{os.getpid()}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(msgspec.json.encode(count()))
    unfinished.replace(path)


def _mallinfo() -> _Mallinfo:
    """Ask the C library; glibc 2.33 and later can say."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return _Mallinfo()
    ask.restype = _Mallinfo
    found: _Mallinfo = ask()
    return found


def _is(value: object, module: str, name: str) -> bool:
    """Whether a value is of a type of the server; without importing it into processes that do not use it."""
    kind = type(value)
    return kind.__module__ == module and kind.__name__ == name
