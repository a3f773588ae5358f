"""What the server still holds of connections that have ended and requests that were answered, counted in it."""

import gzip
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import HOST
from benchmarks.soak.counting import Counts
from benchmarks.soak.mix import save_models
from benchmarks.soak.observed import Observed, observed
from benchmarks.soak.verdict import always_held
from benchmarks.workloads import json_request, save_tiny

CONNECTIONS = 10
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
OF_CONNECTIONS = ("connection.Connection", "Exchange", "RequestResponseCycle", "TCPTransport")


@pytest.fixture(scope="module")
def request_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    repository = tmp_path_factory.mktemp("models")
    workload = save_tiny(repository)
    return repository, json_request(workload, workload.rows[0])


@pytest.fixture
def served(request_bytes: tuple[Path, bytes], tmp_path: Path) -> Iterator[Observed]:
    with observed(request_bytes[0], tmp_path, {}) as server:
        yield server


def counted(server: Observed) -> Counts:
    """Count after the server has seen connections close: it answers one that came after them."""
    server.metric("slipstream_queue_rows")
    (counts,) = always_held([server.counts() for _ in range(3)]).values()
    return counts


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}


def of_connections(server: Observed) -> dict[str, int]:
    counts = counted(server)
    return {name: n for name, n in counts.objects.items() if name.endswith(OF_CONNECTIONS)}


def ask(connection: socket.socket, request: bytes) -> bytes:
    """Return the head of the answer, once all of it has come."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 200")
    return head


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
def test_connection_that_ends_is_forgotten_at_once(
    served: Observed, request_bytes: tuple[Path, bytes], resets: bool
) -> None:
    before = of_connections(served)
    for _ in range(CONNECTIONS):
        with socket.create_connection((HOST, served.port)) as connection:
            ask(connection, request_bytes[1])
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    assert grown(before, of_connections(served)) == {}


def test_connection_that_was_looked_at_is_forgotten_too(served: Observed, request_bytes: tuple[Path, bytes]) -> None:
    def date(connection: socket.socket) -> bytes:
        return ask(connection, request_bytes[1]).lower().partition(b"\r\ndate: ")[2].partition(b"\r\n")[0]

    before = of_connections(served)
    with socket.create_connection((HOST, served.port)) as connection:
        first = date(connection)
        while date(connection) == first:  # renewed together with the look for connections that are idle too long
            pass
    assert grown(before, of_connections(served)) == {}


def test_task_of_an_answer_that_was_read_slowly_is_forgotten(tmp_path: Path) -> None:
    items = save_models(tmp_path / "models")
    wide = next(item for item in items if b"/wide/" in item.start and item.tensor)
    body = gzip.compress(wide.body + wide.tensor)  # what is compressed is answered by a task
    request = b"%bContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (wide.start, len(body), body)
    folder = tmp_path / "observed"
    folder.mkdir()
    with observed(tmp_path / "models", folder, {}) as server:
        before = counted(server).objects["_asyncio.Task"]
        for _ in range(CONNECTIONS):
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect((HOST, server.port))
                ask(connection, request)
        assert counted(server).objects["_asyncio.Task"] <= before
