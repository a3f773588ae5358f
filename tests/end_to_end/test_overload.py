"""Full queues, missed deadlines and clients that leave, on a model that takes tens of milliseconds a row."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.process import Server

QUEUE_ROWS = 24
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]}).encode()


@pytest.fixture
def server(slow_repository: Path) -> Iterator[Server]:
    with Server(slow_repository, "--cpu-instances", "1", "--max-queue-rows", str(QUEUE_ROWS)) as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as pool:
        yield pool


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)) as client:
        yield client


Post = Callable[..., httpx.Response]


@pytest.fixture
def post(server: Server, client: httpx.Client) -> Post:
    def post(model: str = "slow", **headers: str) -> httpx.Response:
        return client.post(f"{server.url}/v2/models/{model}/infer", content=BODY, headers=headers)

    return post


def occupy(server: Server, threads: ThreadPoolExecutor, post: Post, model: str) -> list[Future[httpx.Response]]:
    """Make one request run and many of them wait; return when that is so."""
    occupying = [threads.submit(post, model) for _ in range(QUEUE_ROWS - 2)]
    server.wait_for_metric(QUEUE_ROWS - 8, "slipstream_queue_rows", model=model)
    return occupying


def test_full_queue_is_refused_and_says_when_to_retry(server: Server, threads: ThreadPoolExecutor, post: Post) -> None:
    answers = list(threads.map(lambda _: post(), range(60)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert answer.json()["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    assert server.metric("slipstream_requests_total", model="slow", code="queue_full") == len(refused)
    assert post().status_code == 200


def test_deadline_that_cannot_be_met_is_refused_at_once(post: Post) -> None:
    answer = post(**{"slipstream-timeout-ms": "5"})  # a run takes 20 ms, says the latency table
    assert (answer.status_code, answer.json()["code"]) == (429, "deadline_unmeetable")
    assert int(answer.headers["retry-after"]) >= 1


def test_deadline_that_passes_in_the_queue_is_a_gateway_timeout(
    server: Server, threads: ThreadPoolExecutor, post: Post
) -> None:
    # Its latency table promises 1 ms a row, which it does not hold.
    occupying = occupy(server, threads, partial(post, **{"slipstream-priority": "1"}), "hasty")
    answer = post("hasty", **{"slipstream-timeout-ms": "150"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_expired")
    assert server.metric("slipstream_requests_total", model="hasty", code="deadline_expired") == 1
    assert {future.result().status_code for future in occupying} == {200}


def test_client_that_leaves_frees_its_place(server: Server, threads: ThreadPoolExecutor, post: Post) -> None:
    occupying = occupy(server, threads, post, "slow")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
        )
        server.metric("slipstream_queue_rows")  # answered after the loop has read the request above
    server.wait_for_metric(1, "slipstream_requests_total", model="slow", code="cancelled")
    assert {future.result().status_code for future in occupying} == {200}
    assert server.metric("slipstream_requests_total", model="slow", code="ok") == len(occupying)


CLIENT = """
import sys, threading, urllib.request
def post():
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], sys.argv[2].encode()))
for _ in range(6):
    threading.Thread(target=post).start()
"""


def test_killed_client_costs_nobody_anything(server: Server, post: Post) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, f"{server.url}/v2/models/slow/infer", BODY.decode()])
    server.wait_for_metric(2, "slipstream_queue_rows", model="slow")
    client.kill()
    client.wait()
    server.wait_for_metric(1, "slipstream_requests_total", model="slow", code="cancelled")
    assert post().status_code == 200
    assert server.metric("slipstream_requests_total", model="slow", code="ok") < 7
    assert "ERROR" not in server.text


def test_half_sent_request_is_dropped_in_silence(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    server.wait_for_metric(1, "slipstream_requests_total", model="slow", code="cancelled")
    assert "ERROR" not in server.text
