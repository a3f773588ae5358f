"""Starts peers, each in a process of its own, and turns what they answer into something that can be opened."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.peers.__main__ import FOLDER as OLIVE_FOLDER
from server.artifact import SessionOptions
from server.host import HostFacts

ROOT = Path(__file__).resolve().parents[2]
ORT_DEFAULTS = SessionOptions(intra_op_threads=0, spinning=True, graph_level="all")
"""How a user opens a model who sets nothing."""

_LEVELS = {0: "disable", 1: "basic", 2: "extended", 99: "all"}
_SPINNING = "session.intra_op.allow_spinning"
# Olive sends a report of its use unless both are set; nothing may be looked up on a hub.
_QUIET = {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


class PeerFailed(Exception):
    """A peer made no model; the message is its reason."""


class Peer(msgspec.Struct, frozen=True):
    """A way to quantize.

    Attributes:
        name: As in the table.
        command: What is run, without the two arguments of ``protocol.serve``.
        missing: What to do when the first word of the command is not there.
    """

    name: str
    command: tuple[str, ...]
    missing: str = ""


class PeerModel(msgspec.Struct, frozen=True):
    """What a peer made.

    Attributes:
        model: The ONNX file.
        options: How the peer opens it.
        notes: What the peer did.
        wall_s: Seconds that it took.
        cpu_s: CPU seconds of its processes.
    """

    model: Path
    options: SessionOptions
    notes: tuple[str, ...]
    wall_s: float
    cpu_s: float


class _Answer(msgspec.Struct, frozen=True):
    model: str
    session: dict[str, object] = {}
    notes: list[str] = []


PEERS = {
    "ort": Peer("ORT recipe", (sys.executable, "-m", "benchmarks.peers.ort_recipe")),
    "olive": Peer(
        "Olive",
        (str(ROOT / OLIVE_FOLDER / "bin" / "python"), "-m", "benchmarks.peers.olive_route"),
        "Olive is not installed; run: python -m benchmarks.peers",
    ),
}


def ask_peer(peer: Peer, model: Path, data: Path, host: HostFacts, output: Path, timeout_s: float) -> PeerModel:
    """Let a peer quantize a model.

    Args:
        peer: Who.
        model: The original.
        data: Calibration samples, as DATA.npz.
        host: This machine.
        output: A folder for what it makes; made if missing.
        timeout_s: Seconds after which it is ended.

    Raises:
        PeerFailed: If it is not installed, fails, takes too long, or answers with nothing usable.
    """
    if not Path(peer.command[0]).exists():
        raise PeerFailed(peer.missing or f"{peer.command[0]} is not there")
    output.mkdir(parents=True, exist_ok=True)
    request = {
        "model": str(model.resolve()),
        "data": str(data.resolve()),
        "output": str(output.resolve()),
        "cores": host.cores,
        "int8_dot": host.has_int8_dot,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_bytes(msgspec.json.encode(request))
        start_s, cpu_s = time.monotonic(), children_cpu_s()
        _run([*peer.command, str(asked), str(answered)], output / "log.txt", timeout_s)
        wall_s, cpu_s = time.monotonic() - start_s, children_cpu_s() - cpu_s
        try:
            answer = msgspec.json.decode(answered.read_bytes(), type=_Answer)
        except (OSError, msgspec.MsgspecError) as exc:
            raise PeerFailed(f"no usable answer: {exc}") from exc
    options, left_out = options_of(answer.session)
    return PeerModel(Path(answer.model), options, (*answer.notes, *left_out), wall_s, cpu_s)


def children_cpu_s() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def options_of(session: Mapping[str, object]) -> tuple[SessionOptions, list[str]]:
    """Return the options that a peer's session settings mean, and a note for each setting that none of ours means.

    Args:
        session: As Olive writes ``session_options``; empty means onnxruntime's defaults.
    """
    options, notes = ORT_DEFAULTS, []
    for key, value in session.items():
        if key == "intra_op_num_threads" and isinstance(value, int):
            options = msgspec.structs.replace(options, intra_op_threads=value)
        elif key == "graph_optimization_level" and value in _LEVELS:
            options = msgspec.structs.replace(options, graph_level=_LEVELS[int(str(value))])
        elif key == "extra_session_config" and isinstance(value, dict):
            config = {str(name): str(setting) for name, setting in value.items()}
            spinning = config.pop(_SPINNING, "1") == "1"
            options = msgspec.structs.replace(options, spinning=spinning, config=config)
        elif (key, value) not in (("inter_op_num_threads", 1), ("execution_mode", 0)):
            notes.append(f"left out: {key} = {value}")
    return options, notes


def _run(command: list[str], log: Path, timeout_s: float) -> None:
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **_QUIET}, stdout=file, stderr=file, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as exc:
            raise PeerFailed(f"not finished after {timeout_s:.0f} s") from exc
        except OSError as exc:
            raise PeerFailed(f"{command[0]} does not start: {exc.strerror}") from exc
    if done.returncode != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise PeerFailed(f"exit code {done.returncode}: {lines[-1][:300] if lines else 'no message'}")
