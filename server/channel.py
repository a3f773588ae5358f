"""The connection of one front end with the engine: descriptors over a socket, large messages in shared memory.

Each side allocates from a *slab* of its own that the other side only reads. What is posted in one iteration of the
event loop leaves in one packet, so that under load many requests share a system call and a wake-up. A packet is a
sequence of descriptors of fixed size::

    kind u8 | place u8 | - u16 | target u32 | id u64 | head bytes u32 | - u32 | offset u64 | size u64       (40 bytes)

``place`` says where the message lies: nowhere (there is none), *inline* behind the descriptor (small messages: a copy
through the socket costs less than a block and its release), in the *slab* at ``offset``, or in memory *of its own*,
whose descriptor travels along, for messages that would fill much of a slab.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from server.messages import Buffer, Encoded
from server.slab import Allocator, Lease, create_memory, open_memory

logger = logging.getLogger(__name__)

# Kinds of descriptors: of the channel itself, from a front end, from the engine.
HELLO, RELEASE = 0, 1
LOOK_UP, INFER, HTTP, CANCEL, FINISHED = 10, 11, 12, 13, 14
FOUND, INFERRED, ANSWER, FAILURE, FORGET = 20, 21, 22, 23, 24

INLINE_BYTES: Final = 4096
PACKET_BYTES: Final = 64 * 1024
_NOWHERE, _INLINE, _SLAB, _OWN = 0, 1, 2, 3
_DESCRIPTOR: Final = struct.Struct("<BB2xIQI4xQQ")
# Of a slab that is empty again, pages beyond this are given back to the system. A multiple of the size of pages.
KEPT_BYTES: Final = 64 * 1024 * 1024
# Messages above this share of a slab get memory of their own.
_LARGEST_SHARE: Final = 4
_MAX_FILES: Final = 64
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_MAX_FILES * 4)


Receive = Callable[[int, int, int, Buffer, int], None]
"""Takes a descriptor: its kind, the number of a model, the number of a request, the message (empty if there is none),
and how many bytes of it are its head."""


class Channel:
    """One end. Construct it, and call it, on the event loop.

    Args:
        connection: A connected, non-blocking ``SOCK_SEQPACKET`` socket; the channel owns it.
        slab_bytes: Size of this end's slab.
        leases: Whether messages in shared memory are handed out as ``Lease``, without a copy, and are given back when
            nothing refers to them any more; otherwise they are copied and given back at once.
        received: Called for every descriptor, on the loop.
        lost: Called once when the other end is gone.

    Attributes:
        is_open: Whether the other end is there and has said what memory it uses.
        made_room: Called whenever the other end has given memory back.

    Raises:
        OSError: If there is no memory for the slab.
    """

    def __init__(
        self,
        connection: socket.socket,
        slab_bytes: int,
        *,
        leases: bool,
        received: Receive,
        lost: Callable[[], None],
    ) -> None:
        self.is_open = False
        self.made_room: Callable[[], None] | None = None
        self._socket, self._leases, self._received, self._lost = connection, leases, received, lost
        self._is_lost = self._is_writing = self._flush_due = False
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._slab_bytes, self._allocator = slab_bytes, Allocator(slab_bytes)
        self._own_bytes: dict[int, int] = {}  # number of a memory of its own -> bytes, until it is given back
        self._owned = 0
        self._pieces: list[bytes] = []
        self._pieces_bytes = 0
        self._files: list[int] = []
        self._packets: deque[tuple[bytes, list[int]]] = deque()
        self._buffer = bytearray(PACKET_BYTES)
        self._view = memoryview(self._buffer)
        self._incoming: mmap.mmap | None = None
        self._slab: mmap.mmap | None
        file, self._slab = create_memory(slab_bytes)
        self._loop.add_reader(connection, self._read)
        self._put(_DESCRIPTOR.pack(HELLO, _NOWHERE, 0, 0, 0, 0, slab_bytes), file)

    @property
    def used_bytes(self) -> int:
        """Bytes of this end's shared memory that the other end has not given back."""
        return self._allocator.used_bytes + sum(self._own_bytes.values())

    def post(self, kind: int, target: int = 0, request: int = 0, message: Encoded | None = None) -> bool:
        """Send a descriptor at the end of this iteration of the loop; return whether there was room for its message.

        When there is none, nothing is sent; try again when ``made_room`` is called. A channel that is lost has room for
        everything and sends nothing.

        Raises:
            OSError: If the system has no memory for a large message.
        """
        if self._slab is None:
            return True
        if message is None:
            self._put(_DESCRIPTOR.pack(kind, _NOWHERE, target, request, 0, 0, 0))
            return True
        head, size = len(message.head), message.size_bytes
        if size <= INLINE_BYTES and not message.tensors:
            self._put(_DESCRIPTOR.pack(kind, _INLINE, target, request, head, 0, size) + message.head)
        elif size * _LARGEST_SHARE <= self._slab_bytes:
            offset = self._allocator.allocate(size)
            if offset is None:
                return False
            message.write(memoryview(self._slab)[offset : offset + size])
            self._put(_DESCRIPTOR.pack(kind, _SLAB, target, request, head, offset, size))
        else:
            if self._own_bytes and sum(self._own_bytes.values()) + size > self._slab_bytes:
                return False
            file, memory = create_memory(size)
            message.write(memoryview(memory))
            self._owned += 1
            self._own_bytes[self._owned] = size
            self._put(_DESCRIPTOR.pack(kind, _OWN, target, request, head, self._owned, size), file)
        return True

    def close(self) -> None:
        """Send what is posted, as far as that needs no waiting, and close; the other end sees the end. Idempotent.

        Messages that are still leased stay readable.
        """
        if not self._is_lost:
            self._flush()
            self._end()

    # Sending.

    def _put(self, piece: bytes, file: int | None = None) -> None:
        # May be entered again from within, by a lease that ends: one append, and nothing is read twice.
        if self._pieces_bytes + len(piece) > PACKET_BYTES or len(self._files) == _MAX_FILES:
            self._seal()
        self._pieces_bytes += len(piece)
        self._pieces.append(piece)
        if file is not None:
            self._files.append(file)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _seal(self) -> None:
        pieces, files = self._pieces, self._files
        self._pieces, self._files, self._pieces_bytes = [], [], 0
        self._packets.append((b"".join(pieces), files))

    def _flush(self) -> None:
        self._flush_due = False
        if self._is_lost:
            return
        if self._pieces:
            self._seal()
        while self._packets:
            packet, files = self._packets[0]
            try:
                if files:
                    socket.send_fds(self._socket, [packet], files)
                else:
                    self._socket.send(packet)
            except BlockingIOError:
                self._set_writing(True)
                return
            except OSError:
                self._lose()
                return
            self._packets.popleft()
            _close(files)
        self._set_writing(False)

    def _set_writing(self, is_writing: bool) -> None:
        if is_writing and not self._is_writing:
            self._loop.add_writer(self._socket, self._flush)
        elif self._is_writing and not is_writing:
            self._loop.remove_writer(self._socket)
        self._is_writing = is_writing

    # Receiving.

    def _read(self) -> None:
        """Take one packet; the loop calls again while there are more."""
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into([self._buffer], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            size = 0
        if not size:
            self._lose()
            return
        try:
            self._take(size, deque(_files_in(ancillary) if ancillary else ()))
        except (ValueError, TypeError, LookupError, OSError, struct.error, msgspec.MsgspecError):
            logger.exception("what the other process sent cannot be read; closing the channel")
            self._lose()

    def _take(self, size: int, files: deque[int]) -> None:
        """Take a packet of ``size`` bytes apart.

        Raises:
            ValueError: If it is not made of descriptors and messages; also many other errors, for a foreign message.
        """
        position = 0
        while position < size and not self._is_lost:
            kind, place, target, request, head, offset, length = _DESCRIPTOR.unpack_from(self._buffer, position)
            position += _DESCRIPTOR.size
            if kind == RELEASE:
                self._take_back(place, offset)
                continue
            if kind == HELLO:
                self._incoming = open_memory(files.popleft())
                self.is_open = True
            message: Buffer = b""
            if place == _INLINE:
                message = bytes(self._view[position : position + length])
                position += length
            elif place == _SLAB and self._incoming is not None:
                message = self._message(self._incoming, place, offset, offset, length)
            elif place == _OWN:
                message = self._message(open_memory(files.popleft()), place, 0, offset, length)
            elif place != _NOWHERE:
                raise ValueError(f"no message lies at place {place}")
            self._received(kind, target, request, message, head)
        if position > size:
            raise ValueError(f"a packet of {size} bytes ends within a message")

    def _message(self, memory: mmap.mmap, place: int, start: int, token: int, length: int) -> Buffer:
        if self._leases:
            return Lease.of(memory, start, length, partial(self._give_back, place, token))
        copy = memory[start : start + length]
        self._give_back(place, token)
        return copy

    def _give_back(self, place: int, token: int) -> None:
        """Tell the other end that a message is read; on any thread."""
        if self._is_lost:
            return
        piece = _DESCRIPTOR.pack(RELEASE, place, 0, 0, 0, token, 0)
        if threading.get_ident() == self._thread:
            self._put(piece)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the channel with it
                self._loop.call_soon_threadsafe(self._put, piece)

    def _take_back(self, place: int, token: int) -> None:
        if place == _SLAB:
            self._allocator.release(token)
            if self._allocator.is_empty and self._allocator.high_bytes > KEPT_BYTES and self._slab is not None:
                self._slab.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self._allocator.high_bytes - KEPT_BYTES)
                self._allocator.reset()
        else:
            del self._own_bytes[token]
        if self.made_room is not None:
            self.made_room()

    # The end.

    def _lose(self) -> None:
        if not self._is_lost:
            self._end()
            self._lost()

    def _end(self) -> None:
        self._is_lost, self.is_open = True, False
        # Unmapped now, or with the last lease, and not whenever this object is collected.
        self._slab = self._incoming = None
        self._set_writing(False)
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for _, files in self._packets:
            _close(files)
        _close(self._files)
        self._packets.clear()
        self._pieces.clear()
        self._files.clear()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets for the two ends of a channel."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
    return pair


def _files_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
    return found


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
