"""Shared memory: blocks that never overlap and never get lost, and leases that end with the last reference."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.slab import MIN_BLOCK_BYTES, Allocator, Lease, create_memory, open_memory

KIB = 1024
sizes = st.integers(1, 70 * KIB)
# Allocate so many bytes, or release the block at this index of those that are handed out.
steps = st.lists(st.one_of(sizes, st.integers(0, 10**6).map(lambda index: -1 - index)), max_size=200)


@given(st.integers(MIN_BLOCK_BYTES, 300 * KIB), steps)
def test_blocks_never_overlap_and_lie_inside(slab_bytes: int, taken: list[int]) -> None:
    allocator = Allocator(slab_bytes)
    blocks: dict[int, int] = {}
    for step in taken:
        if step < 0:
            if blocks:
                offset = sorted(blocks)[(-1 - step) % len(blocks)]
                del blocks[offset]
                allocator.release(offset)
        elif (offset := allocator.allocate(step)) is not None:
            assert offset >= 0
            assert offset + step <= slab_bytes
            assert all(offset + step <= other or other + size <= offset for other, size in blocks.items())
            blocks[offset] = step
    assert allocator.used_bytes >= sum(blocks.values())


@given(st.integers(MIN_BLOCK_BYTES, 300 * KIB), st.lists(sizes, max_size=100), st.randoms(use_true_random=False))
def test_nothing_is_lost_whatever_the_order_of_release(slab_bytes: int, wanted: list[int], random: object) -> None:
    allocator = Allocator(slab_bytes)
    largest = 1 << (slab_bytes.bit_length() - 1)
    blocks = [offset for size in wanted if (offset := allocator.allocate(size)) is not None]
    random.shuffle(blocks)  # type: ignore[attr-defined]
    for offset in blocks:
        allocator.release(offset)
    assert allocator.used_bytes == 0
    assert allocator.allocate(largest) is not None, "free neighbours were not merged"


def test_full_range_has_no_block_until_one_is_released() -> None:
    allocator = Allocator(4 * KIB)
    blocks = [allocator.allocate(KIB) for _ in range(4)]
    assert set(blocks) == {0, KIB, 2 * KIB, 3 * KIB}
    assert allocator.allocate(1) is None
    allocator.release(2 * KIB)
    assert allocator.allocate(2 * KIB) is None
    assert allocator.allocate(KIB) == 2 * KIB


def test_block_larger_than_the_range_is_refused() -> None:
    allocator = Allocator(4 * KIB)
    assert allocator.allocate(4 * KIB + 1) is None
    assert allocator.allocate(1 << 40) is None
    assert allocator.allocate(4 * KIB) == 0


def test_reset_forgets_the_high_mark_and_begins_low() -> None:
    allocator = Allocator(64 * KIB)
    blocks = [allocator.allocate(KIB) for _ in range(10)]
    assert allocator.high_bytes == 10 * KIB
    assert not allocator.is_empty
    for offset in blocks:
        assert offset is not None
        allocator.release(offset)
    assert allocator.is_empty
    assert allocator.high_bytes == 10 * KIB
    allocator.reset()
    assert allocator.high_bytes == 0
    assert [allocator.allocate(KIB) for _ in range(64)] == [KIB * number for number in range(64)]
    assert allocator.allocate(1) is None


def test_block_released_twice_is_an_error() -> None:
    allocator = Allocator(4 * KIB)
    offset = allocator.allocate(1)
    assert offset is not None
    allocator.release(offset)
    with pytest.raises(ValueError, match="no block begins at"):
        allocator.release(offset)


def lease_of(size: int = 4096) -> tuple[Lease, list[str]]:
    file, memory = create_memory(size)
    os.close(file)
    given_back: list[str] = []
    return Lease.of(memory, 0, size, lambda: given_back.append(threading.current_thread().name)), given_back


def test_lease_lives_as_long_as_anything_made_of_it() -> None:
    lease, given_back = lease_of()
    array = np.ndarray((4, 8), np.float32, lease, 64)
    row, view = array[1:2].reshape(8), memoryview(array)
    del lease
    assert not given_back
    del array
    assert not given_back
    del row
    assert not given_back
    view.release()
    del view
    assert given_back == ["MainThread"]


def test_lease_is_not_given_back_by_what_numpy_derives_from_it() -> None:
    lease, given_back = lease_of()
    for derived in (lease[2:4], lease.view(), lease.astype(np.float32), lease + 1):
        assert len(derived) > 0
    del derived
    assert not given_back
    del lease
    assert len(given_back) == 1


def test_lease_is_given_back_on_the_thread_that_drops_it() -> None:
    lease, given_back = lease_of()
    holder = [np.ndarray((8,), np.float32, lease)]
    del lease
    thread = threading.Thread(target=holder.clear, name="lane")
    thread.start()
    thread.join()
    assert given_back == ["lane"]


def test_memory_is_shared_cannot_shrink_and_leaves_no_descriptor() -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    file, ours = create_memory(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 100)
    theirs = open_memory(os.dup(file))
    os.close(file)
    ours[100:103] = b"abc"
    assert theirs[100:103] == b"abc"
    del ours, theirs
    assert len(list(Path("/proc/self/fd").iterdir())) == before
