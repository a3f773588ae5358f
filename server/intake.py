"""How much of what has come is read at a go.

An event loop reads from all sockets that are ready before it does anything else. With two thousand of them that takes
longer than most deadlines: all that was read would be late, its answers as well, and the next round longer still. Here
what is read at a go is bounded; the rest waits in the order in which it came, and how long it has waited is known.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

READ_AT_ONCE: Final = 64
"""Pieces of data: more than a batch of a tiny model, and 2 to 3 ms of work."""


class Intake:
    """The turn of each piece of data. Belongs to one event loop.

    Attributes:
        waited_s: What the piece that is read now has waited, in seconds.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._waiting: deque[tuple[Callable[[bytes], None], bytes, float]] = deque()
        self._left = READ_AT_ONCE
        self._is_due = False

    def take(self, read: Callable[[bytes], None], data: bytes) -> bool:
        """Call ``read`` with the data, now or when its turn comes; return whether it has read it."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._go_on)
        if self._left and not self._waiting:
            self._left -= 1
            read(data)
            return True
        self._waiting.append((read, data, asyncio.get_running_loop().time()))
        return False

    def _go_on(self) -> None:
        """Read on, once all else that the loop has to do has been done."""
        loop, waiting = asyncio.get_running_loop(), self._waiting
        now = loop.time()
        for _ in range(min(READ_AT_ONCE, len(waiting))):
            read, data, since_s = waiting.popleft()
            self.waited_s = now - since_s
            try:
                read(data)
            except Exception as exc:  # noqa: BLE001  (the loop's own way with a protocol's error; the others go on)
                loop.call_exception_handler({"message": "a connection failed", "exception": exc})
        self.waited_s = 0.0
        self._left = 0 if waiting else READ_AT_ONCE
        self._is_due = bool(waiting)
        if waiting:
            loop.call_soon(self._go_on)
