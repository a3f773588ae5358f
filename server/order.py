"""In which order waiting requests go: deadlines, priorities that age, and fairness between clients. Pure.

Every request gets one number when it arrives, its *rank*; the smallest goes first. It is a time in seconds::

    rank = min(deadline, start + 1 s) + (priority - 5) * 1 s

- With equal timeouts and priorities this is the order of arrival; a request that is due sooner goes earlier.
- A priority is worth one second of waiting per level, so nobody starves: whatever has waited a second longer than the
  levels between them goes first.
- ``start`` is the time of arrival, for a client that names itself no earlier than its own work before it would take a
  lane of its own (start-time fair queueing): who sends more than its share queues behind itself, not before others.
"""

import math

DEFAULT_PRIORITY = 5
_LEVEL_S = 1.0
_PATIENCE_S = 1.0
"""A request without a deadline counts as due after this time."""

_MOST_CLIENTS = 10_000


class Order:
    """Ranks the requests of one model."""

    def __init__(self) -> None:
        self._served_s: dict[str, float] = {}  # client -> when the work it has sent so far would be done, run alone

    def rank_s(self, now: float, deadline_s: float | None, priority: int, client: str, work_s: float) -> float:
        """Rank an admitted request.

        Args:
            now: The time of arrival.
            deadline_s: When its answer loses its value; ``None`` for never.
            priority: 1 to 9; 0 means the default, 5.
            client: Whom it counts for; empty for nobody.
            work_s: Seconds that it keeps a lane busy.
        """
        start_s = self._start_s(client, now, work_s) if client else now
        due_s = min(math.inf if deadline_s is None else deadline_s + start_s - now, start_s + _PATIENCE_S)
        return due_s + ((priority or DEFAULT_PRIORITY) - DEFAULT_PRIORITY) * _LEVEL_S

    def _start_s(self, client: str, now: float, work_s: float) -> float:
        start_s = max(now, self._served_s.pop(client, now))
        self._served_s[client] = start_s + work_s
        if len(self._served_s) > _MOST_CLIENTS:
            self._forget(now)
        return start_s

    def _forget(self, now: float) -> None:
        """Drop clients that owe nothing, and the half that came longest ago if that is not enough."""
        owing = {client: end_s for client, end_s in self._served_s.items() if end_s > now}
        if len(owing) > _MOST_CLIENTS // 2:
            owing = dict(list(owing.items())[-_MOST_CLIENTS // 2 :])
        self._served_s = owing
