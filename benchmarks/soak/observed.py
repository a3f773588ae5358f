"""The server under observation: started as its users start it, read through /proc, counted on request."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import msgspec

from benchmarks.cpu import children_of
from benchmarks.servers import HOST, START_TIMEOUT_S, ServerFailed, free_port, is_ready
from benchmarks.soak.counting import Counts, hook

COUNT_TIMEOUT_S = 60
_STEP_S = 0.05
_PROC = Path("/proc")


class Held(msgspec.Struct, frozen=True):
    """What the system says of a process: resident bytes, threads and open descriptors."""

    rss_bytes: int
    threads: int
    files: int


class Observed:
    """A running server.

    Attributes:
        port: Its TCP port.
        pid: The process that was started.
    """

    def __init__(self, port: int, pid: int, folder: Path, log: Path) -> None:
        self.port, self.pid = port, pid
        self._folder, self._log = folder, log

    def processes(self) -> list[int]:
        """Return the server's processes: the one that was started, and its descendants."""
        children, found = children_of(_PROC), [self.pid]
        for pid in found:
            found += children.get(pid, ())
        return found

    def rss_bytes(self) -> int:
        """Return the resident bytes of all processes together; shared memory counts in each that maps it."""
        return sum(held.rss_bytes for held in self.held().values())

    def held(self) -> dict[int, Held]:
        """Return process -> what the system says of it."""
        return {pid: held_by(pid) for pid in self.processes()}

    def counts(self) -> dict[int, Counts]:
        """Have every process count; return process -> what it holds.

        Raises:
            ServerFailed: If one does not answer.
        """
        found = {}
        for pid in self.processes():
            path = self._folder / f"{pid}.json"
            path.unlink(missing_ok=True)
            os.kill(pid, signal.SIGUSR1)
            deadline_s = time.monotonic() + COUNT_TIMEOUT_S
            while not path.exists():
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"process {pid} of the server did not count within {COUNT_TIMEOUT_S} s")
                time.sleep(_STEP_S)
            found[pid] = msgspec.json.decode(path.read_bytes(), type=Counts)
        return found

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"http://{HOST}:{self.port}/metrics", timeout=COUNT_TIMEOUT_S).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def complaints(self) -> list[str]:
        """Return the lines of the log that speak of errors."""
        marks = ("ERROR", "CRITICAL", "Traceback", "never retrieved", "was never awaited", "was destroyed")
        return [line for line in self._log.read_text().splitlines() if any(mark in line for mark in marks)]


def held_by(pid: int, proc: Path = _PROC) -> Held:
    """Read what the system says of a process."""
    status = dict(line.partition(":")[::2] for line in (proc / str(pid) / "status").read_text().splitlines())
    files = sum(1 for _ in (proc / str(pid) / "fd").iterdir())
    return Held(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


@contextlib.contextmanager
def observed(repository: Path, folder: Path, options: Mapping[str, object]) -> Iterator[Observed]:
    """Serve a repository with the installed command while the context is open.

    Args:
        repository: What is served.
        folder: An empty folder for counts and log.
        options: Option of the command without its dashes -> value.

    Raises:
        ServerFailed: If it does not become ready; also if it does not end by itself when it is told to.
    """
    port, log = free_port(), folder / "log"
    command = [str(Path(sys.executable).parent / "slipstream"), "serve", str(repository), "--host", HOST]
    for name, value in {"port": port, "gpu": "off", **options}.items():
        command += [f"--{name}", str(value)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": hook(folder)},
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(port, "/v2/health/ready"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise ServerFailed(f"the server did not get ready:\n{log.read_text()[-2000:]}")
            time.sleep(_STEP_S)
        yield Observed(port, process.pid, folder, log)
        process.terminate()
        try:
            code = process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"the server did not stop in {START_TIMEOUT_S} s") from None
        if code:
            raise ServerFailed(f"the server ended with exit code {code}:\n{log.read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
