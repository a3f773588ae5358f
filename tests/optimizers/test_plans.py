"""The cache of plans: what is the same is not built again, and what differs is never mistaken for it."""

import importlib.util
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import msgspec
import onnx
import pytest

from optimizers.engine import EngineBuild, EngineOptions
from optimizers.errors import EngineBuildError
from optimizers.gpu import GpuFacts
from optimizers.plans import PlanCache, plan_key
from server.artifact import Profile
from tests.models import save_mlp

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)

RTX = EngineOptions(flavour="tensorrt-rtx", capabilities=("8.6",))
L4 = GpuFacts("NVIDIA L4", "8.9", 13000, "580.65.06")
TENSORRT = ("tensorrt", "10.16.1.11")


def profile(best: int = 8, most: int = 32) -> Profile:
    return Profile({"x": (1, 64)}, {"x": (best, 64)}, {"x": (most, 64)})


def outside(model: Path, folder: Path) -> Path:
    """Save a model with its weights in a file beside it."""
    folder.mkdir()
    saved = onnx.load(model)
    onnx.save(saved, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    return folder / "model.onnx"


def entries(cache: PlanCache) -> list[Path]:
    return sorted(cache.folder.glob("plans/??/*"))


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache")


def test_key_is_that_of_the_content_wherever_it_lies(tmp_path: Path):
    one = save_mlp(tmp_path / "one.onnx")
    two = Path(shutil.copy(one, tmp_path / "two.onnx"))
    assert plan_key(one, [profile()], RTX, TENSORRT, L4) == plan_key(two, [profile()], RTX, TENSORRT, L4)


@pytest.mark.parametrize(
    "other",
    [
        {"profiles": [profile(best=4)]},
        {"profiles": [profile(most=64)]},
        {"profiles": [profile(), profile(best=4)]},
        {"options": EngineOptions(tf32=True)},
        {"options": EngineOptions(level=5)},
        {"options": EngineOptions(sparse_weights=True)},
        {"options": EngineOptions(version_compatible=True)},
        {"options": EngineOptions(hardware_compatibility="ampere-plus")},
        {"options": EngineOptions(workspace_bytes=1 << 20)},
        {"builder": ("tensorrt", "10.16.1.12")},
        {"builder": ("tensorrt-rtx", "10.16.1.11")},
        {"gpu": None},
        {"gpu": msgspec.structs.replace(L4, name="NVIDIA L40S")},
        {"gpu": msgspec.structs.replace(L4, capability="8.6")},
        {"gpu": msgspec.structs.replace(L4, cuda=13010)},
        {"gpu": msgspec.structs.replace(L4, driver="580.95.05")},
    ],
)
def test_everything_that_a_plan_follows_from_is_in_the_key(mlp: Path, other: dict):
    same = {"profiles": [profile()], "options": EngineOptions(), "builder": TENSORRT, "gpu": L4}
    assert plan_key(mlp, **same) == plan_key(mlp, **{**same, "options": EngineOptions()})
    assert plan_key(mlp, **same) != plan_key(mlp, **{**same, **other})


def test_capabilities_count_for_rtx_and_the_gpu_for_tensorrt(mlp: Path, tmp_path: Path):
    rtx_builder = ("tensorrt-rtx", "1.7")
    ada = EngineOptions(capabilities=("8.9",))
    assert plan_key(mlp, [profile()], RTX, rtx_builder, L4) == plan_key(mlp, [profile()], RTX, rtx_builder, None)
    assert plan_key(mlp, [profile()], RTX, rtx_builder, L4) != plan_key(mlp, [profile()], ada, rtx_builder, L4)
    assert plan_key(mlp, [profile()], EngineOptions(), TENSORRT, L4) == plan_key(mlp, [profile()], ada, TENSORRT, L4)


def test_choices_that_leave_the_plan_as_it_is_are_not_in_the_key(mlp: Path, tmp_path: Path):
    spoken = EngineOptions(flavour="tensorrt", timings=tmp_path)
    assert plan_key(mlp, [profile()], EngineOptions(), TENSORRT, L4) == plan_key(mlp, [profile()], spoken, TENSORRT, L4)


@pytest.mark.parametrize("external", [False, True])
def test_equal_graphs_with_other_weights_have_other_keys(tmp_path: Path, external: bool):
    models = []
    for seed in ("0", "1"):
        (tmp_path / seed).mkdir()
        models.append(save_mlp(tmp_path / seed / "model.onnx", seed=int(seed)))
    if external:
        models = [outside(model, model.parent / "outside") for model in models]
        assert models[0].read_bytes() == models[1].read_bytes()
    keys = {plan_key(model, [profile()], RTX, TENSORRT, L4) for model in models}
    assert len(keys) == 2


def test_missing_weights_are_named(mlp: Path, tmp_path: Path):
    model = outside(mlp, tmp_path / "outside")
    (model.parent / "weights").unlink()
    with pytest.raises(EngineBuildError, match=r"weights in a file that cannot be read: .*weights"):
        plan_key(model, [profile()], RTX, TENSORRT, L4)


@rtx
def test_second_time_is_a_copy(mlp: Path, tmp_path: Path, cache: PlanCache):
    seen: list[str] = []
    first = cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX)
    again = cache.get_or_build(
        mlp, profile(), tmp_path / "new" / "b.plan", RTX, lambda phase, _: bool(seen.append(phase))
    )
    assert (first.cached, again.cached) == (False, True)
    assert again == msgspec.structs.replace(first, cached=True)
    assert seen == []
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "new" / "b.plan").read_bytes()


@rtx
def test_a_copy_is_the_callers_own(mlp: Path, tmp_path: Path, cache: PlanCache):
    cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX)
    content = (tmp_path / "a.plan").read_bytes()
    with (tmp_path / "a.plan").open("r+b") as file:
        file.write(b"overwritten in place")
    assert cache.get_or_build(mlp, profile(), tmp_path / "b.plan", RTX).cached
    assert (tmp_path / "b.plan").read_bytes() == content


@rtx
def test_equal_graphs_with_other_weights_have_plans_of_their_own(tmp_path: Path, cache: PlanCache):
    plans = []
    for seed in (0, 1):
        model = outside(save_mlp(tmp_path / "model.onnx", seed=seed), tmp_path / str(seed))
        plans.append(tmp_path / f"{seed}.plan")
        assert not cache.get_or_build(model, profile(), plans[-1], RTX).cached
    assert plans[0].read_bytes() != plans[1].read_bytes()
    assert len(entries(cache)) == 2


@rtx
@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "model.plan").write_bytes(b"\0" + (entry / "model.plan").read_bytes()[1:]),
        lambda entry: (entry / "model.plan").unlink(),
        lambda entry: (entry / "build.json").unlink(),
        lambda entry: (entry / "build.json").write_bytes(b'{"build": 3}'),
        lambda entry: (entry / "build.json").write_bytes(b"{"),
    ],
)
def test_damaged_entry_is_built_again(mlp: Path, tmp_path: Path, cache: PlanCache, damage, caplog):
    cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX)
    damage(*entries(cache))
    assert not cache.get_or_build(mlp, profile(), tmp_path / "b.plan", RTX).cached
    assert "is damaged" in caplog.text
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    assert cache.get_or_build(mlp, profile(), tmp_path / "c.plan", RTX).cached


@rtx
def test_failed_or_cancelled_build_leaves_nothing(mlp: Path, tmp_path: Path, cache: PlanCache):
    with pytest.raises(EngineBuildError, match="cancelled"):
        cache.get_or_build(mlp, profile(), tmp_path / "out" / "a.plan", RTX, lambda _phase, _share: False)
    with pytest.raises(EngineBuildError, match="minimum <= optimum"):
        cache.get_or_build(mlp, profile(best=64), tmp_path / "out" / "a.plan", RTX)
    assert not (tmp_path / "out").exists()
    assert list((cache.folder / "plans").iterdir()) == []


@rtx
def test_cancelled_when_the_plan_is_made_leaves_nothing(mlp: Path, tmp_path: Path, cache: PlanCache):
    with pytest.raises(EngineBuildError, match="cancelled"):
        cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX, lambda phase, _share: phase != "write")
    assert not (tmp_path / "a.plan").exists()
    assert entries(cache) == []


@rtx
def test_longest_unused_plans_go_when_the_cache_is_full(mlp: Path, tmp_path: Path):
    plan = tmp_path / "a.plan"
    size = PlanCache(tmp_path / "other").get_or_build(mlp, profile(), plan, RTX).plan_bytes
    cache = PlanCache(tmp_path / "cache", most_bytes=int(2.5 * size))
    for best in (1, 2):
        cache.get_or_build(mlp, profile(best), plan, RTX)
    for age_s, entry in enumerate(entries(cache)):  # the clock of the file system is coarse
        os.utime(entry, (time.time() - 100 - age_s,) * 2)
    assert cache.get_or_build(mlp, profile(1), plan, RTX).cached
    cache.get_or_build(mlp, profile(3), plan, RTX)
    assert len(entries(cache)) == 2
    assert [cache.get_or_build(mlp, profile(best), plan, RTX).cached for best in (1, 3, 2)] == [True, True, False]


@rtx
def test_plan_that_is_larger_than_the_cache_is_built_and_not_kept(mlp: Path, tmp_path: Path):
    cache = PlanCache(tmp_path / "cache", most_bytes=1)
    assert (
        cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX).plan_bytes == (tmp_path / "a.plan").stat().st_size
    )
    assert entries(cache) == []


def build(model: Path, folder: Path, plan: Path) -> EngineBuild:
    return PlanCache(folder).get_or_build(model, profile(), plan, RTX)


@rtx
def test_two_processes_share_one_cache(mlp: Path, tmp_path: Path):
    plans = [tmp_path / f"{number}.plan" for number in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(build, [(mlp, tmp_path / "cache", plan) for plan in plans])
    assert plans[0].read_bytes() == plans[1].read_bytes()
    cache = PlanCache(tmp_path / "cache")
    assert len(entries(cache)) == 1
    assert [path.name for path in (cache.folder / "plans").iterdir()] == [entries(cache)[0].parent.name]
    assert cache.get_or_build(mlp, profile(), tmp_path / "c.plan", RTX).cached


@rtx
def test_place_that_cannot_be_written_is_named(mlp: Path, tmp_path: Path, cache: PlanCache):
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):  # built, then from the cache
        with pytest.raises(EngineBuildError, match=r"cannot write .*file/a\.plan"):
            cache.get_or_build(mlp, profile(), tmp_path / "file" / "a.plan", RTX)
        cache.get_or_build(mlp, profile(), tmp_path / "b.plan", RTX)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineBuildError, match=r"cannot keep plans in .*file: .*; choose another"):
        PlanCache(tmp_path / "file")


@rtx
def test_cache_that_cannot_be_written_is_named(mlp: Path, tmp_path: Path, cache: PlanCache):
    shutil.rmtree(cache.folder)
    with pytest.raises(EngineBuildError, match=r"cannot keep plans in .*cache: No such file"):
        cache.get_or_build(mlp, profile(), tmp_path / "a.plan", RTX)
