"""Time limits that hardly ever pass, with one timer for all of them."""

import asyncio
from collections.abc import Callable

Alarm = Callable[[], None]


class Alarms:
    """Calls what has not been cleared ``delay_s`` after it was set.

    Cheaper than a timer for each, 0.5 us instead of 0.9 us on uvloop. Belongs to one event loop.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._due_s: dict[Alarm, float] = {}  # in the order of their times, which all lie equally far ahead
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due_s)

    def set(self, alarm: Alarm) -> None:
        """Call ``alarm`` after the delay; it must not be set already."""
        loop = asyncio.get_running_loop()
        self._due_s[alarm] = due_s = loop.time() + self._delay_s
        if self._timer is None:
            self._timer = loop.call_at(due_s, self._ring, loop)

    def clear(self, alarm: Alarm) -> None:
        """Do not call ``alarm``; without effect once it was called."""
        self._due_s.pop(alarm, None)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for alarm, due_s in list(self._due_s.items()):
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self._ring, loop)
                return
            del self._due_s[alarm]
            alarm()
