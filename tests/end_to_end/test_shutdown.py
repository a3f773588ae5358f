"""SIGTERM under load, and every other way to end."""

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.process import TIMEOUT_S, Server

MLP = json.dumps({"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}]}).encode()
SLOW = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]}).encode()


class Poster(threading.Thread):
    """A client that posts one request after the other until nobody listens any more.

    Attributes:
        answered: Requests that got 200.
        lost: What happened to requests that a connection was made for, and that did not get 200.
    """

    def __init__(self, port: int, model: str, body: bytes, enough: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.answered, self.closing, self.lost = 0, 0, list[str]()
        self._port, self._path, self._body, self._enough = port, f"/v2/models/{model}/infer", body, enough

    def run(self) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)) as connection:
            self._post_on(connection)

    def _post_on(self, connection: http.client.HTTPConnection) -> None:
        while True:
            if connection.sock is None:
                try:
                    connection.connect()
                except OSError:
                    return  # nobody listens: this request was never accepted
            try:
                connection.request("POST", self._path, self._body)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as exc:
                self.lost.append(repr(exc))
                return
            if answer.status != 200:
                self.lost.append(str(answer.status))
            self.answered += 1
            self.closing += answer.getheader("connection") == "close"
            self._enough.release()


def run_and_terminate(server: Server, model: str, body: bytes, clients: int, requests: int) -> list[Poster]:
    """Terminate the server while clients post; return the clients when all have ended."""
    enough = threading.Semaphore(0)
    posters = [Poster(server.port, model, body, enough) for _ in range(clients)]
    for poster in posters:
        poster.start()
    for _ in range(requests):
        assert enough.acquire(timeout=TIMEOUT_S)
    server.terminate()
    for poster in posters:
        poster.join(TIMEOUT_S)
        assert not poster.is_alive(), "a client hangs"
    return posters


@pytest.mark.parametrize("grace_s", ["0", "0.3"])
def test_sigterm_under_load_loses_nothing(repository: Path, grace_s: str) -> None:
    with Server(repository, "--shutdown-grace-s", grace_s) as server:
        posters = run_and_terminate(server, "mlp", MLP, clients=16, requests=500)
        assert server.wait() == 0, server.text
    assert [poster.lost for poster in posters if poster.lost] == []
    assert sum(poster.answered for poster in posters) >= 500
    assert "ERROR" not in server.text


def test_sigterm_finishes_what_is_queued(slow_repository: Path) -> None:
    with Server(slow_repository, "--cpu-instances", "1", "--shutdown-grace-s", "0") as server:
        posters = run_and_terminate(server, "slow", SLOW, clients=12, requests=1)
        assert server.wait() == 0, server.text
    assert [poster.lost for poster in posters if poster.lost] == []
    assert sum(poster.closing for poster in posters) >= 11


def test_draining_server_is_not_ready_but_serves_and_closes_connections(repository: Path) -> None:
    with Server(repository, "--shutdown-grace-s", "30") as server, httpx.Client(base_url=server.url) as client:
        assert "connection" not in client.get("/v2/health/live").headers
        server.terminate()
        server.wait_for("stopping: not ready")
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "draining")
        assert ready.headers["connection"] == "close"
        assert client.get("/v2/health/live").status_code == 200
        infer = client.post("/v2/models/mlp/infer", content=MLP)
        assert (infer.status_code, infer.headers["connection"]) == (200, "close")


def test_second_signal_ends_at_once(slow_repository: Path) -> None:
    with Server(slow_repository, "--shutdown-grace-s", "600") as server:
        server.terminate(signal.SIGINT)
        server.wait_for("stopping: not ready")
        server.terminate(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM


def test_sigint_ends_cleanly(repository: Path) -> None:
    with Server(repository, "--shutdown-grace-s", "0") as server:
        server.terminate(signal.SIGINT)
        assert server.wait() == 0
        assert "Traceback" not in server.text


@pytest.fixture
def idle_connection() -> Iterator[socket.socket]:
    with socket.socket() as connection:
        yield connection


def test_idle_connection_does_not_delay_the_end(repository: Path, idle_connection: socket.socket) -> None:
    with Server(repository, "--shutdown-grace-s", "0", "--drain-timeout-s", "3600") as server:
        idle_connection.connect(("127.0.0.1", server.port))
        server.terminate()
        assert server.wait() == 0
        assert idle_connection.recv(1) == b""


def test_request_that_outlasts_the_drain_timeout_is_told(slow_repository: Path) -> None:
    options = ("--cpu-instances", "1", "--shutdown-grace-s", "0", "--drain-timeout-s", "0.1")
    with (
        Server(slow_repository, *options) as server,
        httpx.Client(timeout=60) as client,
        ThreadPoolExecutor(40) as pool,
    ):
        url = f"{server.url}/v2/models/slow/infer"
        answers = [pool.submit(client.post, url, content=SLOW) for _ in range(40)]
        server.wait_for_metric(20, "slipstream_queue_rows", model="slow")
        server.terminate()
        errors = [answer.exception() for answer in answers]
        assert server.wait() == 0
    assert {type(error) for error in errors} <= {type(None), httpx.ConnectError}  # those came after the socket closed
    codes = {answer.result().status_code for answer, error in zip(answers, errors, strict=True) if error is None}
    assert codes == {200, 503}
    assert "did not finish in 0.1 s" in server.text
