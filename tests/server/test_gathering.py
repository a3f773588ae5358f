"""Requests that go to the engine as one: who may, who gets which rows, and what a failure of all means for each."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from server.errors import InferenceFailed, QueueFull, SignatureMismatch, Unavailable
from server.gathering import MOST_REQUESTS, SHORT_RUN_S, SMALL_REQUEST_BYTES, Gathering
from server.messages import Inferred
from server.tensors import InferRequest, InferResponse


def request(value: float = 0, rows: int = 1, **fields: Any) -> InferRequest:
    return InferRequest({"x": np.full((rows, 4), value, np.float32)}, **fields)


def inferred(asked: InferRequest, batch_rows: int = 99, compute_s: float = 0.0) -> Inferred:
    outputs = {"y": asked.inputs["x"] * 2, "sum": asked.inputs["x"].sum(1)}
    return Inferred(InferResponse("m", "1", asked.id, outputs, "v", "cpu", batch_rows, 0.0, compute_s), "miss")


class Engine:
    """Writes down what it is asked; answers when told to."""

    def __init__(self, error: Callable[[InferRequest], Exception | None] = lambda _: None) -> None:
        self.asked: list[InferRequest] = []
        self._runs: list[asyncio.Future[Inferred]] = []
        self._error = error

    def ask(self, asked: InferRequest) -> "asyncio.Future[Inferred]":
        self.asked.append(asked)
        self._runs.append(asyncio.get_running_loop().create_future())
        return self._runs[-1]

    def answer(self) -> None:
        for asked, run in zip(self.asked, self._runs, strict=True):
            if not run.done():
                error = self._error(asked)
                run.set_result(inferred(asked)) if error is None else run.set_exception(error)

    @property
    def rows(self) -> list[int]:
        return [len(asked.inputs["x"]) for asked in self.asked]


def paying(engine: Engine) -> Gathering:
    gathering = Gathering(engine.ask)
    gathering.learn(request(), inferred(request()))
    return gathering


def begun(gathering: Gathering, *requests: InferRequest) -> "list[asyncio.Future[Inferred]]":
    futures = [gathering.begin(each) for each in requests]
    assert None not in futures
    return futures  # type: ignore[return-value]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_of_one_iteration_are_asked_as_one_and_get_their_own_rows() -> None:
    engine = Engine()
    asked = [request(value, rows, id=str(value)) for value, rows in ((1, 1), (2, 3), (3, 2))]
    futures = begun(paying(engine), *asked)
    await settle()
    assert engine.rows == [6]
    engine.answer()
    for each, own in zip(asked, await asyncio.gather(*futures), strict=True):
        expected = inferred(each)
        assert own.response.id == each.id
        for name, array in expected.response.outputs.items():
            np.testing.assert_array_equal(own.response.outputs[name], array)
        assert msgspec.structs.replace(own.response, outputs={}) == msgspec.structs.replace(
            expected.response, outputs={}
        )


async def test_one_request_alone_is_asked_as_it_is() -> None:
    engine = Engine()
    asked = request(id="a")
    (future,) = begun(paying(engine), asked)
    await settle()
    assert engine.asked[0] is asked
    engine.answer()
    assert (await future).response.id == "a"


async def test_next_iteration_is_asked_on_its_own() -> None:
    engine = Engine()
    gathering = paying(engine)
    begun(gathering, request(), request())
    await settle()
    begun(gathering, request())
    await settle()
    assert engine.rows == [2, 1]


@pytest.mark.parametrize(
    "alone",
    [
        request(timeout_s=1.0),
        request(variant="v"),
        request(outputs=("y",)),
        request(priority=3),
        request(client="c"),
        request(rows=SMALL_REQUEST_BYTES // 16 + 1),
        request(rows=0),
        InferRequest({}),
        InferRequest({"x": np.float32(1) * np.ones(())}),
        InferRequest({"x": np.ones((2, 4), np.float32), "z": np.ones((3, 4), np.float32)}),
        InferRequest({"x": np.array([[b"text"]], object)}),
    ],
)
async def test_requests_with_wishes_of_their_own_go_alone(alone: InferRequest) -> None:
    assert paying(Engine()).begin(alone) is None


async def test_only_requests_of_the_same_shape_and_datatype_are_joined() -> None:
    engine = Engine()
    wide = InferRequest({"x": np.ones((1, 5), np.float32)})
    exact = InferRequest({"x": np.ones((1, 4), np.float64)})
    futures = begun(paying(engine), request(1), wide, exact, request(2))
    await settle()
    assert sorted((asked.inputs["x"].shape, asked.inputs["x"].dtype.name) for asked in engine.asked) == [
        ((1, 4), "float64"),
        ((1, 5), "float32"),
        ((2, 4), "float32"),
    ]
    engine.answer()
    assert [each.response.outputs["y"].shape for each in await asyncio.gather(*futures)] == [
        (1, 4), (1, 5), (1, 4), (1, 4)
    ]  # fmt: skip


async def test_no_more_than_so_many_are_joined() -> None:
    engine = Engine()
    futures = begun(paying(engine), *(request(value) for value in range(2 * MOST_REQUESTS + 1)))
    await settle()
    assert engine.rows == [MOST_REQUESTS, MOST_REQUESTS, 1]
    engine.answer()
    seen = [each.response.outputs["y"][0, 0] for each in await asyncio.gather(*futures)]
    assert seen == [2 * value for value in range(2 * MOST_REQUESTS + 1)]


async def test_nothing_is_gathered_before_answers_show_batches_of_several() -> None:
    gathering = Gathering(Engine().ask)
    assert gathering.begin(request()) is None
    gathering.learn(request(), inferred(request(), batch_rows=1))
    assert gathering.begin(request()) is None, "perhaps the model cannot be batched"
    gathering.learn(request(rows=3), inferred(request(rows=3), batch_rows=3))
    assert gathering.begin(request()) is None, "these rows came together"
    gathering.learn(request(rows=0), inferred(request(rows=0), batch_rows=1))
    assert gathering.begin(request()) is None
    gathering.learn(request(), inferred(request(), batch_rows=2))
    assert gathering.begin(request()) is not None


async def test_long_runs_are_not_gathered_for() -> None:
    gathering = paying(Engine())
    gathering.learn(request(), inferred(request(), batch_rows=1))
    assert gathering.begin(request()) is not None, "a batch of one says nothing against it"
    gathering.learn(request(), inferred(request(), batch_rows=8, compute_s=2 * SHORT_RUN_S))
    assert gathering.begin(request()) is None


@pytest.mark.parametrize("kind", [InferenceFailed, SignatureMismatch])
async def test_request_that_fails_does_not_fail_the_others(kind: type[Exception]) -> None:
    engine = Engine(lambda asked: kind("3 is too much") if (asked.inputs["x"] == 3).any() else None)
    futures = begun(paying(engine), request(1), request(3), request(2))
    await settle()
    engine.answer()
    await settle()
    assert engine.rows == [3, 1, 1, 1]
    engine.answer()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Inferred, kind, Inferred]


async def test_refusal_is_everyones() -> None:
    engine = Engine(lambda _: QueueFull("full", 1.0))
    futures = begun(paying(engine), request(1), request(2))
    await settle()
    engine.answer()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [QueueFull, QueueFull]
    assert engine.rows == [2], "what is full would refuse each of them again"


async def test_engine_that_cannot_be_asked_fails_them_all() -> None:
    engine = Engine()

    def ask(_: InferRequest) -> "asyncio.Future[Inferred]":
        raise Unavailable("gone")

    engine.ask = ask  # type: ignore[method-assign]
    futures = begun(paying(engine), request(1), request(2))
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]


async def test_client_that_leaves_leaves_the_others_their_rows() -> None:
    engine = Engine()
    gathering = paying(engine)
    early, late, stays = begun(gathering, request(1), request(2), request(3))
    early.cancel()
    await settle()
    assert engine.rows == [2], "who left before is not asked for"
    late.cancel()
    engine.answer()
    assert (await stays).response.outputs["y"].tolist() == [[6.0] * 4]
    (alone,) = begun(gathering, request())
    alone.cancel()
    await settle()
    assert engine.rows == [2]


async def test_run_that_is_cancelled_cancels_them() -> None:
    engine = Engine()
    futures = begun(paying(engine), request(1), request(2))
    await settle()
    for run in engine._runs:
        run.cancel()
    await settle()
    assert all(future.cancelled() for future in futures)
