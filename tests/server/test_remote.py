"""A front end's engine and the engine's front ends, joined by a real channel in one loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from server import channel, remote
from server.app import create_app
from server.cache import ResponseCache
from server.channel import channel_pair
from server.engine import Engine
from server.errors import InferenceFailed, ModelNotReady, QueueFull, SlipstreamError, Unavailable, UnknownModel
from server.messages import HttpAnswer, HttpRequest
from server.metrics import Metrics
from server.remote import RemoteCache, RemoteCounters, RemoteEngine, RemoteModel, RemoteModels
from server.serving import How
from server.settings import Settings
from server.tensors import InferRequest, InferResponse
from tests.server.fakes import FakeModel, FakeRepository, double

SLAB = 256 * 1024


class Joined:
    """A front end's view, and the engine behind it."""

    def __init__(self) -> None:
        self.repository, self.metrics = FakeRepository(), Metrics()
        settings = Settings(slab_bytes=SLAB)
        self.app = create_app(settings, self.repository, self.metrics)  # type: ignore[arg-type]
        self.engine = Engine(self.app)
        self.connected, self.lost = asyncio.Event(), asyncio.Event()
        self.remote = RemoteEngine(SLAB, self.connected.set, self.lost.set)
        self.models = RemoteModels(self.remote)

    async def connect(self) -> None:
        self.connected.clear()
        front, engine = channel_pair()
        self.engine.connect(engine)
        self.remote.connect(front)
        async with asyncio.timeout(30):
            await self.connected.wait()

    async def model(self, name: str = "m", version: str = "") -> RemoteModel:
        await self.models.look_up(name, version)
        return self.models.get(name, version)

    def answer(self, by: Callable[[InferRequest], Awaitable[InferResponse]]) -> FakeModel:
        model = FakeModel(answer=by)
        self.repository.models["2"] = model
        return model

    async def get(self, path: str, method: str = "GET", body: bytes = b"") -> HttpAnswer:
        asked = HttpRequest("1.1", method, "http", path, path.encode(), b"", [], ("127.0.0.1", 1), None, body)
        answer: HttpAnswer = await self.remote.call(channel.HTTP, self.remote.codecs.http.encode(asked))
        return answer

    @property
    def connection(self) -> Any:
        (connection,) = self.engine._connections
        return connection


@pytest.fixture
async def joined() -> AsyncIterator[Joined]:
    joined = Joined()
    await joined.connect()
    yield joined
    joined.remote.close()
    await joined.engine.close()


class Forgetful(FakeModel):
    """A model that keeps no request, as the fake does, and with it no memory."""

    async def infer(self, request: InferRequest) -> InferResponse:
        return await double(request)


def request(rows: int = 1, **fields: Any) -> InferRequest:
    return InferRequest({"x": np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)}, **fields)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (what is waited for happens in many places)
            await asyncio.sleep(0)


@pytest.mark.parametrize("rows", [1, 1000, 10_000])
async def test_answer_is_the_models_own(joined: Joined, rows: int) -> None:
    asked = request(rows, id="a", outputs=("y",), timeout_s=2.0, variant="v", priority=3, client="c")
    response = await (await joined.model()).infer(asked)
    expected = await double(asked)
    np.testing.assert_array_equal(response.outputs["y"], expected.outputs["y"])
    assert msgspec.structs.replace(response, outputs={}) == msgspec.structs.replace(expected, outputs={})
    (seen,) = joined.repository.models["2"].requests
    assert [getattr(seen, field) for field in seen.__struct_fields__[1:]] == ["a", ("y",), 2.0, "v", 3, "c"]


async def test_many_requests_at_once_get_their_own_answers(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined.repository.models["2"] = Forgetful()
    monkeypatch.setattr(remote, "ROOM_TIMEOUT_S", 3600)
    model = await joined.model()
    sizes = [1 + number * 7 % 3000 for number in range(300)]
    async with asyncio.timeout(60):
        responses = await asyncio.gather(*(model.infer(request(rows, id=str(rows))) for rows in sizes))
    assert [(response.id, len(response.outputs["y"])) for response in responses] == [(str(n), n) for n in sizes]


async def test_errors_of_the_model_are_raised_here(joined: Joined) -> None:
    async def fail(_: InferRequest) -> InferResponse:
        raise InferenceFailed("the session raised")

    async def refuse(_: InferRequest) -> InferResponse:
        raise QueueFull("3 rows wait", 7.0)

    joined.answer(fail)
    with pytest.raises(InferenceFailed, match="the session raised"):
        await (await joined.model()).infer(request())
    joined.answer(refuse)
    with pytest.raises(QueueFull) as caught:
        await (await joined.model()).infer(request())
    assert caught.value.retry_after_s == 7.0


async def test_defect_of_the_engine_keeps_its_text_in_the_log(joined: Joined, caplog: pytest.LogCaptureFixture) -> None:
    async def break_down(_: InferRequest) -> InferResponse:
        raise RuntimeError("secret")

    joined.answer(break_down)
    with pytest.raises(SlipstreamError, match="internal error; see the server log") as caught:
        await (await joined.model()).infer(request())
    assert type(caught.value) is SlipstreamError
    assert "secret" in caplog.text


async def test_model_is_not_unknown_before_the_engine_has_looked(joined: Joined) -> None:
    with pytest.raises(ModelNotReady, match="being opened"):
        await joined.models.look_up("other", "")


async def test_unknown_models_are_refused_and_not_remembered(joined: Joined) -> None:
    joined.app.opening = asyncio.create_task(joined.repository.open())
    await joined.app.opening
    for name, version in (("other", ""), ("m", "9")):
        with pytest.raises(UnknownModel, match="is not found"):
            await joined.models.look_up(name, version)
        assert joined.models.find(name, version) is None
    assert joined.engine._asked == []


async def test_model_is_asked_for_once_and_again_after_a_swap(joined: Joined) -> None:
    model = await joined.model()
    assert (model.name, model.version, model.signature) == ("m", "2", FakeModel().signature)
    assert joined.models.find("m", "") is not None
    joined.repository.models["2"] = FakeModel("2")
    await model.infer(request())
    assert len(joined.repository.models["2"].requests) == 1, "the new one answers at once"
    await until(lambda: not joined.models.find("m", "") is not None)
    with pytest.raises(ModelNotReady):
        joined.models.get("m", "")
    await joined.model()
    await model.infer(request())
    assert joined.models.find("m", "") is not None


async def test_model_that_stops_serving_is_refused_and_forgotten(joined: Joined) -> None:
    model = await joined.model()
    joined.repository.failures["m", ""] = "gone"
    with pytest.raises(ModelNotReady):
        await model.infer(request())
    assert joined.models.find("m", "") is None


async def test_cancelled_request_is_cancelled_in_the_engine(joined: Joined) -> None:
    ended: list[str] = []

    async def wait(_: InferRequest) -> InferResponse:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")
        raise AssertionError

    model = joined.answer(wait)
    asking = asyncio.create_task((await joined.model()).infer(request(5000)))
    await until(lambda: bool(model.requests))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    model.requests.clear()
    await until(lambda: ended == ["cancelled"])
    await until(lambda: joined.remote._channel is not None and joined.remote._channel.used_bytes == 0)
    assert joined.connection.under_way == {}
    assert joined.remote._calls == {}


@pytest.mark.parametrize("cached", [False, True])
async def test_request_cancelled_at_once_leaves_nothing_behind(joined: Joined, cached: bool) -> None:
    joined.answer(Forgetful().infer)
    if cached:
        joined.app.cache = ResponseCache(1000, 0.0, joined.metrics)
    begun = (await joined.model()).begin(request())
    assert begun is not None
    begun.cancel()  # the engine reads it and its end in one packet
    assert (await joined.get("/v2")).status == 200
    await until(lambda: joined.connection.under_way == {})
    assert joined.remote._calls == {}


async def test_requests_that_come_together_reach_the_engine_as_one(joined: Joined) -> None:
    async def batched(asked: InferRequest) -> InferResponse:
        return msgspec.structs.replace(await double(asked), batch_rows=32, compute_s=0.0)

    model = joined.answer(batched)
    theirs = await joined.model()
    await theirs.infer(request())
    asked = [InferRequest({"x": np.full((1, 4), value, np.float32)}, id=str(value)) for value in range(5)]
    begun = [theirs.begin(each) for each in asked]
    outcomes = await asyncio.gather(*(future for future in begun if future is not None))
    responses = [theirs.finish(each, outcome)[0] for each, outcome in zip(asked, outcomes, strict=True)]
    assert [(r.id, r.outputs["y"].tolist()) for r in responses] == [(str(v), [[2.0 * v] * 4]) for v in range(5)]
    assert [len(seen.inputs["x"]) for seen in model.requests] == [1, 5]


async def test_what_is_gathered_waits_for_room_like_any_other(joined: Joined) -> None:
    async def batched(asked: InferRequest) -> InferResponse:
        return msgspec.structs.replace(await double(asked), batch_rows=32, compute_s=0.0)

    model = joined.answer(batched)
    theirs = await joined.model()
    await theirs.infer(request())
    opened = joined.remote._channel
    assert opened is not None
    filling = opened._allocator.allocate(SLAB)
    assert filling is not None
    begun = [theirs.begin(request(200)) for _ in range(4)]  # 12,800 bytes together
    await asyncio.sleep(0)
    opened._take_back(channel._SLAB, filling)
    responses = await asyncio.gather(*(future for future in begun if future is not None))
    assert [len(answer.response.outputs["y"]) for answer in responses] == [200] * 4
    assert [len(seen.inputs["x"]) for seen in model.requests] == [1, 800]


async def test_engine_with_a_cache_gets_every_request_alone(joined: Joined) -> None:
    async def batched(asked: InferRequest) -> InferResponse:
        return msgspec.structs.replace(await double(asked), batch_rows=32, compute_s=0.0)

    model = joined.answer(batched)
    models = RemoteModels(joined.remote, gathers=False)
    await models.look_up("m", "")
    theirs = models.get("m")
    await theirs.infer(request())
    begun = [theirs.begin(request()) for _ in range(3)]
    await asyncio.gather(*(future for future in begun if future is not None))
    assert [len(seen.inputs["x"]) for seen in model.requests] == [1] * 4


async def test_memory_is_given_back_after_errors_too(joined: Joined) -> None:
    async def fail(_: InferRequest) -> InferResponse:
        raise InferenceFailed("no")

    async def answer(asked: InferRequest) -> InferResponse:
        return await (fail(asked) if asked.id == "bad" else double(asked))

    model = joined.answer(answer)
    theirs = await joined.model()
    for name in ("good", "bad") * 50:
        await asyncio.gather(theirs.infer(request(3000, id=name)), return_exceptions=True)
        model.requests.clear()
    opened = joined.remote._channel
    assert opened is not None
    await until(lambda: opened.used_bytes == 0)
    await until(lambda: joined.connection._channel.used_bytes == 0)


async def test_full_memory_is_waited_for_and_then_refused(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def wait(asked: InferRequest) -> InferResponse:
        await release.wait()
        return await double(asked)

    model = joined.answer(wait)
    theirs = await joined.model()
    filling = [asyncio.create_task(theirs.infer(request(2000))) for _ in range(SLAB // 32_768)]
    await until(lambda: len(model.requests) == len(filling))
    monkeypatch.setattr(remote, "ROOM_TIMEOUT_S", 0)
    with pytest.raises(QueueFull, match=r"--slab-bytes") as caught:
        await theirs.infer(request(2000))
    assert caught.value.retry_after_s > 0
    monkeypatch.setattr(remote, "ROOM_TIMEOUT_S", 3600)
    waiting = asyncio.create_task(theirs.infer(request(2000)))
    small = asyncio.create_task(theirs.infer(request(1)))
    await until(lambda: len(model.requests) == len(filling) + 1)
    assert not waiting.done()
    model.requests.clear()
    release.set()
    assert len((await waiting).outputs["y"]) == 2000
    await asyncio.gather(small, *filling)


async def test_answers_wait_for_room_in_the_engine(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ROOM_TIMEOUT_S", 3600)
    joined.repository.models["2"] = Forgetful()
    theirs = await joined.model()
    async with asyncio.timeout(60):
        responses = await asyncio.gather(*(theirs.infer(request(2000)) for _ in range(8)))
        assert all(len(response.outputs["y"]) == 2000 for response in responses)
        large = request(SLAB)  # beyond the slab in both directions
        both = await asyncio.gather(theirs.infer(large), theirs.infer(large))
        for response in both:
            np.testing.assert_array_equal(response.outputs["y"], large.inputs["x"] * 2)


async def test_engine_that_ends_fails_what_it_has_and_what_comes(joined: Joined) -> None:
    async def wait(_: InferRequest) -> InferResponse:
        await asyncio.Event().wait()
        raise AssertionError

    model = joined.answer(wait)
    theirs = await joined.model()
    asking = asyncio.create_task(theirs.infer(request()))
    await until(lambda: bool(model.requests))
    joined.connection.close()
    with pytest.raises(Unavailable, match="while it had the request"):
        await asking
    assert joined.lost.is_set()
    assert joined.models.find("m", "") is None
    with pytest.raises(Unavailable, match="being restarted"):
        await theirs.infer(request())
    await joined.connect()
    joined.answer(double)
    assert len((await (await joined.model()).infer(request())).outputs["y"]) == 1


async def test_front_end_that_ends_has_its_requests_cancelled_and_counted(joined: Joined) -> None:
    async def wait(_: InferRequest) -> InferResponse:
        await asyncio.Event().wait()
        raise AssertionError

    model = joined.answer(wait)
    asking = asyncio.create_task((await joined.model()).infer(request()))
    await until(lambda: bool(model.requests))
    joined.remote.close()
    await until(lambda: not joined.engine._connections)
    await until(lambda: b'code="cancelled",model="m",version="2"} 1.0' in joined.metrics.render()[0])
    asking.cancel()


async def test_engine_can_be_asked_only_once_it_has_answered() -> None:
    alone = RemoteEngine(SLAB, lambda: None, lambda: None)
    with pytest.raises(Unavailable, match="starting"):
        await RemoteModels(alone).look_up("m", "")


async def test_finished_requests_are_counted_in_the_engine(joined: Joined) -> None:
    counter = RemoteCounters(joined.remote).of_model("m", "2")
    for code in ("ok", "ok", "malformed_request"):
        counter.request_finished(code, 0.5)
    await until(lambda: b'code="malformed_request",model="m",version="2"} 1.0' in joined.metrics.render()[0])
    assert b'slipstream_requests_total{code="ok",model="m",version="2"} 2.0' in joined.metrics.render()[0]
    assert b'slipstream_request_seconds_sum{model="m",version="2"} 1.5' in joined.metrics.render()[0]


async def test_finished_requests_wait_for_room_to_be_counted(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FINISHED_DELAY_S", 0)
    opened = joined.remote._channel
    assert opened is not None
    full = [True]
    post = opened.post
    monkeypatch.setattr(opened, "post", lambda *args, **options: not full[0] and post(*args, **options))
    RemoteCounters(joined.remote).of_model("m", "2").request_finished("ok", 0.5)
    await asyncio.sleep(0.001)
    full[0] = False
    await until(lambda: b'slipstream_requests_total{code="ok",model="m",version="2"} 1.0' in joined.metrics.render()[0])


async def test_request_that_another_version_answers_is_counted_for_it(joined: Joined) -> None:
    theirs = await joined.model()
    counter = RemoteCounters(joined.remote).of_model("m", "2")
    joined.repository.models["2"] = FakeModel("3", lambda asked: answered_by("3", asked))
    response = await theirs.infer(request())
    assert (theirs.version, response.version) == ("2", "3")
    counter.request_finished("malformed_request", 0.5)  # no version has answered that
    counter.request_finished("ok", 0.5)
    counter.request_finished("ok", 0.5)
    joined.remote.tell_finished()
    await until(lambda: b'code="ok",model="m",version="3"} 1.0' in joined.metrics.render()[0])
    assert b'code="ok",model="m",version="2"} 1.0' in joined.metrics.render()[0]
    assert b'code="malformed_request",model="m",version="2"} 1.0' in joined.metrics.render()[0]


async def answered_by(version: str, asked: InferRequest) -> InferResponse:
    return msgspec.structs.replace(await double(asked), version=version)


async def test_what_finished_without_an_engine_is_counted_by_the_next_one(joined: Joined) -> None:
    counter = RemoteCounters(joined.remote).of_model("m", "2")
    joined.connection.close()
    await until(joined.lost.is_set)
    counter.request_finished("unavailable", 0.5)
    await asyncio.sleep(0)
    await joined.connect()
    await until(lambda: b'code="unavailable",model="m",version="2"} 1.0' in joined.metrics.render()[0])


async def test_engine_says_where_an_answer_came_from(joined: Joined) -> None:
    class Cache:
        async def infer(self, model: FakeModel, asked: InferRequest) -> tuple[InferResponse, How]:
            return await model.infer(asked), "hit"

    joined.app.cache = Cache()  # type: ignore[assignment]
    response, how = await RemoteCache().infer(await joined.model(), request())
    assert (response.model, how) == ("m", "hit")


async def test_everything_else_is_the_applications_answer(joined: Joined) -> None:
    answer = await joined.get("/v2/models/m")
    assert (answer.status, dict(answer.headers)[b"content-type"]) == (200, b"application/json")
    assert msgspec.json.decode(answer.body)["name"] == "m"
    assert (await joined.get("/nowhere")).status == 404
    assert (await joined.get("/v2", "POST", b"x" * 300_000)).status == 405
    assert b"slipstream_requests" in (await joined.get("/metrics")).body
