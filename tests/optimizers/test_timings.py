"""Timing caches, with TensorRT-RTX's builder in the place of TensorRT's: it has the same interface."""

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from optimizers import engine
from optimizers.engine import EngineOptions, build_engine
from optimizers.errors import EngineBuildError
from optimizers.gpu import GpuFacts
from optimizers.timings import load_timings, save_timings, timing_file
from server.artifact import Profile

L4 = GpuFacts("NVIDIA L4", "8.9", 13000, "580.65.06")
MLP = Profile(*({"x": (rows, 64)} for rows in (1, 8, 32)))

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
    ),
    pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX"),
]


@pytest.fixture
def config() -> Any:
    trt = importlib.import_module("tensorrt_rtx_bindings")
    builder = trt.Builder(engine._logger("tensorrt-rtx", trt))
    return builder.create_builder_config()


def test_file_is_that_of_the_builder_the_gpu_and_the_driver(tmp_path: Path):
    files = {
        timing_file(tmp_path, "tensorrt 10.16", L4),
        timing_file(tmp_path, "tensorrt 10.17", L4),
        timing_file(tmp_path, "tensorrt 10.16", None),
        timing_file(tmp_path, "tensorrt 10.16", GpuFacts("NVIDIA L4", "8.9", 13000, "580.95.05")),
        timing_file(tmp_path, "tensorrt 10.16", GpuFacts("NVIDIA L4", "8.6", 13000, "580.65.06")),
    }
    assert len(files) == 5
    assert timing_file(tmp_path, "tensorrt 10.16", L4) in files


def test_measurements_are_written_whole_and_read_again(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "new" / "l4.timings"
    load_timings(config, file)
    save_timings(config, file)
    assert file.stat().st_size > 0
    assert list(file.parent.iterdir()) == [file]
    load_timings(config, file)
    assert [record for record in caplog.records if record.name == "optimizers.timings"] == []


def test_place_that_cannot_be_written_is_a_warning(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_bytes(b"")
    load_timings(config, tmp_path / "file" / "a.timings")
    save_timings(config, tmp_path / "file" / "a.timings")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "cannot write the timing cache" in caplog.text


def test_refused_measurements_start_anew(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Mismatching:
        """The configuration of a builder that refuses a file from elsewhere, as its documentation says it does."""

        def __init__(self) -> None:
            self.given: list[bytes] = []

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.given.append(cache)
            return not cache

    (tmp_path / "a.timings").write_bytes(b"from elsewhere")
    refusing = Mismatching()
    load_timings(refusing, tmp_path / "a.timings")
    assert refusing.given == [b"from elsewhere", b""]
    assert "the builder refuses the timing cache" in caplog.text


@pytest.fixture
def as_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine._MODULES, "tensorrt", ("tensorrt_rtx_bindings",))


@pytest.mark.usefixtures("as_tensorrt")
def test_tensorrt_leaves_its_measurements_for_the_next_build(mlp: Path, tmp_path: Path):
    options = EngineOptions(flavour="tensorrt", timings=tmp_path / "timings")
    for content in (b"", b"damaged" * 20):
        for file in (tmp_path / "timings").glob("*"):
            file.write_bytes(content)
        built = build_engine(mlp, MLP, tmp_path / "a.plan", options)
        assert (built.flavour, built.capabilities) == ("tensorrt", ())
        (file,) = (tmp_path / "timings").iterdir()
        assert file.read_bytes()[:7] != b"damaged"


@pytest.mark.usefixtures("as_tensorrt")
def test_tensorrt_takes_its_own_options(mlp: Path, tmp_path: Path):
    for level in (0, 5):
        options = EngineOptions(flavour="tensorrt", level=level, hardware_compatibility="same-compute-capability")
        assert build_engine(mlp, MLP, tmp_path / "a.plan", options).plan_bytes > 1000
    with pytest.raises(
        EngineBuildError, match="libnvinfer_lean"
    ):  # the flag arrives: it needs a library that is not here
        build_engine(mlp, MLP, tmp_path / "b.plan", EngineOptions(flavour="tensorrt", version_compatible=True))


def test_rtx_times_nothing(mlp: Path, tmp_path: Path):
    build_engine(mlp, MLP, tmp_path / "a.plan", EngineOptions(flavour="tensorrt-rtx", timings=tmp_path / "timings"))
    assert not (tmp_path / "timings").exists()


@pytest.mark.usefixtures("as_tensorrt")
def test_tensorrt_builds_for_no_other_gpu(mlp: Path, tmp_path: Path):
    options = EngineOptions(flavour="tensorrt", capabilities=("8.9",))
    with pytest.raises(EngineBuildError, match=r"not for compute capabilities \['8\.9'\]; leave them out"):
        build_engine(mlp, MLP, tmp_path / "a.plan", options)
