"""The infer branch, called through ASGI or directly, with a fake model behind it."""

import asyncio
import json
import re
import threading
from typing import Any

import numpy as np
import pytest

from server import infer
from server.cache import ResponseCache
from server.errors import DeadlineExpired, QueueFull, RequestTimeout
from server.http import Answer
from server.infer import InferBranch, infer_target
from server.metrics import Metrics
from server.settings import Settings
from server.tensors import InferRequest, InferResponse
from tests.server.fakes import FakeRepository

BODY = json.dumps(
    {"id": "7", "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
).encode()


class Exchange:
    """One request to the branch and what it answered."""

    def __init__(self, body: bytes = BODY, headers: dict[str, str] | None = None, method: str = "POST") -> None:
        pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"type": "http", "method": method, "path": "/v2/models/m/infer", "headers": pairs}
        self.messages: list[Any] = []
        self.client_left = asyncio.Event()
        self._body: list[bytes] = [body]

    async def receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.client_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(bytes(message["body"]) for message in self.messages[1:])


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


async def call(
    repository: FakeRepository, exchange: Exchange, name: str = "m", version: str = "", metrics: Metrics | None = None
) -> Exchange:
    branch = InferBranch(repository, metrics or Metrics(), Settings())  # type: ignore[arg-type]
    await branch(exchange.scope, exchange.receive, exchange.send, name, version)
    return exchange


def counted(metrics: Metrics, code: str, version: str = "2") -> float | None:
    labels = {"model": "m", "version": version, "code": code}
    return metrics.registry.get_sample_value("slipstream_requests_total", labels)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v2/models/m/infer", ("m", "")),
        ("/v2/models/m/versions/3/infer", ("m", "3")),
        ("/v2/models/versions/infer", ("versions", "")),
        ("/v2/models/infer", None),
        ("/v2/models//infer", None),
        ("/v2/models/m/versions//infer", None),
        ("/v2/models/a/b/infer", None),
        ("/v2/models/m/versions/3/4/infer", None),
        ("/v2/models/m/infer/", None),
        ("/v2/models/m", None),
        ("/v1/models/m/infer", None),
        ("/v2/models/m/ready", None),
    ],
)
def test_only_infer_paths_branch_off(path: str, target: tuple[str, str] | None) -> None:
    assert infer_target(path) == target


async def test_json_answer_and_its_account(repository: FakeRepository, metrics: Metrics) -> None:
    exchange = await call(repository, Exchange(), metrics=metrics)
    assert exchange.status == 200
    assert json.loads(exchange.body) == {
        "model_name": "m",
        "model_version": "2",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2, 4, 6, 8]}],
    }
    headers = exchange.headers
    timing = headers.pop("server-timing")
    assert re.fullmatch(r"queue;dur=1\.000, compute;dur=20\.000, total;dur=\d+\.\d{3}", timing)
    assert headers == {
        "content-type": "application/json",
        "content-length": str(len(exchange.body)),
        "slipstream-variant": "fp32",
        "slipstream-device": "cpu",
        "slipstream-batch-rows": "3",
        "slipstream-queue-ms": "1.000",
        "slipstream-compute-ms": "20.000",
    }
    assert counted(metrics, "ok") == 1


async def test_binary_in_and_out(repository: FakeRepository) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    data = np.arange(4, dtype=np.float32)
    exchange = await call(
        repository, Exchange(head + data.tobytes(), {"inference-header-content-length": str(len(head))})
    )
    length = int(exchange.headers["inference-header-content-length"])
    assert exchange.headers["content-type"] == "application/octet-stream"
    assert int(exchange.headers["content-length"]) == len(exchange.body)
    assert json.loads(exchange.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    np.testing.assert_array_equal(np.frombuffer(exchange.body[length:], np.float32), data * 2)


async def test_raw_request_needs_no_json(repository: FakeRepository) -> None:
    exchange = await call(
        repository, Exchange(np.ones(8, np.float32).tobytes(), {"inference-header-content-length": "0"})
    )
    assert exchange.status == 200
    assert repository.models["2"].requests[0].inputs["x"].shape == (2, 4)


async def test_version_in_the_path_chooses_the_version(repository: FakeRepository, metrics: Metrics) -> None:
    await call(repository, Exchange(), version="1", metrics=metrics)
    assert len(repository.models["1"].requests) == 1
    assert counted(metrics, "ok", version="1") == 1


async def test_headers_pin_the_variant_and_set_the_deadline(repository: FakeRepository) -> None:
    await call(repository, Exchange(headers={"slipstream-variant": "int8", "slipstream-timeout-ms": "12.5"}))
    (request,) = repository.models["2"].requests
    assert (request.variant, request.timeout_s) == ("int8", 0.0125)


async def test_what_the_body_says_wins_over_the_headers(repository: FakeRepository) -> None:
    body = json.loads(BODY) | {"parameters": {"variant": "fp32", "timeout": 2000}}
    headers = {"slipstream-variant": "int8", "slipstream-timeout-ms": "12.5"}
    await call(repository, Exchange(json.dumps(body).encode(), headers))
    (request,) = repository.models["2"].requests
    assert (request.variant, request.timeout_s) == ("fp32", 0.002)


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "nan", "inf"])
async def test_timeout_header_that_is_no_time_is_malformed(repository: FakeRepository, text: str) -> None:
    exchange = await call(repository, Exchange(headers={"slipstream-timeout-ms": text}))
    assert exchange.status == 400
    assert json.loads(exchange.body)["code"] == "malformed_request"
    assert "slipstream-timeout-ms" in json.loads(exchange.body)["error"]


@pytest.mark.parametrize("text", ["", "x", "-1", "+1", "1.5", "1_0", "99999999999", "1000"])
async def test_bad_header_length_is_malformed(repository: FakeRepository, text: str) -> None:
    exchange = await call(repository, Exchange(headers={"inference-header-content-length": text}))
    assert (exchange.status, json.loads(exchange.body)["code"]) == (400, "malformed_request")


async def test_cache_says_where_the_answer_came_from(repository: FakeRepository, metrics: Metrics) -> None:
    branch = InferBranch(repository, metrics, Settings(), cache=ResponseCache(1_000_000, 0.0, metrics))  # type: ignore[arg-type]
    seen = []
    for _ in range(2):
        exchange = Exchange()
        await branch(exchange.scope, exchange.receive, exchange.send, "m", "")
        seen.append((exchange.headers.get("slipstream-cache"), json.loads(exchange.body)))
    assert [how for how, _ in seen] == [None, "hit"]
    assert seen[0][1] == seen[1][1]
    assert len(repository.models["2"].requests) == 1


class Call:
    """One request whose body comes when the test says so."""

    name, version, expects_continue, waited_s = "m", "", False, 0.0

    def __init__(self, headers: dict[bytes, bytes] | None = None) -> None:
        self.headers = headers or {}
        self.coming: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def body(self) -> bytes:
        return await self.coming


async def test_body_that_does_not_come_is_answered_and_counted(repository: FakeRepository, metrics: Metrics) -> None:
    call = Call()
    call.coming.set_exception(RequestTimeout("late"))
    answer = await InferBranch(repository, metrics, Settings()).answer(call)  # type: ignore[arg-type]
    assert (answer.status, (b"connection", b"close") in answer.headers) == (408, True)
    assert json.loads(answer.parts[0])["code"] == "request_timeout"
    assert counted(metrics, "request_timeout") == 1


async def test_what_the_head_rules_out_is_refused_before_the_body(repository: FakeRepository) -> None:
    branch = InferBranch(repository, Metrics(), Settings(max_body_bytes=10))  # type: ignore[arg-type]
    assert (await branch.answer(Call({b"content-length": b"11"}))).status == 413
    assert (await branch.answer(Call({b"content-encoding": b"br"}))).status == 415


async def test_models_are_looked_up_before_they_are_asked_for(repository: FakeRepository) -> None:
    looked_up = []

    async def look_up(name: str, version: str) -> None:
        looked_up.append((name, version))
        raise QueueFull("not now", 1.0)

    branch = InferBranch(repository, Metrics(), Settings(), look_up=look_up)  # type: ignore[arg-type]
    assert (await branch.answer(Call())).status == 429
    assert looked_up == [("m", "")]


async def test_wrong_method_names_the_right_one(repository: FakeRepository) -> None:
    exchange = await call(repository, Exchange(method="GET"))
    assert (exchange.status, exchange.headers["allow"]) == (405, "POST")
    assert json.loads(exchange.body)["code"] == "method_not_allowed"


async def test_unknown_model_is_not_counted_as_a_model(repository: FakeRepository, metrics: Metrics) -> None:
    exchange = await call(repository, Exchange(), name="ghost", metrics=metrics)
    assert exchange.status == 404
    assert json.loads(exchange.body) == {
        "error": "Request for unknown model: 'ghost' is not found",
        "code": "unknown_model",
    }
    assert b"ghost" not in metrics.render()[0]


async def test_refusal_says_when_to_come_again(repository: FakeRepository, metrics: Metrics) -> None:
    async def full(request: InferRequest) -> InferResponse:
        raise QueueFull("1024 rows wait", 1.2)

    repository.models["2"].answer = full
    exchange = await call(repository, Exchange(), metrics=metrics)
    assert (exchange.status, exchange.headers["retry-after"]) == (429, "2")
    assert json.loads(exchange.body) == {"error": "1024 rows wait", "code": "queue_full"}
    assert counted(metrics, "queue_full") == 1


async def test_expired_deadline_is_a_gateway_timeout(repository: FakeRepository) -> None:
    async def late(request: InferRequest) -> InferResponse:
        raise DeadlineExpired("5 ms late")

    repository.models["2"].answer = late
    assert (await call(repository, Exchange())).status == 504


async def test_defect_is_an_internal_error_without_its_text(
    repository: FakeRepository, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: InferRequest) -> InferResponse:
        raise KeyError("a secret")

    repository.models["2"].answer = broken
    exchange = await call(repository, Exchange(), metrics=metrics)
    assert exchange.status == 500
    assert json.loads(exchange.body) == {"error": "internal error; see the server log", "code": "internal"}
    assert "a secret" in caplog.text
    assert counted(metrics, "internal") == 1


async def test_cancelling_the_answer_cancels_the_request_and_is_counted(
    repository: FakeRepository, metrics: Metrics
) -> None:
    started, waiting = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def wait(request: InferRequest) -> InferResponse:
        started.set()
        return await waiting  # type: ignore[no-any-return]

    repository.models["2"].answer = wait
    call = Call()
    call.coming.set_result(BODY)
    task = asyncio.create_task(InferBranch(repository, metrics, Settings()).answer(call))  # type: ignore[arg-type]
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.cancelled()
    assert counted(metrics, "cancelled") == 1


async def test_client_that_leaves_in_its_body_gets_no_answer(repository: FakeRepository, metrics: Metrics) -> None:
    exchange = Exchange()
    exchange._body.clear()
    exchange.client_left.set()
    await call(repository, exchange, metrics=metrics)
    assert exchange.messages == []
    assert counted(metrics, "cancelled") == 1


@pytest.mark.parametrize(("rows", "off_loop"), [(1, False), (4000, False), (20_000, True)])
async def test_only_large_json_leaves_the_loop(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch, rows: int, off_loop: bool
) -> None:
    threads: dict[str, threading.Thread] = {}

    def noting(name: str, function: Any) -> Any:
        def noted(*args: Any) -> Any:
            threads[name] = threading.current_thread()
            return function(*args)

        return noted

    monkeypatch.setattr(infer, "decode", noting("decode", infer.decode))
    monkeypatch.setattr(infer, "encode", noting("encode", infer.encode))
    tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [0.5] * rows * 4}
    exchange = await call(repository, Exchange(json.dumps({"inputs": [tensor]}).encode()))
    assert exchange.status == 200
    loop_thread = threading.current_thread()
    assert (threads["decode"] is not loop_thread, threads["encode"] is not loop_thread) == (off_loop, off_loop)


async def test_a_body_that_came_slowly_goes_to_the_version_that_serves_then(repository, monkeypatch):
    monkeypatch.setattr(infer, "SLOW_BODY_S", -1.0)

    class Slow(Exchange):
        async def receive(self) -> dict[str, Any]:
            repository.models["2"] = repository.models["1"]
            return await super().receive()

    exchange = await call(repository, Slow())
    assert exchange.status == 200
    assert len(repository.models["1"].requests) == 1


async def test_priority_and_client_come_from_headers(repository):
    await call(repository, Exchange(headers={"slipstream-priority": "2", "slipstream-client": "team-a"}))
    (request,) = repository.models["2"].requests
    assert (request.priority, request.client) == (2, "team-a")


@pytest.mark.parametrize("text", ["0", "10", "first", "-1"])
async def test_a_priority_that_is_none_is_refused(repository, text):
    exchange = await call(repository, Exchange(headers={"slipstream-priority": text}))
    assert exchange.status == 400
    assert b"it is 1 (first) to 9 (last)" in exchange.body


class Answers:
    """What a call without a task was answered with."""

    def __init__(self) -> None:
        self.seen: list[Answer] = []
        self.first = asyncio.Event()

    def __call__(self, answer: Answer) -> None:
        self.seen.append(answer)
        self.first.set()

    async def one(self) -> Answer:
        async with asyncio.timeout(30):
            await self.first.wait()
        await asyncio.sleep(0)
        (answer,) = self.seen
        return answer


async def test_call_without_a_task_gives_the_same_answer_and_is_counted_once(repository, metrics):
    branch, answers = InferBranch(repository, metrics, Settings()), Answers()
    assert branch.begin(Call(), BODY, answers) is not None
    answer = await answers.one()
    exchange = await call(repository, Exchange())
    assert (answer.status, b"".join(map(bytes, answer.parts))) == (200, exchange.body)
    assert {name.decode() for name, _ in answer.headers} == set(exchange.headers)
    assert counted(metrics, "ok") == 1


@pytest.mark.parametrize(
    ("headers", "size"), [({b"content-encoding": b"gzip"}, 10), ({}, infer.SLICE_BYTES + 1)], ids=["gzip", "long JSON"]
)
async def test_what_has_to_wait_gets_a_task(repository, headers, size):
    answers = Answers()
    assert InferBranch(repository, Metrics(), Settings()).begin(Call(headers), b" " * size, answers) is None
    assert answers.seen == []


async def test_what_a_cache_or_nobody_knows_gets_a_task(repository, metrics):
    cached = InferBranch(repository, metrics, Settings(), cache=ResponseCache(1_000_000, 0.0, metrics))
    assert cached.begin(Call(), BODY, Answers()) is None
    unknown = Call()
    unknown.name = "ghost"
    assert InferBranch(repository, metrics, Settings()).begin(unknown, BODY, Answers()) is None


@pytest.mark.parametrize("body", [b"{", BODY.replace(b'"x"', b'"z"')])
async def test_call_without_a_task_that_is_wrong_is_refused_and_counted_once(repository, metrics, body):
    answers = Answers()
    cancel = InferBranch(repository, metrics, Settings()).begin(Call(), body, answers)
    assert cancel is not None
    assert (await answers.one()).status == 400
    cancel()
    codes = ("malformed_request", "signature_mismatch")
    assert sum(counted(metrics, code) or 0 for code in codes) == 1


@pytest.mark.parametrize(("error", "status"), [(QueueFull("full", 1.0), 429), (KeyError("a secret"), 500)])
async def test_run_that_fails_is_answered_without_a_task(repository, metrics, error, status):
    async def fail(request: InferRequest) -> InferResponse:
        raise error

    repository.models["2"].answer = fail
    answers = Answers()
    InferBranch(repository, metrics, Settings()).begin(Call(), BODY, answers)
    assert (await answers.one()).status == status


async def test_long_answer_in_json_is_written_in_a_thread(repository, metrics, monkeypatch):
    threads = []
    encode = infer.encode

    def noting(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(*args)

    monkeypatch.setattr(infer, "encode", noting)

    async def long(request: InferRequest) -> InferResponse:
        return InferResponse("m", "2", "", {"y": np.zeros((1, 20_000), np.float32)}, "fp32", "cpu", 1, 0.0, 0.0)

    repository.models["2"].answer = long
    answers = Answers()
    InferBranch(repository, metrics, Settings()).begin(Call(), BODY, answers)
    assert json.loads(bytes((await answers.one()).parts[0]))["outputs"][0]["shape"] == [1, 20_000]
    assert threads[0] is not threading.current_thread()


async def test_cancelled_call_without_a_task_gets_no_answer_and_is_counted(repository, metrics):
    started = asyncio.Event()

    async def wait(request: InferRequest) -> InferResponse:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    repository.models["2"].answer = wait
    answers = Answers()
    cancel = InferBranch(repository, metrics, Settings()).begin(Call(), BODY, answers)
    assert cancel is not None
    await started.wait()
    cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert answers.seen == []
    assert counted(metrics, "cancelled") == 1


async def test_no_time_is_spent_on_what_has_waited_unread_for_half_of_its_timeout(repository, metrics):
    def waiting(headers: dict[bytes, bytes], waited_s: float) -> Call:
        made = Call(headers)
        made.waited_s = waited_s
        return made

    branch = InferBranch(repository, metrics, Settings())
    late, early, patient = Answers(), Answers(), Answers()
    branch.begin(waiting({b"slipstream-timeout-ms": b"59"}, 0.03), BODY, late)
    branch.begin(waiting({b"slipstream-timeout-ms": b"61"}, 0.03), BODY, early)
    branch.begin(waiting({}, 0.03), BODY, patient)
    answer = await late.one()
    assert (answer.status, json.loads(bytes(answer.parts[0]))["code"]) == (429, "deadline_unmeetable")
    assert (b"retry-after", b"1") in answer.headers
    assert [(await answers.one()).status for answers in (early, patient)] == [200, 200]
    assert counted(metrics, "deadline_unmeetable") == 1
    assert [request.timeout_s for request in repository.models["2"].requests] == [pytest.approx(0.031), None]
    by_default = Answers()
    InferBranch(repository, metrics, Settings(default_timeout_s=0.05)).begin(waiting({}, 0.03), BODY, by_default)
    assert (await by_default.one()).status == 429
