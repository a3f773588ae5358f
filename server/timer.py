"""One timer of the event loop, in the clock of its owner."""

import asyncio
from collections.abc import Callable


class Timer:
    """Calls back at the earliest of the times it was set to.

    Args:
        loop: The running loop.
        callback: What to call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._handle: asyncio.TimerHandle | None = None
        self._at_s = 0.0

    def set(self, at_s: float, now: float) -> None:
        """Call back at ``at_s``, unless it calls back earlier already."""
        if self._handle is None or at_s < self._at_s:
            self.cancel()
            self._at_s = at_s
            self._handle = self._loop.call_later(at_s - now, self._fire)

    def cancel(self) -> None:
        """Do not call back."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._callback()
