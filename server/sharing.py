"""The cores of the machine, shared by all models of the process: none keeps more busy than there are.

Lives on the event loop. A model takes cores for each batch and gives them back; whoever waits then goes in the order of
*used* time, the one that used least first (start-time fair queueing over thread-seconds). A model that comes back from
idleness starts level with the others: it has saved nothing up.
"""

from collections.abc import Callable


class Cores:
    """The cores of each device.

    Args:
        count: Cores that the process may use; also how many batches another device runs at a time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.busy: dict[str, int] = {}
        self._members: list[Member] = []

    def join(self, dispatch: Callable[[], None]) -> "Member":
        """Take part.

        Args:
            dispatch: Called when cores may have become free for a member that waits.
        """
        member = Member(self, dispatch)
        self._members.append(member)
        return member

    def leave(self, member: "Member") -> None:
        """Take part no longer; idempotent."""
        self._members = [other for other in self._members if other is not member]

    def waiting(self) -> "list[Member]":
        """Return the members that wait, whoever used least first."""
        return sorted((m for m in self._members if m.waits), key=lambda m: m.used_s)


class Member:
    """One model's part.

    Attributes:
        waits: Whether it has work that could run.
        used_s: Thread-seconds that count as used.
    """

    def __init__(self, cores: Cores, dispatch: Callable[[], None]) -> None:
        self._cores, self.dispatch = cores, dispatch
        self.waits = False
        self.used_s = 0.0

    @property
    def share(self) -> int:
        """Cores that it may count on while others wait as well; at least 1."""
        others = sum(1 for member in self._cores.waiting() if member is not self)
        return max(1, self._cores.count // (1 + others))

    def has_room(self, device: str, threads: int) -> bool:
        """Whether a batch of so many threads may start; one is always allowed on an idle device."""
        busy = self._cores.busy.get(device, 0)
        return busy == 0 or busy + threads <= self._cores.count

    def take(self, device: str, threads: int) -> None:
        """Occupy cores."""
        self._cores.busy[device] = self._cores.busy.get(device, 0) + threads

    def give(self, device: str, threads: int, seconds: float) -> None:
        """Free cores after so many seconds."""
        self._cores.busy[device] -= threads
        self.used_s += threads * seconds

    def set_waits(self, waits: bool) -> None:
        """Say whether there is work that could run."""
        if waits and not self.waits:
            least_s = min((m.used_s for m in self._cores.waiting()), default=self.used_s)
            self.used_s = max(self.used_s, least_s)
        self.waits = waits

    def dispatch_all(self) -> None:
        """Let everybody who waits, this member included, try to start batches."""
        waiting = self._cores.waiting()
        if not waiting or waiting == [self]:
            self.dispatch()
            return
        for member in waiting:
            member.dispatch()
        if self not in waiting:
            self.dispatch()
