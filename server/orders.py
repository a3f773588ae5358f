"""Orders of the supervisor to its processes, and their reports: short notes, with descriptors of files, over a socket.

Each process has a line of its own, which ends with either of its two ends: a process whose supervisor is gone ends too.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Literal

import msgspec

Word = Literal[
    "serve",  # to all: the settings are in the text; a front end gets the listening socket with it
    "connect",  # to all: a socket that leads to the other side
    "listening",  # to the engine: connections are accepted at the URL in the text
    "drain",  # to all: say that you are not ready; a front end closes its socket after the grace time and finishes
    "abort",  # to a front end: end without a grace time
    "stop",  # to the engine: close the models and end
    "connected",  # from a front end: it accepts connections, and the engine answers
    "opened",  # from the engine: it has opened what it can
    "failed",  # from the engine: nothing can be served; the text says why
    "lost",  # from a front end: the engine is gone, or the channel to it
    "draining",  # from all: the order to drain is carried out
    "closed",  # from a front end: its listening socket is closed
    "finished",  # from a front end: its requests are answered, or have had their time
]
_NOTE_BYTES: Final = 64 * 1024
_MAX_FILES: Final = 4


class Note(msgspec.Struct, frozen=True):
    """An order or a report."""

    word: Word
    text: str = ""


class Line:
    """One end of a line. Construct it, and call it, on the event loop.

    Args:
        connection: A connected ``SOCK_SEQPACKET`` socket; the line owns it.
        received: Called with every note and the descriptors that came with it, which it owns.
        lost: Called once when the other end is gone.

    Attributes:
        is_open: Whether neither end is closed, as far as this one knows.
    """

    def __init__(
        self,
        connection: socket.socket,
        received: Callable[[Note, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        connection.setblocking(False)
        self._socket, self._received, self._lost = connection, received, lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._read)
        self.is_open = True

    def send(self, word: Word, text: str = "", *files: int) -> None:
        """Send a note with copies of descriptors; does nothing when the other end is gone."""
        if self.is_open:
            try:
                socket.send_fds(self._socket, [msgspec.msgpack.encode(Note(word, text))], files)
            except OSError:
                self._end()

    def close(self) -> None:
        """Close this end. Idempotent."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        try:
            data, files, _, _ = socket.recv_fds(self._socket, _NOTE_BYTES, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, files = b"", []
        if data:
            self._received(msgspec.msgpack.decode(data, type=Note), files)
        else:
            self._end()

    def _end(self) -> None:
        if self.is_open:
            self.close()
            self._lost()
