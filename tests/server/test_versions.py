"""New versions of a model that serves: real models and sessions, through the repository."""

import asyncio
import gc
import os
import shutil
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from server import opening, versions
from server.artifact import Artifact, SessionOptions
from server.errors import Draining, LoadFailed, ModelNotReady, NothingToRollBack, UnknownModel
from server.metrics import Metrics
from server.repository import Repository
from server.session import Session
from server.settings import Settings
from server.tensors import InferRequest
from tests import models
from tests.artifacts import write_artifact, write_plain

X = InferRequest({"x": np.ones((1, 64), np.float32)})
Make = Callable[..., Repository]


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LINGER_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp})
    return tmp_path / "models"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def make(folder: Path, metrics: Metrics) -> AsyncIterator[Make]:
    """Make a repository of the folder, whose watch the test calls itself; it is stopped and closed after the test."""
    made: list[Repository] = []

    def repository(**settings: object) -> Repository:
        given = {"cpu_instances": 1, "watch_interval_s": 0.0, **settings}
        made.append(Repository(Settings(repository=folder, **given), metrics))
        return made[-1]

    yield repository
    for repository in made:
        await repository.stop()
        repository.close()
    assert len(asyncio.all_tasks()) == 1, "a task is left"


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[asyncio.Event, threading.Event]]:
    """Make a step of opening one version say that it began, and wait until it may go on."""

    def hold_version(version: str, step: str = "_read") -> tuple[asyncio.Event, threading.Event]:
        loop, began, go_on, call = (
            asyncio.get_running_loop(),
            asyncio.Event(),
            threading.Event(),
            getattr(opening, step),
        )

        def held(what: Path | Artifact, *rest: object):
            if version == (what.version if isinstance(what, Artifact) else what.name):
                loop.call_soon_threadsafe(began.set)
                assert go_on.wait(30)
            return call(what, *rest)

        monkeypatch.setattr(opening, step, held)
        return began, go_on

    return hold_version


def add(folder: Path, mlp: Path, version: str, **fields: object) -> None:
    write_artifact(folder, "mlp", version, {"fp32": mlp}, **fields)


def states(repository: Repository) -> dict[str, str]:
    return {entry.version: entry.state for entry in repository.index()}


def swaps(metrics: Metrics, result: str) -> float | None:
    return metrics.registry.get_sample_value("slipstream_model_swaps_total", {"model": "mlp", "result": result})


def in_state(metrics: Metrics, state: str) -> float | None:
    return metrics.registry.get_sample_value("slipstream_model_versions", {"model": "mlp", "state": state})


async def until_closed(repository: Repository) -> None:
    """Wait until nothing retires any more."""
    for family in repository._models.values():
        await asyncio.gather(*(task for _, task in family._retiring.values()))


async def test_new_version_becomes_the_default_and_the_old_one_is_closed(folder, mlp, make, metrics):
    repository = make()
    await repository.open()
    old = repository.get("mlp")
    add(folder, mlp, "2")
    await repository.refresh()
    assert repository.get("mlp").version == "2"
    assert states(repository) == {"1": "UNLOADING", "2": "READY"}
    await until_closed(repository)
    assert states(repository) == {"2": "READY"}
    with pytest.raises(Draining):
        await old.infer(X)
    assert (swaps(metrics, "swapped"), in_state(metrics, "ready")) == (1.0, 1.0)
    assert b'slipstream_model_ready{model="mlp",version="2"} 1.0' in metrics.render()[0]
    assert b'slipstream_model_ready{model="mlp",version="1"}' not in metrics.render()[0]
    assert b'slipstream_lane_up{device="cpu",model="mlp",variant="fp32",version="1"}' not in metrics.render()[0]


async def test_swap_under_load_fails_no_request(folder, mlp, make):
    repository = make()
    await repository.open()
    stop, seen = asyncio.Event(), set()

    async def client() -> None:
        while not stop.is_set():
            response = await repository.get("mlp").infer(X)
            seen.add(response.version)

    clients = [asyncio.create_task(client()) for _ in range(8)]
    for version in ("2", "3", "4"):
        add(folder, models.save_mlp(folder.parent / f"{version}.onnx", seed=int(version)), version)
        await repository.refresh()
        await until_closed(repository)
    stop.set()
    await asyncio.gather(*clients)
    assert seen >= {"1", "4"}
    assert repository.versions("mlp") == ["4"]


async def test_request_that_had_found_the_old_version_is_answered(folder, mlp, make, monkeypatch):
    monkeypatch.setattr(versions, "LINGER_S", 1000.0)
    repository = make()
    await repository.open()
    found = repository.get("mlp")
    add(folder, mlp, "2")
    await repository.refresh()
    assert (await found.infer(X)).version == "1"
    with pytest.raises(ModelNotReady, match="version 1 is draining"):
        repository.get("mlp", "1")


async def test_what_is_queued_and_running_at_a_swap_is_answered(folder, mlp, make, monkeypatch):
    repository = make()
    await repository.open()
    loop, running, gate, run = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), Session.run

    def gated(session: Session, *args: object):
        if "mlp/1/" in str(session._path):
            loop.call_soon_threadsafe(running.set)
            assert gate.wait(5)
        return run(session, *args)

    monkeypatch.setattr(Session, "run", gated)
    requests = [asyncio.ensure_future(repository.get("mlp").infer(X))]
    await asyncio.wait_for(running.wait(), 30)
    requests += [asyncio.ensure_future(repository.get("mlp").infer(X)) for _ in range(5)]
    await asyncio.sleep(0)  # lets them be admitted
    add(folder, mlp, "2")
    await repository.refresh()
    assert (await repository.get("mlp").infer(X)).version == "2"
    gate.set()
    assert [response.version for response in await asyncio.gather(*requests)] == ["1"] * 6
    await until_closed(repository)


async def test_kept_versions_go_on_to_answer_by_name(folder, mlp, make):
    repository = make(keep_versions=2)
    await repository.open()
    add(folder, mlp, "2")
    await repository.refresh()
    assert repository.versions("mlp") == ["1", "2"]
    assert (await repository.get("mlp", "1").infer(X)).version == "1"
    assert repository.get("mlp").version == "2"
    add(folder, mlp, "3")
    await repository.refresh()
    assert repository.versions("mlp") == ["2", "3"]


async def test_new_model_comes_in(folder, mlp, make):
    repository = make()
    await repository.open()
    write_plain(folder, "other", "1", mlp)
    await repository.refresh()
    assert (await repository.get("other").infer(X)).model == "other"


async def test_incomplete_folder_is_left_alone_until_its_manifest_comes(folder, mlp, make):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    manifest = folder / "mlp/2/manifest.json"
    manifest.rename(folder / "later")
    await repository.refresh()
    assert repository.versions("mlp") == ["1"]
    (folder / "later").rename(manifest)
    await repository.refresh()
    assert repository.versions("mlp") == ["2"]


async def test_broken_version_is_recorded_once_and_tried_again_when_its_files_change(
    folder, mlp, make, metrics, caplog
):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    good = (folder / "mlp/2/fp32/model.onnx").read_bytes()
    (folder / "mlp/2/fp32/model.onnx").write_bytes(good[:-1])
    for _ in range(3):
        await repository.refresh()
    assert repository.get("mlp").version == "1"
    assert repository.ready
    assert "SHA-256" in repository.failures["mlp", "2"]
    assert caplog.text.count("mlp/2 cannot be served") == 1
    assert (swaps(metrics, "failed"), in_state(metrics, "failed")) == (1.0, 1.0)
    assert states(repository) == {"1": "READY", "2": "UNAVAILABLE"}
    (folder / "mlp/2/fp32/model.onnx").write_bytes(good)
    await repository.refresh()
    assert repository.get("mlp").version == "2"
    assert repository.failures == {}
    assert in_state(metrics, "failed") == 0.0


async def test_version_that_does_not_reproduce_its_golden_outputs_never_serves(folder, mlp, make):
    repository = make()
    await repository.open()
    add(folder, mlp, "2", min_sqnr_db=500.0)
    await repository.refresh()
    assert repository.get("mlp").version == "1"


async def test_unexpected_error_of_opening_harms_nothing(folder, mlp, make, monkeypatch):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")

    def broken(folder: Path):
        raise KeyError("a defect")

    monkeypatch.setattr(opening, "_read", broken)
    await repository.refresh()
    assert repository.failures == {("mlp", "2"): "'a defect'"}
    assert repository.get("mlp").version == "1"


async def test_version_that_vanishes_while_it_opens_is_a_failure_and_then_forgotten(folder, mlp, make, hold):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    began, go_on = hold("2")
    refreshing = asyncio.create_task(repository.refresh())
    await asyncio.wait_for(began.wait(), 30)
    assert states(repository) == {"1": "READY", "2": "LOADING"}
    shutil.rmtree(folder / "mlp/2")
    go_on.set()
    await refreshing
    assert repository.get("mlp").version == "1"
    assert list(repository.failures) == [("mlp", "2")]
    await repository.refresh()
    assert repository.failures == {}


async def test_folder_that_disappears_leaves_for_a_lower_version(folder, mlp, make):
    add(folder, mlp, "2")
    repository = make()
    await repository.open()
    shutil.rmtree(folder / "mlp/2")
    await repository.refresh()
    assert repository.get("mlp").version == "1"
    shutil.rmtree(folder / "mlp")
    await repository.refresh()
    await until_closed(repository)
    await repository.refresh()
    with pytest.raises(UnknownModel, match="'mlp' is not found"):
        repository.get("mlp")
    assert repository.names() == []


async def test_version_in_service_whose_manifest_is_gone_for_a_moment_stays(folder, mlp, make):
    repository = make()
    await repository.open()
    (folder / "mlp/1/manifest.json").rename(folder / "mlp/1/manifest.old")
    await repository.refresh()
    assert repository.get("mlp").version == "1"


async def test_closed_versions_leave_no_session(folder, mlp, make, monkeypatch):
    alive: weakref.WeakSet[Session] = weakref.WeakSet()
    init = Session.__init__

    def count(session: Session, *args: object) -> None:
        alive.add(session)
        init(session, *args)

    monkeypatch.setattr(Session, "__init__", count)
    repository = make()
    await repository.open()
    count_before = threading.active_count()
    for version in ("2", "3", "4"):
        add(folder, mlp, version)
        await repository.refresh()
        await until_closed(repository)
        await repository.unload("mlp")
        await until_closed(repository)
        await repository.load("mlp")
    gc.collect()
    assert len(alive) == 1
    assert threading.active_count() <= count_before + 1  # asyncio's own for scans


def threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
@pytest.mark.parametrize("session_threads", [1, 2])
async def test_no_thread_that_serves_has_low_priority(folder, mlp, make, session_threads: int):
    repository = make()
    await repository.open()
    add(folder, mlp, "2", options=SessionOptions(intra_op_threads=session_threads))
    before = threads()
    await repository.refresh()
    new = threads() - before
    assert len(new) >= session_threads  # the lane's, and the session's own beside its callers
    background = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("background_")}
    assert len(background) == 1
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in new - background} == {mine}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in background} != {mine}


async def test_load_picks_up_a_version_at_once_and_says_why_it_cannot(folder, mlp, make):
    repository = make()
    await repository.open()
    add(folder, mlp, "2", min_sqnr_db=500.0)
    with pytest.raises(LoadFailed, match=r"failed to load 'mlp': version 2: no variant of mlp/2 can be served"):
        await repository.load("mlp")
    assert repository.get("mlp").version == "1"
    add(folder, mlp, "3")
    await repository.load("mlp")
    assert repository.get("mlp").version == "3"


async def test_two_loads_at_once_open_the_version_once(folder, mlp, make, hold, metrics):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    began, go_on = hold("2")
    loads = [asyncio.create_task(repository.load("mlp")) for _ in range(2)]
    await asyncio.wait_for(began.wait(), 30)
    go_on.set()
    await asyncio.gather(*loads)
    assert repository.versions("mlp") == ["2"]
    assert swaps(metrics, "swapped") == 1.0


async def test_unload_drains_and_lasts_until_load(folder, mlp, make):
    repository = make()
    await repository.open()
    waiting = [asyncio.ensure_future(repository.get("mlp").infer(X)) for _ in range(10)]
    await asyncio.sleep(0)  # lets them be admitted
    await repository.unload("mlp")
    with pytest.raises(ModelNotReady, match="version 1 is draining"):
        repository.get("mlp")
    assert {response.version for response in await asyncio.gather(*waiting)} == {"1"}
    await until_closed(repository)
    add(folder, mlp, "2")
    await repository.refresh()
    with pytest.raises(ModelNotReady, match="version 1 was unloaded"):
        repository.get("mlp")
    assert states(repository) == {"1": "UNAVAILABLE"}
    await repository.load("mlp")
    assert repository.get("mlp").version == "2"
    assert states(repository) == {"2": "READY"}


async def test_unload_during_a_load_comes_after_it(folder, mlp, make, hold):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    began, go_on = hold("2")
    loading = asyncio.create_task(repository.load("mlp"))
    await asyncio.wait_for(began.wait(), 30)
    unloading = asyncio.create_task(repository.unload("mlp"))
    go_on.set()
    await asyncio.gather(loading, unloading)
    await until_closed(repository)
    with pytest.raises(ModelNotReady, match="version 2 was unloaded"):
        repository.get("mlp")


async def test_load_right_after_unload_takes_the_version_back(folder, mlp, make, monkeypatch):
    monkeypatch.setattr(versions, "LINGER_S", 1000.0)
    repository = make()
    await repository.open()
    model = repository.get("mlp")
    await repository.unload("mlp")
    await repository.load("mlp")
    assert repository.get("mlp") is model


async def test_rollback_goes_back_version_by_version_and_says_when_there_is_none(folder, mlp, make, metrics):
    repository = make()
    await repository.open()
    for version in ("2", "3"):
        add(folder, mlp, version)
        await repository.refresh()
    assert await repository.rollback("mlp") == "2"
    assert repository.get("mlp").version == "2"
    assert await repository.rollback("mlp") == "1"
    await repository.refresh()
    assert repository.versions("mlp") == ["1"]
    with pytest.raises(NothingToRollBack, match="model 'mlp' has no version below 1 to go back to"):
        await repository.rollback("mlp")
    await until_closed(repository)
    assert states(repository) == {"1": "READY", "2": "UNAVAILABLE", "3": "UNAVAILABLE"}
    assert swaps(metrics, "rolled_back") == 2.0
    add(folder, mlp, "4")
    await repository.refresh()
    assert repository.get("mlp").version == "4"


async def test_load_brings_back_what_was_rolled_back(folder, mlp, make):
    add(folder, mlp, "2")
    repository = make()
    await repository.open()
    assert await repository.rollback("mlp") == "1"
    await repository.load("mlp")
    assert repository.get("mlp").version == "2"


async def test_rollback_to_a_version_that_no_longer_opens_changes_nothing(folder, mlp, make):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    await repository.refresh()
    await until_closed(repository)
    (folder / "mlp/1/golden.npz").write_bytes(b"")
    with pytest.raises(LoadFailed, match="version 1"):
        await repository.rollback("mlp")
    assert repository.get("mlp").version == "2"


async def test_rollback_of_an_unloaded_model_has_nothing_to_leave(folder, mlp, make):
    repository = make()
    await repository.open()
    await repository.unload("mlp")
    with pytest.raises(NothingToRollBack, match="does not serve; load it first"):
        await repository.rollback("mlp")


async def test_rollback_is_at_once_while_the_old_version_is_still_open(folder, mlp, make, monkeypatch):
    monkeypatch.setattr(versions, "LINGER_S", 1000.0)
    repository = make()
    await repository.open()
    model = repository.get("mlp")
    add(folder, mlp, "2")
    await repository.refresh()
    await repository.rollback("mlp")
    assert repository.get("mlp") is model


@pytest.mark.parametrize("by", ["watch", "load"])
@pytest.mark.parametrize("step", ["_read", "_load"])
async def test_shutdown_during_a_load_leaves_nothing(folder, mlp, make, hold, by: str, step: str):
    repository = make()
    await repository.open()
    add(folder, mlp, "2")
    began, go_on = hold("2", step)
    change = asyncio.create_task(repository.refresh() if by == "watch" else repository.load("mlp"))
    await asyncio.wait_for(began.wait(), 30)
    await repository.stop()
    assert (await repository.get("mlp").infer(X)).version == "1"
    await repository.drain()
    repository.close()
    go_on.set()
    with pytest.raises(Draining):
        await change
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")} == set()
