"""Starting and stopping the servers that are measured, and aiming the load generator at them."""

import contextlib
import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.generator import Load, Outcome
from benchmarks.workloads import Workload

HOST = "127.0.0.1"
START_TIMEOUT_S = 120
_STEP_S = 0.05


class ServerFailed(Exception):
    """A server did not become ready."""


class RunningServer(msgspec.Struct, frozen=True):
    """A server under measurement."""

    port: int
    pid: int


@contextlib.contextmanager
def slipstream(repository: Path, *options: str) -> Iterator[RunningServer]:
    """Serve a repository with the installed command, and further options of it, while the context is open."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "slipstream"), "serve", str(repository), "--gpu", "off"]
    with _running([*command, "--host", HOST, "--port", str(port), *options], port, "/v2/health/ready") as server:
        yield server


@contextlib.contextmanager
def plain_fastapi(workload: Workload) -> Iterator[RunningServer]:
    """Serve a workload's model with the plain handler while the context is open."""
    port = free_port()
    options = msgspec.json.encode(workload.options).decode()
    command = [sys.executable, "-m", "benchmarks.plain_fastapi", str(workload.model), str(port), options]
    with _running(command, port, "/openapi.json") as server:
        yield server


def offer(server: RunningServer, requests: list[bytes], connections: int, seconds: float, warm_up_s: float) -> Outcome:
    """Run the load generator in its own process.

    Raises:
        ServerFailed: If the server closed a connection, answered nothing, or the generator failed otherwise.
    """
    load = Load(HOST, server.port, server.pid, connections, seconds, warm_up_s, requests)
    command = [sys.executable, "-m", "benchmarks.generator"]
    outcome = subprocess.run(command, input=msgspec.json.encode(load), capture_output=True, check=False)
    if outcome.returncode != 0:
        raise ServerFailed(f"the load generator failed: {outcome.stderr.decode().strip().splitlines()[-1]}")
    decoded = msgspec.json.decode(outcome.stdout, type=Outcome)
    if not decoded.latencies_ms:
        raise ServerFailed(f"no request was answered in {seconds:g} s")
    return decoded


def free_port() -> int:
    """Return a TCP port that nothing uses now."""
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def _running(command: list[str], port: int, ready_path: str) -> Iterator[RunningServer]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not is_ready(port, ready_path):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise ServerFailed(f"{' '.join(command)} did not get ready:\n{log.read().decode()[-2000:]}")
                time.sleep(_STEP_S)
            yield RunningServer(port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_ready(port: int, path: str) -> bool:
    """Whether a path answers with status 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
