"""The cores that this process may use, and what they compute wrongly."""

import os
from pathlib import Path

_INT8_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni"})
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use: its affinity, cut by the cgroup's CPU quota, at least 1.

    Args:
        cgroup: Where the cgroup file system is mounted.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *_quotas(cgroup)]))


def saturates_int8(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether this CPU gives wrong INT8 products unless it is told otherwise.

    x86 without VNNI multiplies UINT8 by INT8 and adds two neighbours in 16 bits, which saturates: 2 x 255 x 127 exceeds
    32767. Weights of 7 bits never do, the session entry ``providers.EXACT_PRODUCTS`` avoids it for all
    weights.

    Args:
        cpuinfo: Where Linux lists the CPU's instruction sets; a file without x86 flags means no.
    """
    flags = next((line for line in "".join(_read(cpuinfo)).splitlines() if line.startswith("flags")), "")
    return bool(flags) and not _INT8_DOT_PRODUCT & set(flags.split())


def _quotas(cgroup: Path) -> list[int]:
    """Read whole cores from cgroup v2's ``cpu.max``, also of the groups above, and from v1; empty without a limit."""
    own = "".join(_read(_OWN_CGROUP)).rpartition("0::")[2].strip("/")
    groups = [Path(own), *Path(own).parents]
    limits = [text.split() for group in groups for text in _read(cgroup / group / "cpu.max")]
    limits += [[*_read(cgroup / "cpu/cpu.cfs_quota_us"), *_read(cgroup / "cpu/cpu.cfs_period_us")]]
    return [int(limit[0]) // int(limit[1]) for limit in limits if len(limit) == 2 and limit[0] not in ("max", "-1")]


def _read(path: Path) -> list[str]:
    try:
        return [path.read_text().strip()]
    except OSError:
        return []
