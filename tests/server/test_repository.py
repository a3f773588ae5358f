import asyncio
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from server import opening
from server.errors import Draining, ModelNotReady, ProviderUnavailable, StartupError, UnknownModel
from server.metrics import Metrics
from server.repository import Repository
from server.settings import Settings
from server.tensors import InferRequest
from server.versions import Versions
from tests.artifacts import write_artifact, write_plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
async def make(folder: Path):
    """Make a repository of the folder; it is closed after the test."""
    made: list[Repository] = []

    def repository(**settings: object) -> Repository:
        made.append(Repository(Settings(repository=folder, cpu_instances=1, **settings), Metrics()))
        return made[-1]

    yield repository
    for repository in made:
        repository.close()


async def test_serves_several_models_and_versions(folder: Path, mlp: Path, make):
    for version in ("8", "9", "10"):
        write_artifact(folder, "mlp", version, {"fp32": mlp})
    write_plain(folder, "plain", "1", mlp)
    repository = make(keep_versions=2)
    assert not repository.ready
    await repository.open()
    assert repository.ready
    assert repository.failures == {}
    assert repository.names() == ["mlp", "plain"]
    assert repository.versions("mlp") == ["9", "10"]
    assert repository.get("mlp").version == "10"
    assert repository.get("mlp", "9").version == "9"
    assert repository.get("plain").unoptimized
    response = await repository.get("plain").infer(InferRequest({"x": np.zeros((2, 64), np.float32)}))
    assert response.outputs["y"].shape == (2, 10)


async def test_only_the_newest_version_serves_by_default(folder: Path, mlp: Path, make):
    for version in ("9", "10"):
        write_artifact(folder, "mlp", version, {"fp32": mlp})
    repository = make()
    await repository.open()
    assert repository.versions("mlp") == ["10"]
    with pytest.raises(UnknownModel, match="'mlp' version 9 is not found"):
        repository.get("mlp", "9")


async def test_unknown_models_and_versions(folder: Path, mlp: Path, make):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    for ask in (repository.get, repository.versions):
        with pytest.raises(UnknownModel, match=r"^Request for unknown model: 'x' is not found$"):
            ask("x")
    with pytest.raises(UnknownModel, match=r"^Request for unknown model: 'x' is not found$"):
        repository.get("x", "1")
    for version in ("9", "01", "latest"):
        with pytest.raises(UnknownModel, match=rf"^Request for unknown model: 'mlp' version {version} is not found$"):
            repository.get("mlp", version)


async def test_failing_model_does_not_stop_the_others(folder: Path, mlp: Path, make, caplog):
    write_artifact(folder, "broken", "1", {"fp32": mlp})
    (folder / "broken/1/manifest.json").write_bytes(b"{")
    write_artifact(folder, "good", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    assert not repository.ready
    assert list(repository.failures) == [("broken", "1")]
    assert "cannot read" in repository.failures["broken", "1"]
    assert "broken/1 cannot be served" in caplog.text
    assert repository.names() == ["broken", "good"]
    assert repository.versions("broken") == []
    assert repository.get("good").ready
    with pytest.raises(ModelNotReady, match="model 'broken' is not ready: version 1 failed to load") as caught:
        repository.get("broken")
    assert str(folder) not in str(caught.value)


async def test_highest_version_that_is_ready_is_the_default(folder: Path, mlp: Path, make):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    write_artifact(folder, "mlp", "2", {"fp32": mlp}, min_sqnr_db=500.0)
    repository = make()
    await repository.open()
    assert repository.get("mlp").version == "1"
    assert repository.ready
    with pytest.raises(ModelNotReady, match="version 2 failed to load"):
        repository.get("mlp", "2")


async def test_loop_stays_free_and_each_model_serves_as_soon_as_it_is_open(folder: Path, mlp: Path, make, monkeypatch):
    write_artifact(folder, "a", "1", {"fp32": mlp})
    write_artifact(folder, "b", "1", {"fp32": mlp})
    loop, gate, reached = asyncio.get_running_loop(), threading.Event(), asyncio.Event()
    load = opening._read

    def gated(version: Path):
        if version.parent.name == "b":
            loop.call_soon_threadsafe(reached.set)
            assert gate.wait(30)
        return load(version)

    monkeypatch.setattr(opening, "_read", gated)
    repository = make()
    task = asyncio.create_task(repository.open())
    await asyncio.wait_for(reached.wait(), 30)
    assert repository.get("a").ready
    assert repository.names() == ["a", "b"]
    assert not repository.ready
    with pytest.raises(ModelNotReady, match="model 'b' is not ready: version 1 is loading"):
        repository.get("b")
    gate.set()
    await task
    assert repository.get("b").ready
    assert repository.ready


async def test_folders_that_are_no_models_are_named_in_one_warning(folder: Path, mlp: Path, make, caplog):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    for ignored in ("mlp/2", "mlp/latest", "mlp/01", "lost+found", ".git/1", "mlp/.cache"):
        (folder / ignored).mkdir(parents=True)
    shutil.copyfile(mlp, folder / "mlp/01/model.onnx")
    (folder / "README.md").touch()
    (folder / "mlp/config.pbtxt").touch()
    repository = make()
    await repository.open()
    assert repository.ready
    assert repository.names() == ["mlp"]
    assert repository.versions("mlp") == ["1"]
    assert not repository.get("mlp").unoptimized
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "lost+found, mlp/01, mlp/2, mlp/latest;" in warning


async def test_name_with_other_characters_is_refused(folder: Path, mlp: Path, make):
    write_artifact(folder, "my model", "1", {"fp32": mlp})
    write_artifact(folder, "my-model_1.0", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    assert "'my model' has characters other than" in repository.failures["my model", "1"]
    assert repository.get("my-model_1.0").ready


def prepare(folder: Path, state: str) -> None:
    if state == "file":
        folder.write_text("")
    elif state != "missing":
        (folder / "mlp/latest" if state == "no version" else folder).mkdir(parents=True)


@pytest.mark.parametrize("state", ["missing", "empty", "file", "no version"])
async def test_repository_without_models_says_what_to_run(folder: Path, make, state: str):
    prepare(folder, state)
    repository = make()
    with pytest.raises(
        StartupError, match=rf"no models in {folder}: run `slipstream optimize MODEL\.onnx --repository {folder} --name"
    ):
        await repository.open()
    assert not repository.ready


async def test_required_gpu_that_does_not_work_ends_the_start(folder: Path, mlp: Path, make, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make(gpu="require")
    with pytest.raises(ProviderUnavailable):
        await repository.open()
    assert not repository.ready


async def test_drained_repository_is_not_ready(folder: Path, mlp: Path, make):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    await repository.drain()
    assert not repository.ready
    with pytest.raises(ModelNotReady, match="version 1 is draining"):
        repository.get("mlp")


async def test_required_models_decide_readiness(folder: Path, mlp: Path, make):
    write_artifact(folder, "bad", "1", {"fp32": mlp}, min_sqnr_db=500.0)
    write_artifact(folder, "good", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    assert not repository.ready
    shutil.rmtree(folder / "bad")
    await repository.refresh()
    assert repository.ready
    assert repository.names() == ["good"]
    write_artifact(folder, "late", "1", {"fp32": mlp}, min_sqnr_db=500.0)
    await repository.refresh()
    assert list(repository.failures) == [("late", "1")]
    assert repository.ready


async def test_unload_of_one_model_keeps_the_server_ready(folder: Path, mlp: Path, make):
    for name in ("a", "b"):
        write_artifact(folder, name, "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    await repository.unload("a")
    assert repository.ready
    with pytest.raises(ModelNotReady, match="model 'a' is not ready"):
        repository.get("a")


async def test_watch_notices_a_new_version_by_itself(folder: Path, mlp: Path, make, monkeypatch):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make(watch_interval_s=0.001)
    swapped = asyncio.Event()
    await repository.open()
    publish = Versions._publish

    def publish_and_tell(versions: Versions) -> None:
        publish(versions)
        if versions.default is not None and versions.default.version == "2":
            swapped.set()

    monkeypatch.setattr(Versions, "_publish", publish_and_tell)
    write_artifact(folder, "mlp", "2", {"fp32": mlp})
    await asyncio.wait_for(swapped.wait(), 30)
    assert repository.get("mlp").version == "2"


def move(source: Path, target: Path) -> None:
    source.rename(target)


async def test_watch_survives_a_folder_that_cannot_be_listed(folder: Path, mlp: Path, make, caplog):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    move(folder, folder.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        await repository.refresh()
    assert repository.get("mlp").ready
    move(folder.with_name("elsewhere"), folder)
    await repository.refresh()
    assert repository.ready


async def test_folders_ignored_as_before_are_not_named_again(folder: Path, mlp: Path, make, caplog):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    (folder / "mlp/latest").mkdir()
    repository = make()
    await repository.open()
    await repository.refresh()
    assert caplog.text.count("mlp/latest") == 1


async def test_control_of_unknown_models(folder: Path, mlp: Path, make):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make()
    await repository.open()
    for control in (repository.load, repository.unload, repository.rollback):
        with pytest.raises(UnknownModel, match="'ghost' is not found"):
            await control("ghost")
    assert repository.names() == ["mlp"]


async def test_control_is_refused_while_stopping(folder: Path, mlp: Path, make):
    write_artifact(folder, "mlp", "1", {"fp32": mlp})
    repository = make(watch_interval_s=1000)
    await repository.open()
    await repository.stop()
    for control in (repository.load, repository.unload, repository.rollback):
        with pytest.raises(Draining):
            await control("mlp")
    assert repository.get("mlp").ready
    assert len(asyncio.all_tasks()) == 1
