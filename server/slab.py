"""Memory that two processes share: one of them allocates blocks in it, the other reads them and says when it is done.

The memory has no name (``memfd_create``): its descriptor travels over a socket, and it is gone with the last process
that maps it, however that process ends. Pages are taken from the system when they are first written.
"""

import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

MIN_BLOCK_BYTES = 1024
_MIN_ORDER = MIN_BLOCK_BYTES.bit_length() - 1


class Allocator:
    """Hands out blocks of a range of bytes and takes them back in any order. Pure: it touches no memory.

    Blocks have powers of two as sizes and are aligned to their size. A released block goes to the list of its size,
    where the next request of that size finds it; neighbours are merged only when nothing fits, so that a steady load
    neither splits nor merges.

    Source: Knowlton, "A fast storage allocator", 1965 (buddies); merging is deferred.

    Args:
        size_bytes: Bytes to hand out; what is left over behind the last multiple of ``MIN_BLOCK_BYTES`` is not used.

    Attributes:
        high_bytes: End of the highest block that was handed out since the last ``reset``.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._order_of: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """Begin again with low offsets, as at first; only while no block is handed out."""
        size_bytes = self._size_bytes
        self.high_bytes, self._can_merge = 0, False
        orders = size_bytes.bit_length()
        self._free: list[list[int]] = [[] for _ in range(orders)]
        offset = 0
        for order in reversed(range(_MIN_ORDER, orders)):
            if size_bytes >> order & 1:
                self._free[order].append(offset)
                offset += 1 << order

    @property
    def is_empty(self) -> bool:
        """Whether no block is handed out."""
        return not self._order_of

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are handed out, rounded up as they are."""
        return sum(1 << order for order in self._order_of.values())

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a block of at least ``size_bytes``; ``None`` if there is none."""
        order = max((size_bytes - 1).bit_length(), _MIN_ORDER)
        free = self._free
        if order >= len(free):
            return None
        offset = free[order].pop() if free[order] else self._split(order)
        if offset is None and self._can_merge:
            self._merge()
            offset = self._split(order)
        if offset is not None:
            self._order_of[offset] = order
            self.high_bytes = max(self.high_bytes, offset + (1 << order))
        return offset

    def release(self, offset: int) -> None:
        """Take back the block that begins at ``offset``.

        Raises:
            ValueError: If no block that is handed out begins there.
        """
        order = self._order_of.pop(offset, None)
        if order is None:
            raise ValueError(f"no block begins at {offset}")
        self._free[order].append(offset)
        self._can_merge = True

    def _split(self, order: int) -> int | None:
        """Take the smallest free block that is large enough, and give back what it has too much."""
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                offset = self._free[larger].pop()
                for half in reversed(range(order, larger)):
                    self._free[half].append(offset + (1 << half))
                return offset
        return None

    def _merge(self) -> None:
        """Join free neighbours that were one block before, the small ones first."""
        for order in range(_MIN_ORDER, len(self._free) - 1):
            free, size = set(self._free[order]), 1 << order
            for offset in self._free[order]:
                if not offset & size and offset + size in free:
                    free -= {offset, offset + size}
                    self._free[order + 1].append(offset)
            self._free[order] = sorted(free, reverse=True)
        self._can_merge = False


class Lease(npt.NDArray[np.uint8]):
    """Bytes of a block that another process wrote; the block is given back when nothing refers to them any more.

    Every array, slice or memoryview of it keeps it alive, on whatever thread: a batch that runs, a cache or a copy of
    the request need not know where its tensors lie.
    """

    _give_back: Callable[[], None] | None = None

    @classmethod
    def of(cls, memory: mmap.mmap, offset: int, size_bytes: int, give_back: Callable[[], None]) -> "Lease":
        """Lease ``size_bytes`` at ``offset`` of ``memory``.

        Args:
            memory: Shared memory.
            offset: First byte.
            size_bytes: How many from there.
            give_back: Called once, on the thread that drops the last reference.
        """
        lease = cls((size_bytes,), np.uint8, memory, offset)
        lease._give_back = give_back
        return lease

    def __del__(self) -> None:
        if self._give_back is not None:
            self._give_back()


def create_memory(size_bytes: int) -> tuple[int, mmap.mmap]:
    """Make shared memory of a fixed size.

    Returns:
        A descriptor to send to the other process and to close, and the mapping.

    Raises:
        OSError: If the system has no memory or no descriptor left.
    """
    file = os.memfd_create("slipstream", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size_bytes)
        # A mapping that lost its pages would end the process that reads it.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return file, mmap.mmap(file, size_bytes)
    except BaseException:
        os.close(file)
        raise


def open_memory(file: int) -> mmap.mmap:
    """Map shared memory that another process made, and close its descriptor.

    Raises:
        OSError: If the descriptor is none of shared memory.
    """
    try:
        return mmap.mmap(file, os.fstat(file).st_size)
    finally:
        os.close(file)
