"""The time budget of one run: how much is left, what is kept back for the proof, and whether something still fits.

Mandatory work (the original's answers, the exact passes) is never cut. Then the search begins, and from there on
nothing starts that is not expected to end before the time that later stages need: they *reserve* it, each under its own
name, as soon as it can be predicted.
"""

import math
import time
from collections.abc import Callable

SPENT = "the time budget is spent"


class Budget:
    """The wall time of one run; the time starts with it.

    One thread uses it. It binds nothing before ``begin``: until then, everything is left.

    Args:
        total_s: Seconds for the whole run; infinite sets no limit.
        clock: Seconds from any start, never going back.
    """

    def __init__(self, total_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_s, self._clock = total_s, clock
        self._started_s = clock()
        self._is_binding = False
        self._reserved: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run started."""
        return self._clock() - self._started_s

    def begin(self) -> None:
        """Bind whatever comes from now on: the mandatory work is done."""
        self._is_binding = True

    def reserve(self, purpose: str, seconds: float) -> None:
        """Keep time back for what comes later; replaces what was kept back for the same purpose.

        Args:
            purpose: Name of the stage, or of the candidate, that will need it.
            seconds: How much; 0 gives it back.
        """
        self._reserved[purpose] = seconds

    def left_s(self) -> float:
        """Return the seconds that nothing reserved; negative when time is over, infinite before ``begin``."""
        if not self._is_binding:
            return math.inf
        return self._total_s - self.elapsed_s - sum(self._reserved.values())

    def refusal(self, needs_s: float = 0.0) -> str:
        """Return why work must not start, or nothing when it may.

        Args:
            needs_s: Seconds that it is expected to take; 0 when that is unknown.
        """
        left_s = self.left_s()
        if left_s <= 0:
            return SPENT
        if needs_s > left_s:
            return f"would not finish within the time budget (needs about {math.ceil(needs_s)} s)"
        return ""
