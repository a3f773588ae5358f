"""The circuit breaker of a lane: when it takes no work, and when it is tried again. Pure.

A failed batch says that either the input or the lane is bad. A *probe*, a run of inputs that are known to work, tells
which. A lane whose probe fails is opened: it gets no work until a later probe passes. Where no such inputs are known,
a lane is opened after several failures in a row, and tried with real work after the pause.
"""

_FIRST_PAUSE_S = 0.1
_MOST_PAUSE_S = 30.0
_MOST_FAILURES = 8


class Breaker:
    """The state of one lane.

    Attributes:
        open: Whether the lane must get no work.
        retry_at_s: When to try it again; meaningless while it is closed.
    """

    def __init__(self) -> None:
        self.open = False
        self.retry_at_s = 0.0
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S

    def failed(self, now: float, probe_passed: bool | None) -> None:
        """Note a failed batch or probe.

        Args:
            now: The time.
            probe_passed: Outcome of the probe; ``None`` when no inputs are known to work.
        """
        if probe_passed:
            self.passed()
            return
        self._failures += 1
        if probe_passed is None and self._failures < _MOST_FAILURES:
            return
        self.open = True
        self.retry_at_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)

    def half_open(self) -> None:
        """Let real work try the lane, for want of a probe; its next failure opens it at once."""
        self.open = False
        self._failures = _MOST_FAILURES

    def passed(self) -> None:
        """Note a batch or probe that worked."""
        if self._failures:
            self.open, self._failures, self._pause_s = False, 0, _FIRST_PAUSE_S
