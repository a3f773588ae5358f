"""Engines that are built for models in service.

The builder is a real process, a small script that copies the model; what opens its plans is a real session on the CPU
that stands for a device.
"""

import asyncio
import importlib.util
import json
import logging
import shlex
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from server import building, lanes, opening
from server.artifact import (
    Batching,
    Golden,
    LatencyTable,
    Manifest,
    Profile,
    SessionOptions,
    Source,
    Variant,
    digest_of,
    read_artifact,
)
from server.errors import InferenceFailed
from server.metrics import Metrics
from server.providers import CPU, Device, Devices
from server.repository import Repository
from server.session import Session
from server.settings import Settings
from server.staged import open_variant
from server.tensors import Array, InferRequest, Signature, Tensors, TensorSpec
from tests import models
from tests.artifacts import edit_manifest, write_artifact, write_plain

GPU = Device("tensorrt")
X = InferRequest({"x": np.ones((1, 64), np.float32)})
SLOW, FAST = (LatencyTable((1,), (ms,), (ms,), (ms,), (ms,)) for ms in (100.0, 1e-6))
COPY = """
import json, os, pathlib, shutil, sys
model, options = sys.argv[1], sys.argv[2:]
plan = pathlib.Path(options[options.index("--out") + 1])
plan.parent.mkdir(parents=True, exist_ok=True)
shutil.copyfile(model, plan)
seen = {"options": options, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "nice": os.nice(0)}
plan.with_suffix(".json").write_text(json.dumps(seen))
"""


class Standing:
    """A session on the CPU that stands for an engine; it fails while ``is_broken``."""

    is_broken = False
    model: Path | None = None  # what runs in place of the plan, which is a model itself when its builder is the script
    opened: list["Standing"]

    def __init__(self, plan: Path, device: Device) -> None:
        file = plan.with_suffix(".onnx")
        shutil.copyfile(Standing.model or plan, file)
        self._session = Session(file, CPU, SessionOptions())
        self.signature, self.device, self.providers = self._session.signature, device, self._session.providers
        self.is_closed = False
        Standing.opened.append(self)

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        if Standing.is_broken:
            raise InferenceFailed("the device is gone")
        return self._session.run(inputs, outputs)

    def close(self) -> None:
        self.is_closed = True
        self._session.close()


@pytest.fixture(autouse=True)
def standing(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(folder: Path, variant: Variant, devices: Sequence[Device], *rest):
        if variant.file.endswith(".plan"):
            return Standing(folder / variant.file, devices[0])
        return open_variant(folder, variant, devices, *rest)

    monkeypatch.setattr(lanes, "open_variant", opener)
    monkeypatch.setattr(opening, "find_devices", lambda *_: Devices((GPU, CPU)))
    monkeypatch.setattr(Standing, "opened", [], raising=False)
    monkeypatch.setattr(Standing, "is_broken", False)


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp}, latency={"fp32": SLOW})
    return tmp_path / "models"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


Make = Callable[..., Repository]


@pytest.fixture
async def make(tmp_path: Path, folder: Path, metrics: Metrics) -> AsyncIterator[Make]:
    """Make a repository whose builder is a script; ``None`` is the one that the server has."""
    made: list[Repository] = []

    def repository(script: str | None = COPY, **settings: object) -> Repository:
        if script is not None:
            file = tmp_path / "builder.py"
            file.write_text(script)
            settings["engine_builder"] = shlex.join([sys.executable, str(file)])
        given = {"repository": folder, "cpu_instances": 1, "engine_cache": tmp_path / "engines", **settings}
        made.append(Repository(Settings(**given), metrics))
        return made[-1]

    yield repository
    for repository in made:
        await repository.stop()
        repository.close()
    assert len(asyncio.all_tasks()) == 1, "a task is left"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  (nothing tells when it does)
            await asyncio.sleep(0.01)


def builds(metrics: Metrics, result: str) -> float | None:
    return metrics.registry.get_sample_value("slipstream_engine_builds_total", {"model": "mlp", "result": result})


async def test_engine_is_swapped_in_under_load_and_fails_no_request(make, metrics):
    repository = make()
    await repository.open()
    model = repository.get("mlp")
    assert model.variants == ("fp32",), "it serves before its engine is there"
    stop, devices = asyncio.Event(), []

    async def client() -> None:
        while not stop.is_set():
            response = await repository.get("mlp").infer(X)
            assert response.outputs["y"].shape == (1, 10)
            devices.append(response.device)

    clients = [asyncio.create_task(client()) for _ in range(4)]
    await until(lambda: builds(metrics, "served") == 1)
    await until(lambda: "tensorrt:0" in devices)
    stop.set()
    await asyncio.gather(*clients)
    assert devices[0] == "cpu"
    assert model.variants == ("fp32-engine", "fp32")
    assert repository.get("mlp") is model
    pinned = await model.infer(InferRequest(X.inputs, variant="fp32"))
    assert (pinned.variant, pinned.device) == ("fp32", "cpu")
    pinned = await model.infer(InferRequest(X.inputs, variant="fp32-engine"))
    assert (pinned.variant, pinned.device) == ("fp32-engine", "tensorrt:0")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)
async def test_real_builder_understands_the_server_and_keeps_its_plans(make, metrics, mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(Standing, "model", mlp)  # no runtime opens a real plan without a GPU
    plan = tmp_path / "engines" / "mlp" / "1" / "fp32-0.plan"
    contents = []
    for starts in (1, 2):
        repository = make(None)
        await repository.open()
        await until(lambda: builds(metrics, "served") == starts)  # noqa: B023  (waited for here)
        contents.append(plan.read_bytes())
        await repository.stop()
    assert len(contents[0]) > 10_000
    assert contents[0] == contents[1]
    assert len([*(tmp_path / "engines" / "plans").rglob("model.plan")]) == 1


async def test_builder_is_told_what_to_build_and_takes_no_cores_from_requests(make, metrics, tmp_path):
    repository = make()
    await repository.open()
    await until(lambda: builds(metrics, "served") == 1)
    plan = tmp_path / "engines" / "mlp" / "1" / "fp32-0.plan"
    seen = json.loads(plan.with_suffix(".json").read_text())
    assert seen["options"] == [
        *("--out", str(plan), "--cache", str(tmp_path / "engines" / "plans")),
        *("--profile", "x=1x64:32x64:32x64"),
    ]
    assert (seen["gpu"], seen["nice"]) == ("0", 19)


def with_engine(folder: Path, model: Path) -> None:
    """Put an engine of another model file into the artifact."""
    version = folder / "mlp" / "1"
    plan = version / "engines" / "fp32.plan"
    plan.parent.mkdir()
    shutil.copyfile(model, plan)
    (variant,) = read_artifact(version).variants
    edit_manifest(
        version,
        variants=(
            msgspec.structs.replace(
                variant,
                engine="engines/fp32.plan",
                engine_sha256=digest_of(plan),
                profile=Profile({"x": (1, 64)}, {"x": (8, 64)}, {"x": (8, 64)}),
            ),
        ),
    )


async def test_engine_of_the_artifact_is_used_without_a_build(make, metrics, folder, mlp, tmp_path):
    with_engine(folder, mlp)
    repository = make("import sys; sys.exit('not to be called')")
    await repository.open()
    await until(lambda: builds(metrics, "served") == 1)
    assert (await repository.get("mlp").infer(X)).device == "tensorrt:0"
    assert not (tmp_path / "engines").exists()


async def test_engine_of_the_artifact_that_does_not_fit_is_built_again(make, metrics, folder, tmp_path, caplog):
    with_engine(folder, models.save_mlp(tmp_path / "other.onnx", seed=1))
    caplog.set_level(logging.INFO)
    repository = make()
    await repository.open()
    await until(lambda: builds(metrics, "served") == 1)
    assert "is built, that of the artifact does not fit: variant fp32-engine on tensorrt:0 reproduces" in caplog.text
    assert (await repository.get("mlp").infer(X)).device == "tensorrt:0"
    assert [engine.is_closed for engine in Standing.opened] == [True, False]


async def test_failing_engine_leaves_its_work_to_the_lanes_before_it(make, metrics):
    repository = make()
    await repository.open()
    await until(lambda: builds(metrics, "served") == 1)
    Standing.is_broken = True
    answers = [await repository.get("mlp").infer(X) for _ in range(20)]
    assert {answer.device for answer in answers} == {"cpu"}
    assert set(repository.lanes_down["mlp", "1"]) == {"fp32-engine on tensorrt:0"}
    assert repository.ready
    Standing.is_broken = False
    await until(lambda: not repository.lanes_down)
    assert (await repository.get("mlp").infer(X)).device == "tensorrt:0"


async def test_engine_that_is_slower_is_not_used(make, metrics, folder, mlp, caplog):
    shutil.rmtree(folder)
    write_artifact(folder, "mlp", "1", {"fp32": mlp}, latency={"fp32": FAST})
    repository = make()
    await repository.open()
    await until(lambda: builds(metrics, "slower") == 1)
    assert "the engine of fp32 on tensorrt:0 is no faster than what serves" in caplog.text
    assert repository.get("mlp").variants == ("fp32",)
    assert [engine.is_closed for engine in Standing.opened] == [True]
    assert (await repository.get("mlp").infer(X)).device == "cpu"


async def test_engine_that_does_not_reproduce_the_original_is_not_used(make, metrics, tmp_path, caplog):
    other = models.save_mlp(tmp_path / "other.onnx", seed=1)
    repository = make(COPY.replace("copyfile(model,", f"copyfile({str(other)!r},"))
    await repository.open()
    await until(lambda: builds(metrics, "failed") == 1)
    assert "variant fp32-engine on tensorrt:0 reproduces the original with" in caplog.text
    assert [engine.is_closed for engine in Standing.opened] == [True]
    assert (await repository.get("mlp").infer(X)).device == "cpu"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import sys; sys.exit('the parser refuses node 7')", "exit code 1: the parser refuses node 7"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9: no message"),
        ("", "fp32-0.plan"),  # ends well and writes nothing
    ],
)
async def test_builder_that_fails_harms_nobody(make, metrics, caplog, script, told):
    repository = make(script)
    await repository.open()
    await until(lambda: builds(metrics, "failed") == 1)
    assert told in caplog.text
    assert (await repository.get("mlp").infer(X)).device == "cpu"


async def test_missing_builder_harms_nobody(make, metrics, caplog):
    repository = make(None, engine_builder="no-such-builder --fast")
    await repository.open()
    await until(lambda: builds(metrics, "failed") == 1)
    assert "no-such-builder" in caplog.text


async def test_stop_ends_the_builder_and_its_own_processes(make, tmp_path):
    script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pids")!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(tmp_path / "pids")!r} + ".new", {str(tmp_path / "pids")!r})
time.sleep(600)
"""
    repository = make(script)
    await repository.open()
    await until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    await repository.stop()
    await until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def test_engine_comes_too_late_for_a_model_that_leaves(make, metrics, tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"
    waiting = f"""
import pathlib, time
pathlib.Path({str(begun)!r}).touch()
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)
"""
    repository = make(waiting + COPY)
    await repository.open()
    model = repository.get("mlp")
    await until(begun.exists)
    model.close()
    go.touch()
    await until(lambda: builds(metrics, "late") == 1)
    assert all(engine.is_closed for engine in Standing.opened)


async def test_timeout_ends_the_builder(make, metrics, monkeypatch, caplog):
    monkeypatch.setattr(building, "_TIMEOUT_S", 0.3)
    repository = make("import time; time.sleep(600)")
    await repository.open()
    await until(lambda: builds(metrics, "failed") == 1)
    assert "the builder did not end within 0.3 s" in caplog.text


async def test_nothing_is_built_without_such_a_device_or_when_off(make, monkeypatch, tmp_path):
    repository = make(engines="off")
    await repository.open()
    monkeypatch.setattr(opening, "find_devices", lambda *_: Devices((Device("cuda"), CPU)))
    other = make()
    await other.open()
    assert not (tmp_path / "engines").exists()
    assert len(asyncio.all_tasks()) == 3, "the test and two watches"


async def test_plain_model_gets_no_engine_since_nothing_could_prove_it(make, folder, mlp, caplog):
    shutil.rmtree(folder)
    write_plain(folder, "mlp", "1", mlp)
    caplog.set_level(logging.INFO)
    repository = make()
    await repository.open()
    assert "mlp/1: no engine, since nothing could prove it: optimize the model" in caplog.text


async def test_cache_that_cannot_be_written_harms_nobody(make, metrics, tmp_path, caplog):
    (tmp_path / "engines").write_text("a file where a folder should be")
    repository = make()
    await repository.open()
    await until(lambda: builds(metrics, "failed") == 1)
    assert "FileExistsError" in caplog.text or "NotADirectoryError" in caplog.text


def manifest_of(signature: Signature, variants: Sequence[Variant] = (), *, batchable: bool = True) -> Manifest:
    return Manifest(
        1, "m", "1", signature, Batching(batchable, "", max_rows=8), Source("m.onnx", "", 0), tuple(variants)
    )


def test_profile_goes_from_one_to_the_largest_that_is_known():
    ids = TensorSpec("ids", "INT64", ("batch", "sequence"))
    image = TensorSpec("image", "FP32", ("batch", 3, 4))
    scale = TensorSpec("scale", "FP32", ())
    signature = Signature((ids, image, scale), ())
    golden = Golden({"ids": np.zeros((5, 128), np.int64), "image": np.zeros((5, 3, 4)), "scale": np.zeros(())}, {})
    lowest = {"ids": (1, 1), "image": (1, 3, 4)}
    highest = {"ids": (8, 128), "image": (8, 3, 4)}
    assert building.profile_of(manifest_of(signature), golden) == Profile(lowest, highest, highest)
    alone = building.profile_of(manifest_of(signature, batchable=False), golden)
    assert alone.maximum == {"ids": (5, 128), "image": (5, 3, 4)}


def test_engines_are_made_of_cuda_variants_or_else_of_full_precision():
    def variant(name: str, provider: str, precision: str, **fields) -> Variant:
        return Variant(name, f"{name}/model.onnx", "", 0, precision, provider, **fields)

    int8 = variant("int8", "cpu", "int8-static")
    fp32, exact = variant("fp32", "cpu", "fp32"), variant("original", "cpu", "fp32")
    fp16, fp32_cuda = variant("fp16-cuda", "cuda", "fp16"), variant("fp32-cuda", "cuda", "fp32")
    cut = variant("fp32-stages", "cuda", "fp32", stages={"b": ""})

    def chosen(*variants: Variant, served: Sequence[str] = ()) -> list[str]:
        manifest = manifest_of(Signature((), ()), variants)
        return [v.name for v in building.sources(manifest, served or [v.name for v in variants])]

    assert chosen(int8, fp32, exact) == ["fp32"]
    assert chosen(fp16, int8, fp32, fp32_cuda, cut) == ["fp16-cuda", "fp32-cuda"]
    assert chosen(fp16, fp32, served=["fp32"]) == ["fp32"], "a variant that is refused here"
    assert chosen(int8) == []


@pytest.mark.parametrize(("visible", "index", "seen"), [("", 1, "1"), ("2,3", 1, "3"), ("GPU-a,GPU-b", 0, "GPU-a")])
def test_builder_sees_the_gpu_that_the_server_means(visible, index, seen):
    environment = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert building._only(Device("tensorrt", index), environment)["CUDA_VISIBLE_DEVICES"] == seen
