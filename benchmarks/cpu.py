"""CPU time of other processes, as Linux keeps it in /proc. Threads that have ended are included."""

import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(pid: int, proc: Path = Path("/proc")) -> float:
    """Return the CPU seconds, user and system, of a process and all its descendants that still live."""
    total_ticks, children = 0, children_of(proc)
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        waiting += children.get(current, [])
        try:
            total_ticks += _fields(proc / str(current) / "stat")[1]
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return total_ticks * _TICK_S


def idle_cpu_s(pid: int, proc: Path = Path("/proc")) -> float:
    """Return the CPU seconds of a process's living threads, in nanosecond steps where the kernel counts them."""
    threads = list((proc / str(pid) / "task").iterdir())
    try:
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
    except (OSError, ValueError, IndexError):
        return tree_cpu_s(pid, proc)


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
