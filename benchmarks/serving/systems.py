"""The servers that are compared: how each is started, tuned and asked."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.servers import (
    RunningServer,
    ServerFailed,
    ask,
    free_port,
    plain_command,
    running,
    slipstream_command,
)
from benchmarks.serving.dialects import (
    PLAIN_BYTES,
    PLAIN_JSON,
    PROTOCOL_BINARY,
    PROTOCOL_JSON,
    STACKED_JSON,
    Dialect,
)
from benchmarks.serving.install import python_of
from benchmarks.serving.material import Material
from benchmarks.serving.peers.setup import VARIABLE, Setup
from benchmarks.workloads import Workload, check_answers
from server.cores import usable_cores

MAX_ROWS = 32
STOP_TIMEOUT_S = 5.0
SHARED_MEMORY = Path("/dev/shm")
TOLERANCE = 0.05
"""Relative error of the first answer that counts as right; rows that differ lie further apart."""


class Tuning(msgspec.Struct, frozen=True):
    """Settings of a peer for one model.

    Attributes:
        window_ms: How long a batch may wait to be filled.
        instances: Sessions; 0 means one per core. The cores are divided among them.
    """

    window_ms: float = 0.0
    instances: int = 0


class System(msgspec.Struct, frozen=True):
    """One line of the comparison.

    Attributes:
        name: How tables name it.
        dialects: What it may be asked with.
        about: What a reader of the tables should know.
        peer: Name of its environment; empty for one that runs in ours.
        module: Of ``benchmarks.serving.peers``; empty for those that have another way to start.
        optimized: Whether it serves the optimized repository instead of the original file.
        deadline: How it learns of a deadline: ``header`` or ``parameter`` of a request, ``setup``, or not at all.
        rounds: In how many rounds it is started; 0 means all.
        answers: Whether it runs the model at all.
        tuning: Model -> its settings; the entry ``""`` is for the rest.
        environment: Variables of its processes.
    """

    name: str
    dialects: tuple[Dialect, ...]
    about: str
    peer: str = ""
    module: str = ""
    optimized: bool = False
    deadline: str = ""
    rounds: int = 0
    answers: bool = True
    tuning: Mapping[str, Tuning] = {}
    environment: Mapping[str, str] = {}

    @property
    def missing(self) -> str:
        """Why it cannot be started here; empty if it can."""
        if self.peer and not python_of(self.peer).exists():
            return f"not installed; run: python -m benchmarks.serving.install {self.peer}"
        return ""

    def tuned(self, model: str) -> Tuning:
        """Return its settings for a model."""
        return self.tuning.get(model, self.tuning.get("", Tuning()))


SLIPSTREAM, OPTIMIZED, PLAIN, BARE, TRITON = "slipstream", "slipstream optimized", "plain FastAPI", "bare", "Triton"
OURS = (SLIPSTREAM, OPTIMIZED)
# Windows and instances are the best that ``python -m benchmarks.serving.windows`` found: see docs/benchmarks.md.
SYSTEMS = (
    System(SLIPSTREAM, (PROTOCOL_JSON, PROTOCOL_BINARY), "the original file, defaults", deadline="header"),
    System(
        OPTIMIZED,
        (PROTOCOL_JSON, PROTOCOL_BINARY),
        "what slipstream optimize made of it, defaults",
        optimized=True,
        deadline="header",
    ),
    System(
        BARE,
        (PROTOCOL_JSON, PROTOCOL_BINARY),
        "uvicorn and an ASGI application that reads the body and answers fixed bytes: no model, the floor of HTTP",
        module="bare",
        answers=False,
    ),
    System(PLAIN, (PLAIN_JSON,), "a handler with a pydantic body, 40 threads, one session, no batches"),
    System(
        "LitServe",
        (PLAIN_JSON,),
        "a worker per core, ZeroMQ, JSON only",
        peer="litserve",
        module="litserve_server",
        deadline="setup",
        tuning={"": Tuning(window_ms=1.0)},
    ),
    System(
        "MLServer",
        (PROTOCOL_JSON,),
        "one process with a thread per core, JSON only",
        peer="mlserver",
        module="mlserver_server",
        tuning={"": Tuning(window_ms=1.0), "efficientnet-lite0": Tuning()},
    ),
    System(
        "BentoML",
        (STACKED_JSON,),
        "a worker per core, its own window, JSON only",
        peer="bentoml",
        module="bento_server",
        deadline="setup",
        environment={"BENTOML_DO_NOT_TRACK": "True"},
    ),
    System(
        "Ray Serve",
        (PLAIN_JSON, PLAIN_BYTES),
        "a replica per core, one for small models; bodies of bytes if the handler reads them; in one round only",
        peer="ray",
        module="ray_server",
        deadline="setup",
        rounds=1,
        tuning={"tiny": Tuning(instances=1), "wide": Tuning(instances=1)},
        environment={"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    ),
    System(
        TRITON,
        (PROTOCOL_JSON, PROTOCOL_BINARY),
        "its Python backend with an instance per core",
        peer="triton",
        module="triton_server",
        deadline="parameter",
        tuning={"efficientnet-lite0": Tuning(window_ms=1.0)},
    ),
)


@contextlib.contextmanager
def started(system: System, material: Material, deadline_ms: float = 0.0) -> Iterator[RunningServer]:
    """Run a system with one model while the context is open; its ``start_s`` ends with the first right answer.

    Args:
        system: Which.
        material: What it serves.
        deadline_ms: For a system that is told at its start; 0 if nothing is to be refused.

    Raises:
        ServerFailed: If it does not answer the first row in time, or gives a wrong answer.
    """
    workload = workload_of(system, material)
    port, variables = free_port(), None
    with tempfile.TemporaryDirectory(prefix="peer", ignore_cleanup_errors=True) as folder:
        if system.module:
            setup = setup_of(system, material, port, folder, deadline_ms)
            save_answers(workload, setup.workspace)
            command, variables = peer_command(system, setup)
        elif system.name == PLAIN:
            command = plain_command(workload, port)
        else:
            command = slipstream_command(workload.repository, port)
        ready = partial(is_right, system, workload, system.dialects[0], port)
        try:
            with running(command, port, ready, variables, STOP_TIMEOUT_S) as server:
                yield server
        finally:
            # Triton's, when it is killed before it has closed everything.
            for left in SHARED_MEMORY.glob(f"{Path(folder).name}*"):
                left.unlink()


def setup_of(system: System, material: Material, port: int, folder: str, deadline_ms: float) -> Setup:
    """Return what a peer is told."""
    workload, tuning, cores = workload_of(system, material), system.tuned(material.name), usable_cores()
    instances = tuning.instances or cores
    return Setup(
        model=str(workload.model),
        name=workload.name,
        port=port,
        folder=folder,
        instances=instances,
        threads=max(1, cores // instances),
        window_ms=tuning.window_ms,
        max_rows=MAX_ROWS,
        deadline_ms=deadline_ms if system.deadline == "setup" else 0.0,
    )


def workload_of(system: System, material: Material) -> Workload:
    """Return what a system serves.

    Raises:
        ServerFailed: If the model was not optimized.
    """
    if not system.optimized:
        return material.workload
    if material.optimized is None:
        raise ServerFailed(f"{material.name} was not optimized")
    return material.optimized


def is_right(system: System, workload: Workload, dialect: Dialect, port: int) -> bool:
    """Whether the answer to the first row is there, and right where the model was run.

    Raises:
        ServerFailed: If the answer is another one.
    """
    answer = ask(port, dialect.request(workload, workload.rows[0]))
    if answer is None or answer.status != 200:
        return False
    if not system.answers:
        return True
    check = check_answers([answer], workload.expected, dialect.read)
    if check.wrong or check.worst_error > TOLERANCE:
        raise ServerFailed(f"the first answer is wrong, by {check.worst_error:.2g}: {answer.body[:200]!r}")
    return True


def peer_command(system: System, setup: Setup) -> tuple[list[str], dict[str, str]]:
    """Return the command of a peer and its variables."""
    python = str(python_of(system.peer)) if system.peer else sys.executable
    variables = {**system.environment, VARIABLE: json.dumps(asdict(setup)), "OMP_NUM_THREADS": "1"}
    if system.peer:
        variables["PATH"] = f"{Path(python).parent}:/usr/bin:/bin"
        variables["HOME"] = setup.folder  # some leave files there
    return [python, "-m", f"benchmarks.serving.peers.{system.module}"], variables


def save_answers(workload: Workload, folder: Path) -> None:
    """Write bodies of the size of the right answer, for a server that has no model."""
    outputs = workload.expected[0]
    data = [{"name": name, "datatype": "FP32", "shape": list(array.shape)} for name, array in outputs.items()]
    lists = [{**entry, "data": array.ravel().tolist()} for entry, array in zip(data, outputs.values(), strict=True)]
    body = json.dumps({"model_name": workload.name, "model_version": "1", "outputs": lists})
    (folder / "answer.json").write_text(body, encoding="utf-8")
    head = json.dumps({"model_name": workload.name, "model_version": "1", "outputs": data}).encode()
    tensors = b"".join(np.ascontiguousarray(array).tobytes() for array in outputs.values())
    (folder / "answer.binary").write_bytes(head + tensors)
