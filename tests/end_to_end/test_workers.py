"""Several front ends and one engine: the same answers as one process, and what is lost when a part of it dies."""

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from server.tensors import NUMPY_DTYPE
from tests.artifacts import write_plain
from tests.end_to_end.conftest import save_slow
from tests.end_to_end.process import TIMEOUT_S, Server
from tests.end_to_end.test_shutdown import MLP, SLOW, Poster, run_and_terminate

VARYING = {"date", "server-timing", "slipstream-queue-ms", "slipstream-compute-ms"}
ONNX_TYPES = {
    name: {"BYTES": TensorProto.STRING, "FP64": TensorProto.DOUBLE, "FP32": TensorProto.FLOAT}.get(
        name, getattr(TensorProto, name.replace("FP", "FLOAT"), 0)
    )
    for name in NUMPY_DTYPE
}


def save_echo(path: Path) -> Path:
    """One input [rows, width] of each datatype, each returned as it is."""
    nodes, inputs, outputs = [], [], []
    for name, kind in ONNX_TYPES.items():
        nodes.append(helper.make_node("Identity", [name], [f"{name}_out"]))
        inputs.append(helper.make_tensor_value_info(name, kind, ["rows", "width"]))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", kind, ["rows", "width"]))
    graph = helper.make_graph(nodes, "echo", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def with_echo(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("echo")
    for model in repository.iterdir():
        (root / model.name).symlink_to(model)
    write_plain(root, "echo", "1", save_echo(tmp_path_factory.mktemp("files") / "echo.onnx"))
    return root


@pytest.fixture(scope="module")
def one(with_echo: Path) -> Iterator[Server]:
    with Server(with_echo, "--max-body-bytes", "4000000") as server:
        yield server


@pytest.fixture(scope="module")
def many(with_echo: Path) -> Iterator[Server]:
    with Server(with_echo, "--max-body-bytes", "4000000", "--workers", "2", "--slab-bytes", "1048576") as server:
        yield server


def process_of(pid: int) -> tuple[int, str]:
    """Return the parent and the command line of a process."""
    folder = Path("/proc") / str(pid)
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1]), (folder / "cmdline").read_text()


def parts_of(server: Server) -> tuple[int, list[int]]:
    """Return the process ids of the engine and of the front ends that run now."""
    engines, front_ends = [], []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError):
                parent, command = process_of(int(folder.name))
                if parent == server.process.pid and "server.engine" in command:
                    engines.append(int(folder.name))
                elif parent == server.process.pid and "server.frontend" in command:
                    front_ends.append(int(folder.name))
    (engine,) = engines
    return engine, front_ends


def mapped(pid: int) -> int:
    """Return how many pieces of shared memory a process has mapped."""
    return (Path("/proc") / str(pid) / "maps").read_text().count("memfd:slipstream")


def open_files(pid: int) -> int:
    return len(list((Path("/proc") / str(pid) / "fd").iterdir()))


def binary(inputs: dict[str, np.ndarray], **fields: Any) -> tuple[bytes, dict[str, str]]:
    entries, data = [], []
    for name, array in inputs.items():
        datatype = next(key for key, dtype in NUMPY_DTYPE.items() if dtype == array.dtype)
        if datatype == "BYTES":
            data.append(b"".join(len(e).to_bytes(4, "little") + e for e in array.ravel()))
        else:
            data.append(array.tobytes())
        entries.append(
            {
                "name": name,
                "datatype": datatype,
                "shape": array.shape,
                "parameters": {"binary_data_size": len(data[-1])},
            }
        )
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}, **fields}).encode()
    return head + b"".join(data), {"Inference-Header-Content-Length": str(len(head))}


def echo_inputs(rows: int, width: int) -> dict[str, np.ndarray]:
    numbers = np.arange(rows * width).reshape(rows, width)
    inputs = {name: numbers.astype(dtype) for name, dtype in NUMPY_DTYPE.items() if name != "BYTES"}
    inputs["BYTES"] = np.array([b"\xc3\xa9\x01%d" % i for i in range(rows * width)], object).reshape(rows, width)
    return inputs


def same(one: Server, many: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """Ask both; return the answer after checking that it is the same to the byte."""
    with httpx.Client(timeout=TIMEOUT_S) as client:
        expected, seen = (client.request(method, f"{server.url}{path}", **options) for server in (one, many))
    assert (seen.status_code, seen.content) == (expected.status_code, expected.content)
    headers = [{k: v for k, v in answer.headers.items() if k not in VARYING} for answer in (expected, seen)]
    assert headers[0] == headers[1]
    return seen


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (40, 300), (2, 0)])
def test_every_datatype_comes_back_as_from_one_process(one: Server, many: Server, rows: int, width: int) -> None:
    inputs = echo_inputs(rows, width)
    body, headers = binary(inputs, id="x")
    answer = same(one, many, "POST", "/v2/models/echo/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    sent = body[int(headers["Inference-Header-Content-Length"]) :]
    assert answer.content[int(answer.headers.get("inference-header-content-length", len(answer.content))) :] == sent


def test_tensors_beyond_the_shared_memory_come_back(one: Server, many: Server) -> None:
    array = np.random.default_rng(0).standard_normal((14_000, 64)).astype(np.float32)  # 3.6 MB; the slab has 1 MiB
    body, headers = binary({"x": array})
    answer = same(one, many, "POST", "/v2/models/mlp/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v2"),
        ("GET", "/v2/"),
        ("GET", "/v2/health/live"),
        ("POST", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models/mlp"),
        ("GET", "/v2/models/mlp/versions/1/ready"),
        ("GET", "/v2/models/none"),
        ("GET", "/v2/models/mlp/infer"),
        ("POST", "/v2/models/none/infer"),
        ("POST", "/v2/models/mlp/versions/9/infer"),
        ("POST", "/v2/models/mlp/infer"),
        ("POST", "/v2/repository/index"),
        ("GET", "/nowhere?a=b"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_every_path_is_answered_as_by_one_process(one: Server, many: Server, method: str, path: str) -> None:
    same(one, many, method, path)


@pytest.mark.parametrize(
    "options",
    [
        {"content": MLP},
        {"content": b"{"},
        {"content": MLP.replace(b"[1, 64]", b"[1, 63]")},
        {"content": MLP.replace(b'"x"', b'"q"')},
        {"content": MLP, "headers": {"slipstream-variant": "none"}},
        {"content": MLP, "headers": {"slipstream-timeout-ms": "never"}},
        {"content": np.ones(64, np.float32).tobytes(), "headers": {"Inference-Header-Content-Length": "0"}},
        {"content": bytes(5_000_000)},
        {"content": MLP, "headers": {"content-encoding": "lzma"}},
    ],
)
def test_every_request_is_answered_as_by_one_process(one: Server, many: Server, options: dict[str, Any]) -> None:
    same(one, many, "POST", "/v2/models/mlp/infer", **options)


def test_metrics_count_what_front_ends_answer_and_refuse(repository: Path) -> None:
    with Server(repository, "--workers", "2") as server, httpx.Client(base_url=server.url) as client:
        for content in (MLP, MLP, b"{", MLP):
            client.post("/v2/models/mlp/infer", content=content)
        server.wait_for_metric(3, "slipstream_requests_total", model="mlp", version="2", code="ok")
        server.wait_for_metric(1, "slipstream_requests_total", model="mlp", code="malformed_request")
        assert server.metric("slipstream_request_seconds_count", model="mlp") == 4
        assert server.metric("slipstream_batch_rows_sum", model="mlp") == 3


@pytest.mark.parametrize("workers", ["1", "2"])
def test_cache_counts_what_all_front_ends_ask(slow_repository: Path, workers: str) -> None:
    def result(kind: str) -> float:
        return server.metric("slipstream_cache_requests_total", model="slow", result=kind)

    def ask(_: int) -> str:  # each on a connection of its own, with whichever front end takes it
        answer = httpx.post(f"{server.url}/v2/models/slow/infer", content=SLOW, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        return answer.headers.get("slipstream-cache", "miss")

    options = ("--workers", workers, "--cache-bytes", "1000000")
    with Server(slow_repository, *options) as server, ThreadPoolExecutor(16) as pool:
        assert server.metric("slipstream_cache_bytes") == 0
        said = [*pool.map(ask, range(16)), *pool.map(ask, range(16))]
        assert said[16:] == ["hit"] * 16
        assert {kind: result(kind) for kind in ("miss", "shared", "hit")} == {
            kind: said.count(kind) for kind in ("miss", "shared", "hit")
        }
        assert said.count("miss") == 1, "the front ends share one cache, and runs under way"
        assert 0 < server.metric("slipstream_cache_bytes") <= 1_000_000
        assert server.metric("slipstream_batch_rows_sum", model="slow") == 1
        server.wait_for_metric(32, "slipstream_requests_total", model="slow", code="ok")


def test_cache_counts_every_one_of_many_small_requests(repository: Path) -> None:
    def post(client_number: int) -> None:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            for number in range(20):
                array = np.full((1, 64), client_number * 100 + number % 10, np.float32)
                body, headers = binary({"x": array})
                assert client.post(url, content=body, headers=headers).status_code == 200

    with Server(repository, "--workers", "2", "--cache-bytes", "1000000") as server, ThreadPoolExecutor(16) as pool:
        url = f"{server.url}/v2/models/mlp/infer"
        list(pool.map(post, range(16)))
        assert server.metric("slipstream_cache_requests_total", model="mlp", result="miss") == 160
        assert server.metric("slipstream_cache_requests_total", model="mlp", result="hit") == 160


def test_small_requests_of_many_clients_get_their_own_answers(one: Server, many: Server) -> None:
    arrays = np.random.default_rng(0).standard_normal((32, 1, 64)).astype(np.float32)

    def post(server: Server, array: np.ndarray, times: int) -> list[bytes]:
        body, headers = binary({"x": array})
        answers = []
        with httpx.Client(timeout=TIMEOUT_S) as client:
            for _ in range(times):
                answer = client.post(f"{server.url}/v2/models/mlp/infer", content=body, headers=headers)
                assert answer.status_code == 200, answer.text
                answers.append(answer.content[int(answer.headers["inference-header-content-length"]) :])
        return answers

    with ThreadPoolExecutor(len(arrays)) as pool:
        seen = list(pool.map(lambda array: post(many, array, 20), arrays))
    for array, answers in zip(arrays, seen, strict=True):
        expected = np.frombuffer(post(one, array, 1)[0], np.float32)
        for answer in answers:  # the sum's order may change with the rows of a batch
            np.testing.assert_allclose(np.frombuffer(answer, np.float32), expected, rtol=1e-5, atol=1e-6)


def test_many_clients_get_their_own_answers(many: Server) -> None:
    inputs = [echo_inputs(1 + number % 5, 30) for number in range(200)]
    for number, arrays in enumerate(inputs):
        arrays["INT64"] += number * 1000

    def post(arrays: dict[str, np.ndarray]) -> bytes:
        body, headers = binary(arrays, outputs=[{"name": "INT64_out", "parameters": {"binary_data": True}}])
        with httpx.Client(timeout=TIMEOUT_S) as client:
            answer = client.post(f"{many.url}/v2/models/echo/infer", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.content[int(answer.headers["inference-header-content-length"]) :]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(post, inputs))
    assert answers == [arrays["INT64"].tobytes() for arrays in inputs]


def save_slow_and_wide(path: Path) -> Path:
    """The slow model behind a mean over 1,500 numbers: its requests take a block of 8 KiB each."""
    model = onnx.load(save_slow(path))
    mean = helper.make_node("ReduceMean", ["wide"], ["x"], axes=[1], keepdims=1)
    nodes = [mean, *model.graph.node]
    wide = helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["batch", 1500])
    graph = helper.make_graph(nodes, "wide", [wide], list(model.graph.output), list(model.graph.initializer))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_full_shared_memory_is_refused_and_recovers(tmp_path: Path) -> None:
    write_plain(tmp_path / "models", "slow", "1", save_slow_and_wide(tmp_path / "slow.onnx"))
    body, headers = binary({"wide": np.ones((1, 1500), np.float32)})
    with (
        Server(tmp_path / "models", "--workers", "2", "--slab-bytes", "65536", "--cpu-instances", "1") as server,
        httpx.Client(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client,
        ThreadPoolExecutor(80) as pool,
    ):
        url = f"{server.url}/v2/models/slow/infer"
        answers = list(pool.map(lambda _: client.post(url, content=body, headers=headers), range(80)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in refused:
            assert answer.json()["code"] == "queue_full"
            assert "--slab-bytes" in answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1
        server.wait_for_metric(len(refused), "slipstream_requests_total", model="slow", code="queue_full")
        assert client.post(url, content=body, headers=headers).status_code == 200


def test_client_that_leaves_frees_its_place(slow_repository: Path) -> None:
    with (
        Server(slow_repository, "--workers", "2", "--cpu-instances", "1") as server,
        httpx.Client(timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        url = f"{server.url}/v2/models/slow/infer"
        occupying = [pool.submit(client.post, url, content=SLOW) for _ in range(20)]
        server.wait_for_metric(10, "slipstream_queue_rows", model="slow")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SLOW)
            connection.sendall(head + SLOW)
        server.wait_for_metric(1, "slipstream_requests_total", model="slow", code="cancelled")
        assert {answer.result().status_code for answer in occupying} == {200}


class Client(threading.Thread):
    """A client with one connection that posts until it is told to stop, or until the connection breaks."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.statuses: list[int] = []
        self.is_broken, self._stop_now = False, threading.Event()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._connection.connect()
        self.first = threading.Event()

    def run(self) -> None:
        while not self._stop_now.is_set():
            try:
                self._connection.request("POST", "/v2/models/mlp/infer", MLP)
                answer = self._connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                self.is_broken = True
                break
            self.statuses.append(answer.status)
            self.first.set()
        self.first.set()
        self._connection.close()

    def stop(self) -> None:
        self._stop_now.set()
        self.join(TIMEOUT_S)


def test_killed_front_end_takes_only_its_own_connections_along(repository: Path) -> None:
    with Server(repository, "--workers", "2") as server:
        engine, front_ends = parts_of(server)
        assert len(front_ends) == 2
        before = mapped(engine), open_files(engine)
        clients = [Client(server.port) for _ in range(24)]
        for client in clients:
            client.start()
        for client in clients:
            assert client.first.wait(TIMEOUT_S)
        os.kill(front_ends[0], signal.SIGKILL)
        server.wait_for("front end")
        for _ in range(50):
            assert httpx.post(f"{server.url}/v2/models/mlp/infer", content=MLP).status_code == 200
        for client in clients:
            client.stop()
        assert {status for client in clients for status in client.statuses} == {200}
        assert any(not client.is_broken for client in clients)
        assert parts_of(server)[0] == engine
        wait_for(lambda: len(parts_of(server)[1]) == 2 and (mapped(engine), open_files(engine)) == before)
        server.terminate()
        assert server.wait() == 0, server.text


def test_killed_engine_is_replaced_and_readiness_says_so(repository: Path) -> None:
    with Server(repository, "--workers", "2") as server, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        engine, front_ends = parts_of(server)
        clients = [Client(server.port) for _ in range(8)]
        for each in clients:
            each.start()
        for each in clients:
            assert each.first.wait(TIMEOUT_S)
        os.kill(engine, signal.SIGKILL)
        server.wait_for("the engine was ended by SIGKILL; starting another")
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "unavailable")
        assert "being restarted" in ready.json()["error"]
        assert int(ready.headers["retry-after"]) >= 1
        assert client.get("/v2/health/live").status_code == 200
        refused = client.post("/v2/models/mlp/infer", content=MLP)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        server.wait_for("ready: serving")
        wait_for(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.post("/v2/models/mlp/infer", content=MLP).status_code == 200
        answered = [len(each.statuses) for each in clients]
        wait_for(
            lambda: all(
                len(each.statuses) > n and each.statuses[-1] == 200 for each, n in zip(clients, answered, strict=True)
            )
        )
        for each in clients:
            each.stop()
        assert not any(each.is_broken for each in clients), "front ends keep their connections"
        assert {status for each in clients for status in each.statuses} == {200, 503}
        assert sorted(parts_of(server)[1]) == sorted(front_ends)
        assert parts_of(server)[0] != engine
        server.terminate()
        assert server.wait() == 0, server.text


def wait_for(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("grace_s", ["0", "0.3"])
def test_sigterm_under_load_loses_nothing(repository: Path, grace_s: str) -> None:
    with Server(repository, "--workers", "2", "--shutdown-grace-s", grace_s) as server:
        posters: list[Poster] = run_and_terminate(server, "mlp", MLP, clients=16, requests=500)
        assert server.wait() == 0, server.text
    assert [poster.lost for poster in posters if poster.lost] == []
    assert sum(poster.answered for poster in posters) >= 500
    assert "ERROR" not in server.text


def test_sigterm_finishes_what_is_queued(slow_repository: Path) -> None:
    with Server(slow_repository, "--workers", "2", "--cpu-instances", "1", "--shutdown-grace-s", "0") as server:
        posters = run_and_terminate(server, "slow", SLOW, clients=12, requests=1)
        assert server.wait() == 0, server.text
    assert [poster.lost for poster in posters if poster.lost] == []
    assert sum(poster.closing for poster in posters) >= 11


def test_draining_server_is_not_ready_but_serves(repository: Path) -> None:
    with (
        Server(repository, "--workers", "2", "--shutdown-grace-s", "30") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        server.terminate()
        server.wait_for("stopping: not ready")
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "draining")
        infer = client.post("/v2/models/mlp/infer", content=MLP)
        assert (infer.status_code, infer.headers["connection"]) == (200, "close")
        for _ in range(20):  # new connections, on both front ends
            assert httpx.get(f"{server.url}/v2/health/live").status_code == 200


def test_request_that_outlasts_the_drain_timeout_is_told(slow_repository: Path) -> None:
    options = ("--workers", "2", "--cpu-instances", "1", "--shutdown-grace-s", "0", "--drain-timeout-s", "0.1")
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
        assert server.wait() == 0, server.text
    assert {type(error) for error in errors} <= {type(None), httpx.ConnectError}  # those came after the socket closed
    codes = {answer.result().status_code for answer, error in zip(answers, errors, strict=True) if error is None}
    assert codes == {200, 503}


def test_second_signal_ends_everything_at_once(repository: Path) -> None:
    with Server(repository, "--workers", "2", "--shutdown-grace-s", "600") as server:
        engine, front_ends = parts_of(server)
        server.terminate(signal.SIGINT)
        server.wait_for("stopping: not ready")
        server.terminate(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        wait_for(lambda: not any(Path(f"/proc/{pid}/maps").exists() and mapped(pid) for pid in (engine, *front_ends)))


def test_processes_end_with_their_supervisor(repository: Path) -> None:
    with Server(repository, "--workers", "2") as server:
        engine, front_ends = parts_of(server)
        server.terminate(signal.SIGKILL)
        wait_for(lambda: not any(is_running(pid) for pid in (engine, *front_ends)))


def is_running(pid: int) -> bool:
    try:
        return "slipstream" in (Path("/proc") / str(pid) / "maps").read_text()
    except OSError:
        return False


def test_nothing_to_serve_is_a_failure_as_with_one_process(tmp_path: Path) -> None:
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    texts = []
    for workers in ("1", "2"):
        with Server(tmp_path, "--workers", workers, wait=False) as server:
            assert server.wait() == 1
        texts.append(server.log[-1])
        assert "Traceback" not in server.text
    assert texts[0] == texts[1]
    assert "no model of" in texts[0]
