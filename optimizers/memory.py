"""What a session costs in memory: measured in a process of its own, which nothing else has touched."""

import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Tensors

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from optimizers.memory import main; main(sys.argv[2])"
)
_TIMEOUT_S = 120.0
_JOB = "job.pickle"
_SMAPS = Path("/proc/self/smaps_rollup")


class _Job(msgspec.Struct, frozen=True):
    model: Path
    device: Device
    options: SessionOptions
    batch: Tensors


def session_memory(model: Path, device: Device, options: SessionOptions, batch: Tensors) -> int | None:
    """Return the bytes of memory that opening a model and running one batch adds to a process.

    Pages of the model file itself, which the system may drop, do not count.

    Args:
        model: The file.
        device: Where it runs; memory of a GPU is not seen.
        options: How it is opened.
        batch: What it runs.

    Returns:
        Bytes, or ``None`` when the process did not answer or the system does not tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / _JOB
        job.write_bytes(pickle.dumps(_Job(model, device, options, batch)))
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(job)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
            return max(int(done.stdout), 0)
        except (subprocess.SubprocessError, ValueError):
            return None


def main(job: str) -> None:
    """Measure, and print the bytes; the child's side of ``session_memory``."""
    work: _Job = pickle.loads(Path(job).read_bytes())  # noqa: S301  (our own file)
    try:
        before = _private_bytes()
        session = Session(work.model, work.device, work.options)
        session.run(work.batch)
        after = _private_bytes()
    except (SlipstreamError, OSError):
        sys.exit(1)
    sys.stdout.write(str(after - before))


def _private_bytes() -> int:
    """Return the anonymous memory of this process: what only it uses and no file backs.

    Raises:
        OSError: If the system does not tell.
    """
    for line in _SMAPS.read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_SMAPS} does not tell the anonymous memory")
