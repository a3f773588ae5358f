"""Facts about this machine that decide what is correct and fast on it, and their fingerprint."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from server.cores import usable_cores

CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
)
"""The instruction sets that change which precision pays; the rest of the flags is noise."""

TOOLS = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "onnxslim",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-bindings",
)
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostFacts(msgspec.Struct, frozen=True):
    """What the optimizer knows about the machine.

    Attributes:
        cpu: Model name of the CPU.
        flags: Which of ``CPU_FLAGS`` it has, in that order.
        cores: Cores that this process may use.
        gpus: Names of the GPUs.
        tools: Installed distributions and their versions.
        arch: The machine's architecture, e.g. ``x86_64``.
    """

    cpu: str
    flags: tuple[str, ...]
    cores: int
    gpus: tuple[str, ...] = ()
    tools: dict[str, str] = {}
    arch: str = "x86_64"

    @property
    def has_int8_dot(self) -> bool:
        """Whether the CPU multiplies UINT8 by INT8 into 32 bits, so that no product saturates.

        Without it, x86 adds pairs of products in 16 bits, and full-range weights give wrong sums.
        """
        return bool({"avx512_vnni", "avx_vnni", "asimddp"} & set(self.flags))

    @property
    def fingerprint(self) -> str:
        """Name this kind of machine: the same CPU, instruction sets, cores, GPUs and onnxruntime give the same name."""
        runtime = {name: self.tools.get(name, "") for name in ("onnxruntime", "onnxruntime-gpu")}
        known = msgspec.json.encode([self.cpu, self.arch, self.flags, self.cores, self.gpus, runtime])
        return hashlib.sha256(known).hexdigest()[:16]


def read_host() -> HostFacts:
    """Read the facts of this machine; what cannot be found out is left empty."""
    cpu, flags = parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8") if _CPUINFO.is_file() else "")
    return HostFacts(cpu or platform.processor(), flags, usable_cores(), _gpus(), _tools(), platform.machine())


def available_memory_bytes() -> int:
    """Return the memory that a process may still take, within the limit of its control group; 0 when unknown."""
    known = [int(line.split()[1]) * 1024 for line in _lines(_MEMINFO) if line.startswith("MemAvailable:")]
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if limit and used and limit[0].isdigit():
        known.append(int(limit[0]) - int(used[0]))
    return max(min(known), 0) if known else 0


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the model name and the known flags of the first processor in the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    seen = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", ""), tuple(flag for flag in CPU_FLAGS if flag in seen)


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _tools() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
