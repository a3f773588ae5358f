"""Starting and stopping the servers that are measured, and aiming the load generator at them."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from benchmarks.cpu import tree_of
from benchmarks.generator import Load, Outcome, SeenAnswer
from benchmarks.open_loop import OpenLoad, OpenOutcome
from benchmarks.workloads import Workload

HOST = "127.0.0.1"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
_STEP_S = 0.02


class ServerFailed(Exception):
    """A server did not become ready."""


class RunningServer(msgspec.Struct, frozen=True):
    """A server under measurement.

    Attributes:
        port: TCP port on ``HOST``.
        pid: Its first process.
        start_s: Seconds from its spawn until it was ready.
    """

    port: int
    pid: int
    start_s: float


@contextlib.contextmanager
def slipstream(repository: Path, *options: str) -> Iterator[RunningServer]:
    """Serve a repository with the installed command, and further options of it, while the context is open."""
    port = free_port()
    command = slipstream_command(repository, port, *options)
    with running(command, port, lambda: is_ready(port, "/v2/health/ready")) as server:
        yield server


@contextlib.contextmanager
def plain_fastapi(workload: Workload) -> Iterator[RunningServer]:
    """Serve a workload's model with the plain handler while the context is open."""
    port = free_port()
    with running(plain_command(workload, port), port, lambda: is_ready(port, "/openapi.json")) as server:
        yield server


def slipstream_command(repository: Path, port: int, *options: str) -> list[str]:
    """Return the installed command that serves a repository, with further options of it."""
    command = [sys.executable, "-m", "slipstream", "serve", str(repository), "--gpu", "off"]
    return [*command, "--host", HOST, "--port", str(port), *options]


def plain_command(workload: Workload, port: int) -> list[str]:
    """Return what serves a workload's model with the plain handler."""
    options = msgspec.json.encode(workload.options).decode()
    return [sys.executable, "-m", "benchmarks.plain_fastapi", str(workload.model), str(port), options]


def offer(server: RunningServer, requests: list[bytes], connections: int, seconds: float, warm_up_s: float) -> Outcome:
    """Run the load generator in its own process.

    Raises:
        ServerFailed: If the server closed a connection, answered nothing, or the generator failed otherwise.
    """
    load = Load(HOST, server.port, server.pid, connections, seconds, warm_up_s, requests)
    decoded = msgspec.json.decode(_generated("benchmarks.generator", msgspec.json.encode(load)), type=Outcome)
    if not decoded.latencies_ms:
        raise ServerFailed(f"no request was answered in {seconds:g} s")
    return decoded


def offer_open(server: RunningServer, load: OpenLoad) -> OpenOutcome:
    """Run the open-loop generator in its own process.

    Args:
        server: Whom to ask.
        load: What to send; its address and process are replaced by the server's.

    Raises:
        ServerFailed: If the generator failed.
    """
    aimed = msgspec.structs.replace(load, host=HOST, port=server.port, server_pid=server.pid)
    return msgspec.json.decode(_generated("benchmarks.open_loop", msgspec.json.encode(aimed)), type=OpenOutcome)


def _generated(module: str, load: bytes) -> bytes:
    """Run a load generator; return what it writes. Into a file: megabytes through a pipe came back cut short."""
    with tempfile.TemporaryFile() as written:
        command = [sys.executable, "-m", module]
        done = subprocess.run(command, input=load, stdout=written, stderr=subprocess.PIPE, check=False)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ServerFailed(f"the load generator ended with {done.returncode}: {' '.join(said)}")
        written.seek(0)
        return written.read()


def ask(port: int, request: bytes, timeout_s: float = 10.0) -> SeenAnswer | None:
    """Send one complete request on a connection of its own.

    Returns:
        Its answer, as that of request 0; ``None`` if there was none in time.
    """
    try:
        with socket.create_connection((HOST, port), timeout=timeout_s) as connection:
            connection.sendall(request)
            with http.client.HTTPResponse(connection) as response:
                response.begin()
                body = response.read()
                length = response.getheader("Inference-Header-Content-Length")
                return SeenAnswer(0, response.status, int(length) if length else None, body, 1)
    except (OSError, http.client.HTTPException):
        return None


def free_port() -> int:
    """Return a TCP port that nothing uses now."""
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: list[str],
    port: int,
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    stop_timeout_s: float = STOP_TIMEOUT_S,
) -> Iterator[RunningServer]:
    """Run a server while the context is open; at its end, no process of its tree is left.

    Args:
        command: What to run.
        port: Where it will listen.
        ready: Whether it can be used; asked again and again.
        environment: Variables beside those of this process.
        stop_timeout_s: How long it may take to stop before it is killed.

    Raises:
        ServerFailed: If it ends or is not ready in time; the message has the end of its log.
    """
    with tempfile.TemporaryFile() as log:
        began_s = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        try:
            while not ready():
                if process.poll() is not None or time.monotonic() > began_s + START_TIMEOUT_S:
                    log.seek(0)
                    text = log.read().decode(errors="replace")[-2000:]
                    raise ServerFailed(f"{' '.join(command)} did not get ready:\n{text}")
                time.sleep(_STEP_S)
            yield RunningServer(port, process.pid, time.monotonic() - began_s)
        finally:
            _stop(process, stop_timeout_s)


def _stop(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Ask a server to stop, and kill what is left of its tree."""
    tree = tree_of(process.pid)
    process.terminate()
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        tree += tree_of(process.pid)
        process.kill()
        process.wait()
    for pid in tree[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
