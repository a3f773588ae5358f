"""Runs jobs in processes of their own that start at once, and ends those that take too long or too much memory.

Importing what passes need takes longer than most passes. So one process imports it all and then does nothing but fork a
child for each job: a job that crashes takes only its own process with it.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn, cast

LOG = "log.txt"
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; "
_SERVE = "from optimizers.nursery import serve; serve(main)"
_LOOK_S = 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Nursery:
    """A process that forks a child for each job; it starts with the first job and ends with ``close``.

    Not thread-safe: one job at a time.

    Args:
        module: Where ``main(folder)`` is, which a child runs.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, folder: Path, timeout_s: float, memory_bytes: int = 0) -> str:
        """Run ``main(folder)`` in a child and wait for it; what it prints goes into ``log.txt`` there.

        Args:
            folder: An existing folder.
            timeout_s: Seconds after which the child is killed.
            memory_bytes: Resident memory at which it is killed; 0 means no limit.

        Returns:
            Why it ended badly, or nothing.
        """
        process = self._started()
        try:
            orders, answers = _pipe(process.stdin), _pipe(process.stdout)
            orders.write(str(folder).encode() + b"\n")
            pid = int(answers.readline())
            stopped = _watch(answers, pid, timeout_s, memory_bytes)
            status = int(answers.readline())
        except (OSError, ValueError):
            self.close()
            return "its process could not be started or was lost"
        except BaseException:  # the user interrupts: nothing may go on
            self._kill()
            raise
        return stopped or _ending(status, folder / LOG)

    def close(self) -> None:
        """End the process; it has no children between jobs."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError):  # it was lost
                _pipe(process.stdin).close()
            process.wait()
            _pipe(process.stdout).close()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            code = _START.format(module=self._module) + _SERVE
            command = [sys.executable, "-c", code, json.dumps(sys.path)]
            self._process = subprocess.Popen(
                command,
                bufsize=0,  # or the second of two answers could hide in a buffer from ``select``
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    def _kill(self) -> None:
        """End the process and its child, which share a session."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    return cast("IO[bytes]", stream)  # both were asked for


def _watch(answers: IO[bytes], pid: int, timeout_s: float, memory_bytes: int) -> str:
    """Wait until the child has ended; kill it, and return why, when it exceeds its time or its memory."""
    end = time.monotonic() + timeout_s
    stopped = ""
    while not select.select([answers], [], [], _LOOK_S)[0]:
        if stopped:
            continue
        used = resident_bytes(pid)
        if time.monotonic() > end:
            stopped = f"stopped after {timeout_s:g} s without a result"
        elif 0 < memory_bytes < used:
            stopped = f"stopped at {used / 1e9:.1f} GB of memory; allowed are {memory_bytes / 1e9:.1f} GB"
        if stopped:
            with suppress(ProcessLookupError):  # it ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)
    return stopped


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def serve(main: Callable[[str], None]) -> None:
    """Fork a child for every folder named on stdin; answer its process id and, later, how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _work(main, line.rstrip("\n"))
        answers.write(f"{pid}\n")
        answers.flush()
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _work(main: Callable[[str], None], folder: str) -> NoReturn:
    """Run the job as a process of its own would, and end."""
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 1
    try:
        main(folder)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001  (the end of the process: what remains is to tell)
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ending(status: int, log: Path) -> str:
    if status == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"its process {ended}" + (f": {lines[-1]}" if lines else "")
