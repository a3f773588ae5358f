"""A rolling update behind a proxy, as a cluster does it: each old process leaves when a new one is ready.

The proxy is a real haproxy that asks every process for its readiness, and never sends a request twice.
"""

import json
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from deploy.debian import CommandUnavailable, command
from tests import models
from tests.artifacts import write_artifact
from tests.end_to_end.process import Server

CLIENTS, SIZE = 8, 64
BODY = {"inputs": [{"name": "x", "shape": [1, SIZE], "datatype": "FP32", "data": [0.5] * SIZE}]}
# The proxy asks every 100 ms and believes two bad answers: less than a server waits before it closes its socket.
GRACE_S = "1.0"
CONFIGURATION = """
global
    maxconn 200
    stats socket {folder}/haproxy.sock mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    retries 0
frontend front
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    balance roundrobin
    option httpchk GET /v2/health/ready
    default-server check inter 100ms fall 2 rise 1 init-addr 127.0.0.1 disabled
    server s0 127.0.0.1:1
    server s1 127.0.0.1:1
    server s2 127.0.0.1:1
    server s3 127.0.0.1:1
"""


class Proxy:
    """haproxy with four places for servers."""

    def __init__(self, folder: Path, port: int) -> None:
        try:
            path = command(["haproxy"], "haproxy")
        except CommandUnavailable as exc:
            pytest.skip(str(exc))
        self.url, self._socket = f"http://127.0.0.1:{port}", folder / "haproxy.sock"
        file = folder / "haproxy.cfg"
        file.write_text(CONFIGURATION.format(folder=folder, port=port))
        self._process = subprocess.Popen([path, "-f", file, "-db"], stderr=subprocess.PIPE, text=True)
        while not self._socket.exists():
            assert self._process.poll() is None, self._process.communicate()[1]
            time.sleep(0.01)

    def add(self, place: int, server: Server) -> None:
        """Let a server take its share once it is ready."""
        self._tell(f"set server servers/s{place} addr 127.0.0.1 port {server.port}")
        self._tell(f"set server servers/s{place} check-port {server.port}")
        self._tell(f"enable server servers/s{place}")
        self._wait(place, "UP")

    def wait_until_gone(self, place: int) -> None:
        """Wait until a server gets no requests any more."""
        self._wait(place, "DOWN")

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)

    def _wait(self, place: int, status: str) -> None:
        until_s = time.monotonic() + 20
        while f"servers,s{place}" not in (seen := self._states()) or status not in seen[f"servers,s{place}"]:
            assert time.monotonic() < until_s, f"s{place} is not {status}: {seen}"
            time.sleep(0.02)

    def _states(self) -> dict[str, str]:
        rows = [line.split(",") for line in self._tell("show stat").splitlines() if line and not line.startswith("#")]
        return {f"{row[0]},{row[1]}": row[17] for row in rows}

    def _tell(self, text: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._socket))
            connection.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    made = Proxy(tmp_path, port)
    yield made
    made.close()


class Clients:
    """Ask in closed loops; half of them on one connection, half on a new one for each request.

    Attributes:
        seen: Status and version, or the error -> how often.
    """

    def __init__(self, url: str) -> None:
        self.seen: Counter[str] = Counter()
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number % 2 == 0,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, keeps_connection: bool) -> None:
        session = httpx.Client(timeout=20)
        while not self._stop.is_set():
            if not keeps_connection:
                session.close()
                session = httpx.Client(timeout=20)
            self.seen[self._ask(session)] += 1
        session.close()

    def _ask(self, session: httpx.Client) -> str:
        try:
            answer = session.post(f"{self._url}/v2/models/mlp/infer", json=BODY)
            return f"{answer.status_code} {json.loads(answer.content).get('model_version', answer.text)}"
        except (httpx.HTTPError, ValueError) as exc:
            return f"{type(exc).__name__}: {exc}"


def test_no_request_fails_while_every_process_is_replaced(proxy: Proxy, tmp_path: Path, mlp: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_artifact(old, "mlp", "1", {"fp32": mlp})
    write_artifact(new, "mlp", "2", {"fp32": models.save_mlp(tmp_path / "2.onnx", seed=2)})
    options = ("--shutdown-grace-s", GRACE_S)
    with ExitStack() as stack:
        running = [stack.enter_context(Server(old, *options)) for _ in range(2)]
        for place, server in enumerate(running):
            proxy.add(place, server)
        with Clients(proxy.url) as clients:
            time.sleep(0.5)
            for place, leaving in enumerate(running):
                proxy.add(2 + place, stack.enter_context(Server(new, *options)))
                leaving.terminate()
                proxy.wait_until_gone(place)
                assert leaving.wait() == 0
            time.sleep(0.5)
    assert clients.seen.keys() == {"200 1", "200 2"}, clients.seen
    assert min(clients.seen.values()) > 50
