"""Kept answers and shared runs, with a fake model that counts its runs."""

import asyncio
from typing import Any

import numpy as np
import pytest

from server import cache as cache_module
from server.cache import ResponseCache
from server.errors import DeadlineExpired, DeadlineUnmeetable, InferenceFailed
from server.metrics import Metrics
from server.tensors import InferRequest, InferResponse

BATCH = np.arange(4000, dtype=np.float32).reshape(1000, 4)


class Counted:
    """A model whose runs wait for ``go`` and answer with a view of a large batch, or with ``error``."""

    def __init__(self, name: str = "m", version: str = "1") -> None:
        self.name, self.version = name, version
        self.requests: list[InferRequest] = []
        self.cancelled = 0
        self.errors: list[Exception] = []
        self.go = asyncio.Event()
        self.go.set()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop(0)
        outputs = {"y": BATCH[len(self.requests) : len(self.requests) + 1]}
        return InferResponse(self.name, self.version, request.id, outputs, "fp32", "cpu", 8, 0.001, 0.02)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def cache(metrics: Metrics) -> ResponseCache:
    return ResponseCache(1_000_000, 0.0, metrics)


def request(*values: float, **fields: Any) -> InferRequest:
    return InferRequest({"x": np.array(values or (1.0, 2.0), np.float32)}, **fields)


def counted(metrics: Metrics, result: str) -> float | None:
    labels = {"model": "m", "version": "1", "result": result}
    return metrics.registry.get_sample_value("slipstream_cache_requests_total", labels)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_repeated_request_is_answered_without_a_run(cache: ResponseCache, metrics: Metrics) -> None:
    model = Counted()
    first, how_first = await cache.infer(model, request(id="a"))
    second, how_second = await cache.infer(model, request(id="b"))
    assert (how_first, how_second, len(model.requests)) == ("miss", "hit", 1)
    assert (first.id, second.id) == ("a", "b")
    np.testing.assert_array_equal(first.outputs["y"], second.outputs["y"])
    assert (first.batch_rows, first.queue_s, first.compute_s) == (8, 0.001, 0.02)
    assert (second.batch_rows, second.queue_s, second.compute_s) == (0, 0.0, 0.0)
    assert (counted(metrics, "miss"), counted(metrics, "hit")) == (1, 1)


def with_inputs(**inputs: np.ndarray) -> InferRequest:
    return InferRequest(inputs)


ZEROS = np.zeros(4, np.float32)
TEXTS = np.array([b"a", b"bc"], np.object_)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (request(1), request(2)),
        (request(0.0), request(-0.0)),
        (request(variant=""), request(variant="int8")),
        (request(outputs=("y",)), request(outputs=())),
        (request(outputs=("y", "z")), request(outputs=("z", "y"))),
        (with_inputs(x=ZEROS), with_inputs(z=ZEROS)),
        (with_inputs(x=ZEROS), with_inputs(x=ZEROS, z=ZEROS)),
        (with_inputs(x=ZEROS), with_inputs(x=ZEROS.reshape(2, 2))),
        (with_inputs(x=ZEROS), with_inputs(x=ZEROS.view(np.int32))),
        (with_inputs(x=ZEROS, z=ZEROS + 1), with_inputs(x=ZEROS + 1, z=ZEROS)),
        (with_inputs(x=TEXTS), with_inputs(x=np.array([b"ab", b"c"], np.object_))),
    ],
)
async def test_requests_that_differ_in_anything_run_apart(
    cache: ResponseCache, first: InferRequest, second: InferRequest
) -> None:
    model = Counted()
    assert [(await cache.infer(model, each))[1] for each in (first, second, first, second)] == [
        "miss",
        "miss",
        "hit",
        "hit",
    ]


async def test_another_model_or_version_runs_apart(cache: ResponseCache) -> None:
    for model in (Counted(), Counted(version="2"), Counted(name="n")):
        assert (await cache.infer(model, request()))[1] == "miss"


async def test_equal_inputs_in_another_order_memory_or_deadline_are_identical(cache: ResponseCache) -> None:
    model = Counted()
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    await cache.infer(model, with_inputs(a=table, b=ZEROS))
    same = InferRequest({"b": ZEROS.copy(), "a": np.asfortranarray(table)}, id="7", timeout_s=5.0, client="c")
    assert (await cache.infer(model, same))[1] == "hit"


async def test_large_inputs_are_hashed_off_the_loop_with_the_same_result(
    cache: ResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counted()
    await cache.infer(model, request())
    monkeypatch.setattr(cache_module, "LARGE_INPUT_BYTES", 0)
    assert (await cache.infer(model, request()))[1] == "hit"


async def test_kept_arrays_are_read_only_and_own_their_memory(cache: ResponseCache) -> None:
    for _ in range(2):
        response, _ = await cache.infer(Counted(), request())
        array = response.outputs["y"]
        assert array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    assert cache.kept_bytes < BATCH.nbytes


async def test_least_recently_used_answers_leave_first(metrics: Metrics) -> None:
    model = Counted()
    probe = ResponseCache(1_000_000, 0.0, metrics)
    await probe.infer(model, request(0))
    cache = ResponseCache(2 * probe.kept_bytes + 10, 0.0, metrics)
    for value in (1, 2, 1, 3):
        await cache.infer(model, request(value))
    assert cache.kept_bytes == 2 * probe.kept_bytes
    assert metrics.registry.get_sample_value("slipstream_cache_bytes") == cache.kept_bytes
    assert [(await cache.infer(model, request(value)))[1] for value in (1, 3, 2)] == ["hit", "hit", "miss"]


async def test_memory_counts_strings_and_an_answer_larger_than_the_cache_is_not_kept(metrics: Metrics) -> None:
    class Texts(Counted):
        async def infer(self, request: InferRequest) -> InferResponse:
            outputs = {"y": np.array([b"x" * 10_000], np.object_)}
            return InferResponse("m", "1", "", outputs, "fp32", "cpu", 1, 0.0, 0.0)

    cache = ResponseCache(5_000, 0.0, metrics)
    assert [(await cache.infer(Texts(), request()))[1] for _ in range(2)] == ["miss", "miss"]
    assert cache.kept_bytes == 0


async def test_errors_are_not_kept(cache: ResponseCache) -> None:
    model = Counted()
    model.errors = [InferenceFailed("broken")]
    with pytest.raises(InferenceFailed):
        await cache.infer(model, request())
    assert [(await cache.infer(model, request()))[1] for _ in range(2)] == ["miss", "hit"]


async def test_identical_requests_in_flight_share_a_run(cache: ResponseCache, metrics: Metrics) -> None:
    model = Counted()
    model.go.clear()
    waiting = [asyncio.create_task(cache.infer(model, request(id=str(index)))) for index in range(3)]
    await settle()
    model.go.set()
    answers = await asyncio.gather(*waiting)
    assert [how for _, how in answers] == ["miss", "shared", "shared"]
    assert [response.id for response, _ in answers] == ["0", "1", "2"]
    assert len(model.requests) == 1
    assert counted(metrics, "shared") == 2


async def test_shared_run_that_fails_fails_for_all_and_is_tried_anew_by_the_next(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    model.errors = [InferenceFailed("broken")]
    waiting = [asyncio.create_task(cache.infer(model, request())) for _ in range(2)]
    await settle()
    model.go.set()
    failures = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(failure) for failure in failures] == [InferenceFailed, InferenceFailed]
    assert (await cache.infer(model, request()))[1] == "miss"


async def test_run_goes_on_until_the_last_waiter_has_left(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    waiting = [asyncio.create_task(cache.infer(model, request())) for _ in range(3)]
    await settle()
    for task in waiting[:2]:  # the first of them started the run
        task.cancel()
    await settle()
    assert model.cancelled == 0
    waiting[2].cancel()
    await settle()
    assert model.cancelled == 1
    assert all(task.cancelled() for task in waiting)


async def test_cancelled_leader_leaves_the_others_their_answer(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    leader, other = (asyncio.create_task(cache.infer(model, request())) for _ in range(2))
    await settle()
    leader.cancel()
    model.go.set()
    assert (await other)[1] == "shared"
    assert len(model.requests) == 1


async def test_request_after_a_cancelled_run_starts_its_own(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    left = asyncio.create_task(cache.infer(model, request()))
    await settle()
    left.cancel()
    again = asyncio.create_task(cache.infer(model, request()))  # begins before the cancelled run has ended
    await settle()
    assert left.cancelled()
    model.go.set()
    assert (await again)[1] == "miss"
    assert len(model.requests) == 2


async def test_waiter_with_the_earlier_deadline_is_told_in_time(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    leader = asyncio.create_task(cache.infer(model, request()))
    await settle()
    with pytest.raises(DeadlineExpired, match="deadline of 10 ms passed while an identical request was under way"):
        await cache.infer(model, request(timeout_s=0.01))
    assert model.cancelled == 0
    model.go.set()
    assert (await leader)[1] == "miss"


async def test_default_deadline_holds_for_waiters_without_one(metrics: Metrics) -> None:
    model, cache = Counted(), ResponseCache(1_000_000, 0.01, metrics)
    model.go.clear()
    leader = asyncio.create_task(cache.infer(model, request(timeout_s=1000.0)))
    await settle()
    with pytest.raises(DeadlineExpired):
        await cache.infer(model, request())
    model.go.set()
    await leader


@pytest.mark.parametrize("missed", [DeadlineExpired("late"), DeadlineUnmeetable("late", 1.0)])
async def test_deadline_of_the_leader_is_not_that_of_the_others(cache: ResponseCache, missed: Exception) -> None:
    model = Counted()
    model.go.clear()
    model.errors = [missed]
    leader = asyncio.create_task(cache.infer(model, request(timeout_s=5.0)))
    await settle()
    others = [asyncio.create_task(cache.infer(model, request(timeout_s=timeout_s))) for timeout_s in (None, 1000.0)]
    await settle()
    model.go.set()
    with pytest.raises(type(missed)):
        await leader
    assert [how for _, how in await asyncio.gather(*others)] == ["miss", "shared"]
    assert len(model.requests) == 2


async def test_leader_keeps_its_deadline(cache: ResponseCache) -> None:
    model = Counted()
    await cache.infer(model, request(timeout_s=1000.0))
    await cache.infer(model, request(9, timeout_s=None))
    timeouts = [each.timeout_s for each in model.requests]
    assert timeouts[0] == pytest.approx(1000.0, abs=10)
    assert timeouts[1] is None


async def test_forgotten_version_is_run_again_and_another_stays(cache: ResponseCache) -> None:
    old, new = Counted(), Counted(version="2")
    for model in (old, new):
        await cache.infer(model, request())
    before = cache.kept_bytes
    cache.forget("m", "1")
    assert cache.kept_bytes == before / 2
    assert (await cache.infer(new, request()))[1] == "hit"
    assert (await cache.infer(old, request()))[1] == "miss"


async def test_run_under_way_when_its_version_is_forgotten_is_not_kept(cache: ResponseCache) -> None:
    model = Counted()
    model.go.clear()
    waiting = asyncio.create_task(cache.infer(model, request()))
    await settle()
    cache.forget("m", "1")
    later = asyncio.create_task(cache.infer(Counted(), request(5)))
    model.go.set()
    assert (await waiting)[1] == "miss"
    await later
    assert (await cache.infer(model, request()))[1] == "miss"
    assert (await cache.infer(model, request(5)))[1] == "hit"


async def test_version_loaded_anew_does_not_get_the_answer_of_the_old_one(cache: ResponseCache) -> None:
    old, new = Counted(), Counted()
    old.go.clear()
    new.go.clear()
    waiting = [asyncio.create_task(cache.infer(old, request()))]
    await settle()
    cache.forget("m", "1")
    waiting.append(asyncio.create_task(cache.infer(new, request())))
    await settle()
    old.go.set()
    await waiting[0]
    assert cache.kept_bytes == 0
    waiting.append(asyncio.create_task(cache.infer(new, request())))
    await settle()
    new.go.set()
    assert [how for _, how in await asyncio.gather(*waiting)] == ["miss", "miss", "shared"]
    assert len(new.requests) == 1
