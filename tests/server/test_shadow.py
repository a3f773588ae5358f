"""Comparison of a new version on live requests: its rules, its bounds, and what it does to a swap."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from server import versions
from server.artifact import read_artifact
from server.background import Background
from server.metrics import Metrics
from server.model import Model
from server.providers import CPU
from server.repository import Repository
from server.settings import Settings
from server.shadow import MOST_WAITING, Shadow, Tally, disagreement
from server.tensors import InferRequest, InferResponse
from tests import models
from tests.artifacts import random_inputs, write_artifact

LOGITS = np.array([[1.0, 3.0], [5.0, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("answered", "seen", "expected"),
    [
        (LOGITS, LOGITS * 2, 0.0),
        (LOGITS, LOGITS[:, ::-1], 1.0),
        (LOGITS, np.array([[4.0, 3.0], [5.0, 2.0]], np.float32), 0.5),
        (LOGITS, LOGITS[:1], 1.0),
        (LOGITS, LOGITS.astype(np.float16), 1.0),
        (LOGITS, None, 1.0),
        (np.float32([10.0, 1.0]), np.float32([10.05, 1.05]), 0.0),
        (np.float32([10.0, 1.0]), np.float32([10.0, 1.2]), 1.0),
        (np.float32([[10.0], [1.0]]), np.float32([[10.0], [1.2]]), 1.0),  # one column has no argmax to speak of
        (np.float32([np.nan, 1.0]), np.float32([np.nan, 1.0]), 0.0),
        (np.float32([np.nan, 1.0]), np.float32([1.0, 1.0]), 1.0),
        (np.float16([60000.0]), np.float16([-60000.0]), 1.0),
        (np.float32([0.0]), np.float32([1e-9]), 1.0),
        (np.int64([1, 2]), np.int64([1, 2]), 0.0),
        (np.int64([1, 2]), np.int64([1, 3]), 1.0),
        (np.array([b"a"], object), np.array([b"a"], object), 0.0),
        (np.array([b"a"], object), np.array([b"b"], object), 1.0),
        (np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), 0.0),
    ],
)
def test_disagreement(answered: np.ndarray, seen: np.ndarray | None, expected: float):
    assert disagreement({"y": answered}, {} if seen is None else {"y": seen}) == expected


def test_the_worst_output_counts_and_only_what_the_client_got():
    same, other = np.int64([1]), np.int64([2])
    assert disagreement({"a": same, "b": same}, {"a": same, "b": other}) == 1.0
    assert disagreement({"a": same}, {"a": same, "b": other}) == 0.0
    assert disagreement({}, {"a": same}) == 0.0


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def candidate(tmp_path: Path, mlp: Path, metrics: Metrics):
    folder = write_artifact(tmp_path / "models", "mlp", "2", {"fp32": mlp})
    model = Model.load(read_artifact(folder), (CPU,), Settings(cpu_instances=1), metrics)
    yield model
    model.close()


@pytest.fixture
async def make(candidate: Model, metrics: Metrics) -> AsyncIterator[Callable[..., Shadow]]:
    background = Background()

    def shadow(share: float = 1.0, is_busy: Callable[[], bool] = lambda: False) -> Shadow:
        return Shadow(candidate, share, background, is_busy, metrics)

    yield shadow
    background.close()


def exchange(candidate: Model, factor: float = 1.0) -> tuple[InferRequest, InferResponse]:
    request = InferRequest(random_inputs(candidate.signature, rows=2))
    y = candidate.run_aside(request)["y"] * np.float32(factor)
    return request, InferResponse("mlp", "1", "", {"y": y}, "fp32", "cpu", 2, 0.0, 0.0)


async def compare(shadow: Shadow) -> Tally:
    """Compare what was offered so far."""
    while not shadow._copies.empty():
        await shadow._compare(*shadow._copies.get_nowait())
    return shadow.tally


def counted(metrics: Metrics, result: str) -> float | None:
    labels = {"model": "mlp", "version": "2", "result": result}
    return metrics.registry.get_sample_value("slipstream_shadow_requests_total", labels)


async def test_results_are_tallied_and_counted(candidate: Model, make, metrics: Metrics):
    shadow = make()
    same, differs = exchange(candidate), exchange(candidate, -1.0)
    broken = (InferRequest({"x": np.zeros((1, 3), np.float32)}), same[1])
    for pair in (same, differs, broken):
        shadow.offer(*pair)
    tally = await compare(shadow)
    assert (tally.same, tally.differs, tally.failed, tally.skipped) == (1, 1, 1, 0)
    assert 1 / 3 < tally.mean_disagreement <= 2 / 3
    assert [counted(metrics, result) for result in ("same", "differs", "failed")] == [1.0, 1.0, 1.0]
    assert "3 requests compared, 1 same, 1 differ, 1 failed" in str(tally)


@pytest.mark.parametrize(("share", "taken"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
async def test_share_of_the_offered_requests_is_taken(candidate: Model, make, share: float, taken: int):
    shadow = make(share)
    pair = exchange(candidate)
    for _ in range(4):
        shadow.offer(*pair)
    assert (await compare(shadow)).compared == taken


async def test_copies_are_bounded_and_independent_of_the_originals(candidate: Model, make):
    shadow = make()
    request, response = exchange(candidate)
    for _ in range(MOST_WAITING + 3):
        shadow.offer(request, response)
    request.inputs["x"] *= -1
    response.outputs["y"][:] = 0
    tally = await compare(shadow)
    assert (tally.same, tally.skipped) == (MOST_WAITING, 3)


async def test_nothing_is_run_while_requests_wait(candidate: Model, make, metrics: Metrics):
    busy = [False]
    shadow = make(is_busy=lambda: busy[0])
    pair = exchange(candidate)
    shadow.offer(*pair)
    busy[0] = True
    shadow.offer(*pair)
    assert shadow._copies.qsize() == 1
    tally = await compare(shadow)
    assert (tally.compared, tally.skipped) == (0, 2)


async def test_unexpected_error_of_the_new_version_counts_as_failed(candidate: Model, make, monkeypatch):
    shadow = make()
    shadow.offer(*exchange(candidate))

    def defect(request: InferRequest) -> None:
        raise KeyError("x")

    monkeypatch.setattr(candidate, "run_aside", defect)
    assert (await compare(shadow)).failed == 1


# In the repository.


@pytest.fixture
async def serve(tmp_path: Path, mlp: Path, metrics: Metrics, monkeypatch) -> AsyncIterator[Callable[..., Repository]]:
    """Make an opened repository with version 1."""
    monkeypatch.setattr(versions, "LINGER_S", 0.0)
    root = tmp_path / "served"
    write_artifact(root, "mlp", "1", {"fp32": mlp})
    made: list[Repository] = []

    async def opened(**settings: object) -> Repository:
        given = {"cpu_instances": 1, "watch_interval_s": 0.0, "shadow_share": 1.0, **settings}
        made.append(Repository(Settings(repository=root, **given), metrics))
        await made[-1].open()
        return made[-1]

    yield opened
    for repository in made:
        await repository.stop()
        repository.close()
    assert len(asyncio.all_tasks()) == 1, "a task is left"


def add(tmp_path: Path, seed: int, version: str = "2") -> None:
    model = models.save_mlp(tmp_path / f"new-{version}.onnx", seed=seed)
    write_artifact(tmp_path / "served", "mlp", version, {"fp32": model})


async def ask(repository: Repository, count: int, variant: str = "") -> None:
    """Send requests, and wait until those that are compared have been."""
    model = repository.get("mlp")
    for seed in range(count):
        await model.infer(InferRequest(random_inputs(model.signature, rows=8, seed=seed), variant=variant))
        await repository._opener.background.run(int)  # the comparison takes its turn
        await asyncio.sleep(0)
        await repository._opener.background.run(int)


async def finish(repository: Repository) -> None:
    """End the comparison as if its time were over."""
    family = repository._models["mlp"]
    candidate = family._candidate
    assert candidate is not None
    candidate.shadow.run = _done(candidate.shadow)  # type: ignore[method-assign]
    await family._finish_comparison(candidate)


def _done(shadow: Shadow):
    async def run(seconds: float):
        return shadow.tally

    return run


async def test_version_that_agrees_is_swapped_in_after_its_comparison(tmp_path: Path, serve, metrics: Metrics):
    repository = await serve(shadow_s=1000, shadow_max_disagreement=0.02)
    add(tmp_path, seed=0)
    await repository.refresh()
    assert repository.get("mlp").version == "1"
    (_, entry) = repository.index()
    assert (entry.version, entry.state) == ("2", "LOADING")
    assert "compared on live requests: 0 requests compared" in entry.reason
    await ask(repository, 5)
    await repository.refresh()  # leaves the comparison alone
    assert counted(metrics, "same") == 5.0
    await finish(repository)
    assert repository.get("mlp").version == "2"
    assert repository.get("mlp").tap is None
    assert repository.versions("mlp") == ["2"]


async def test_version_that_disagrees_is_refused_and_says_why(tmp_path: Path, serve, metrics: Metrics, caplog):
    repository = await serve(shadow_s=1000, shadow_max_disagreement=0.02)
    add(tmp_path, seed=7)
    await repository.refresh()
    await ask(repository, 5)
    await finish(repository)
    await repository.refresh()
    assert repository.get("mlp").version == "1"
    assert repository.get("mlp").tap is None
    (_, entry) = repository.index()
    assert (entry.version, entry.state) == ("2", "UNAVAILABLE")
    assert "refused after the comparison on live requests (5 requests compared" in entry.reason
    assert "allowed 0.02" in entry.reason
    labels = {"model": "mlp", "result": "refused"}
    assert metrics.registry.get_sample_value("slipstream_model_swaps_total", labels) == 1.0
    assert repository.ready
    await repository.load("mlp")  # the operator's word counts more
    assert repository.get("mlp").version == "2"


async def test_comparison_without_traffic_ends_in_a_swap(tmp_path: Path, serve):
    repository = await serve(shadow_s=0.0, shadow_max_disagreement=0.0)
    add(tmp_path, seed=7)
    await repository.refresh()
    await asyncio.gather(*repository._models["mlp"]._tasks)
    assert repository.get("mlp").version == "2"


async def test_requests_that_pin_a_variant_are_not_compared(tmp_path: Path, serve):
    repository = await serve(shadow_s=1000)
    add(tmp_path, seed=0)
    await repository.refresh()
    await ask(repository, 2, variant="fp32")
    assert repository._models["mlp"]._candidate.shadow.tally.compared == 0


async def test_load_ends_a_comparison_with_a_swap(tmp_path: Path, serve):
    repository = await serve(shadow_s=1000)
    add(tmp_path, seed=0)
    await repository.refresh()
    await repository.load("mlp")
    assert repository.versions("mlp") == ["2"]


@pytest.mark.parametrize("change", ["unload", "newer", "vanish"])
async def test_candidate_that_is_no_longer_wanted_is_closed(tmp_path: Path, serve, change: str):
    repository = await serve(shadow_s=1000)
    add(tmp_path, seed=0)
    await repository.refresh()
    candidate = repository._models["mlp"]._candidate.model
    if change == "unload":
        await repository.unload("mlp")
    elif change == "newer":
        add(tmp_path, seed=0, version="3")
        await repository.refresh()
        assert repository._models["mlp"]._candidate.model.version == "3"
    else:
        (tmp_path / "served/mlp/2").rename(tmp_path / "gone")
        await repository.refresh()
        assert repository.versions("mlp") == ["1"]
    assert candidate.state == "draining"


async def test_stop_ends_a_comparison(tmp_path: Path, serve):
    repository = await serve(shadow_s=1000)
    add(tmp_path, seed=0)
    await repository.refresh()
    await repository.stop()
    repository.close()
    assert len(asyncio.all_tasks()) == 1
