"""CPU time and memory of other processes, as Linux keeps them in /proc."""

import os
from pathlib import Path

import msgspec

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(pid: int, proc: Path = Path("/proc")) -> float:
    """Return the CPU seconds, user and system, of a process and all its descendants that still live.

    Threads that have ended are included.
    """
    total_ticks = 0
    for current in tree_of(pid, proc):
        try:
            total_ticks += _fields(proc / str(current) / "stat")[1]
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return total_ticks * _TICK_S


def idle_cpu_s(pid: int, proc: Path = Path("/proc")) -> float:
    """Return the CPU seconds of the living threads of a process and its descendants.

    In nanosecond steps where the kernel counts them, or else as ``tree_cpu_s``.
    """
    try:
        threads = [thread for current in tree_of(pid, proc) for thread in (proc / str(current) / "task").iterdir()]
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
    except (OSError, ValueError, IndexError):
        return tree_cpu_s(pid, proc)


class Memory(msgspec.Struct, frozen=True):
    """Of a process and its descendants, in MB (10^6 bytes).

    Attributes:
        rss: Resident sizes added up: what processes share is counted as often.
        pss: What is shared is divided among those that share it.
    """

    rss: float
    pss: float


def tree_memory(pid: int, proc: Path = Path("/proc")) -> Memory:
    """Return the memory of a process and all its descendants that still live."""
    kilobytes = {"Rss": 0, "Pss": 0}
    for current in tree_of(pid, proc):
        try:
            lines = (proc / str(current) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it ended meanwhile
        for line in lines:
            key, _, value = line.partition(":")
            if key in kilobytes:
                kilobytes[key] += int(value.split()[0])
    return Memory(kilobytes["Rss"] * 1024 / 1e6, kilobytes["Pss"] * 1024 / 1e6)


def tree_of(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and all its descendants."""
    children, found = children_of(proc), [pid]
    for current in found:
        found += children.get(current, [])
    return found


def children_of(proc: Path) -> dict[int, list[int]]:
    """Return process -> its children."""
    children: dict[int, list[int]] = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            try:
                parent, _ = _fields(folder / "stat")
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
    return children


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _fields(stat: Path) -> tuple[int, int]:
    """Return the parent's id and the ticks of a ``stat`` file; the second field is a name that may hold anything."""
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[11]) + int(fields[12])
