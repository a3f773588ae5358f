"""The soak: trend and verdict on made-up numbers, and short real runs."""

import asyncio
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.progress import Progress

from benchmarks.servers import ServerFailed
from benchmarks.soak import __main__ as soaking
from benchmarks.soak import load as loading
from benchmarks.soak.__main__ import Options, Report, soak
from benchmarks.soak.counting import Counts, count, hook, install
from benchmarks.soak.load import SoakOutcome
from benchmarks.soak.mix import save_models
from benchmarks.soak.observed import Held, held_by, observed
from benchmarks.soak.plot import save_plot
from benchmarks.soak.trend import Trend, trend_of
from benchmarks.soak.verdict import State, always_held, growth, leaks
from server.slab import Allocator

REQUESTS = 900_000
HELD = Held(10**8, 12, 14)


# The trend.


@pytest.mark.parametrize("count", [5, 60, 61, 500])
@pytest.mark.parametrize("slope", [0.0, 3.0, -2.0])
def test_trend_finds_a_slope_among_noise_and_outliers(count: int, slope: float) -> None:
    rng = random.Random(1)
    x = [1000.0 * i for i in range(count)]
    y = [1e8 + slope * at + rng.uniform(-100, 100) + (1e6 if i % 7 == 3 else 0) for i, at in enumerate(x)]
    trend = trend_of(x, y)
    assert trend.low <= trend.slope <= trend.high
    assert trend.low - 0.2 <= slope <= trend.high + 0.2
    assert trend.slope == pytest.approx(slope, abs=0.2)


def test_trend_of_a_series_that_settles_is_nothing() -> None:
    trend = trend_of(range(200), [100.0 + min(i, 20) for i in range(200)])
    assert trend == Trend(0.0, 0.0, 0.0)


def test_trend_of_too_few_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 5 samples, there are 4"):
        trend_of([1, 2, 3, 4], [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("trend", "says"),
    [
        (Trend(0.0, -1.0, 1.0), None),
        (Trend(0.9, 0.5, 1.2), None),
        (Trend(-5.0, -9.0, -1.0), None),
        (Trend(3.0, -0.5, 8.0), None),
        (Trend(1.5, 0.5, 2.0), "memory grows by 1.50 bytes per request"),
        (Trend(3.0, -20.0, 40.0), "too few requests to tell: memory may grow by 40.0 bytes per request"),
    ],
)
def test_growth_is_a_slope_that_is_surely_more_than_nothing(trend: Trend, says: str | None) -> None:
    assert growth(trend) == says


# The verdict.


def counts(open_futures: int = 5, blocks: int = 1000, **numbers: int) -> Counts:
    others = {"busy_lanes": 0, "slab_bytes": 0, "malloc_bytes": 10**7, "free_bytes": 0}
    objects = {name.replace("__", "."): number for name, number in numbers.items() if name not in others}
    return Counts(objects, open_futures, **{k: numbers.get(k, v) for k, v in others.items()}, blocks=blocks)


def state(held: Held = HELD, **numbers: int) -> State:
    return State({7: counts(**numbers)}, {7: held})


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (state(server__waiting__Pending=1), "1 more server.waiting.Pending, now 1"),
        (state(_asyncio__Future=4), "1 more _asyncio.Future, now 4"),
        (state(builtins__coroutine=2), "2 more builtins.coroutine, now 2"),
        (state(server__tensors__InferResponse=1), "1 more server.tensors.InferResponse, now 1"),
        (state(open_futures=6), "1 more open futures, now 6"),
        (state(busy_lanes=1), "1 busy lanes"),
        (state(slab_bytes=1024), "1024 bytes of shared memory handed out"),
        (state(blocks=91_000), "90000 more blocks of Python's memory, 0.100 per request"),
        (state(malloc_bytes=10**7 + 9_000_000), "10.00 more bytes of the C library's memory per request"),
        (state(Held(10**8, 12, 15)), "1 more open descriptors, now 15"),
        (state(Held(10**8, 19, 14)), "7 more threads, now 19"),
    ],
)
def test_everything_that_is_kept_is_named(end: State, says: str) -> None:
    warm = state(_asyncio__Future=3)
    assert leaks([warm, end], REQUESTS, 2, caches=False) == [f"process 7: {says}"]


def test_what_was_there_before_has_gone_or_is_bounded_is_no_leak() -> None:
    warm = state(_asyncio__Future=3, builtins__dict=10)
    end = state(
        Held(10**8, 18, 13),
        _asyncio__Future=2,
        builtins__dict=5000,
        blocks=25_000,
        open_futures=4,
        malloc_bytes=10_200_000,
    )
    assert leaks([warm, end], REQUESTS, 2, caches=False) == []


def test_model_that_a_front_end_first_sees_late_is_no_leak_but_more_of_them_are() -> None:
    assert leaks([state(), state(server__remote__RemoteModel=3)], REQUESTS, 2, caches=False) == []
    assert leaks([state(), state(server__remote__RemoteModel=7)], REQUESTS, 2, caches=False) != []


def test_answers_that_a_cache_keeps_are_no_leak() -> None:
    end = state(server__tensors__InferResponse=5000)
    assert leaks([state(), end], REQUESTS, 2, caches=True) == []
    assert leaks([state(), end], REQUESTS, 2, caches=False) != []


def test_arena_that_takes_a_step_is_no_leak() -> None:
    steps = [state(malloc_bytes=10**7 + (4_000_000 if part > 2 else 0)) for part in range(7)]
    assert leaks(steps, REQUESTS, 2, caches=False) == []


def test_process_that_was_replaced_is_told() -> None:
    other = State({8: counts()}, {8: Held(1, 1, 1)})
    assert leaks([state(), other], REQUESTS, 2, caches=False) == ["processes [7] became [8]"]


def test_what_passes_by_is_in_one_count_only() -> None:
    first, second = counts(a__A=3, b__B=1, open_futures=7, busy_lanes=1), counts(a__A=2, c__C=4, open_futures=6)
    assert always_held([{7: first}, {7: second}]) == {7: counts(a__A=2, c__C=0, open_futures=6)}


# Counting.


async def test_open_futures_and_objects_are_counted() -> None:
    before = count()
    kept = [asyncio.get_running_loop().create_future() for _ in range(3)]
    kept[0].set_result(None)
    allocator = Allocator(4096)
    allocator.allocate(1500)
    large = bytes(5_000_000)
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    after = count()
    assert after.open_futures - before.open_futures == 2
    assert after.objects["_asyncio.Future"] - before.objects.get("_asyncio.Future", 0) == 3
    assert after.slab_bytes - before.slab_bytes == 2048
    assert after.blocks > before.blocks
    assert after.malloc_bytes - before.malloc_bytes >= len(large)


def test_signal_has_a_process_write_its_counts(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        install(str(tmp_path))
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{os.getpid()}.json"
    assert msgspec.json.decode(path.read_bytes(), type=Counts).objects["builtins.dict"] > 0


def test_hook_is_a_module_that_python_imports_first(tmp_path: Path) -> None:
    folder, root = hook(tmp_path).split(os.pathsep)
    assert (Path(folder) / "sitecustomize.py").is_file()
    assert (Path(root) / "benchmarks" / "soak" / "counting.py").is_file()


def test_system_says_what_this_process_holds() -> None:
    before = held_by(os.getpid())
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    with Path(os.devnull).open():
        after = held_by(os.getpid())
    event.set()
    thread.join()
    assert (after.threads, after.files) == (before.threads + 1, before.files + 1)
    assert after.rss_bytes > 1_000_000


def test_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="did not get ready"), observed(tmp_path / "none", tmp_path, {}):
        pass


# A short real run.


@pytest.fixture
def progress() -> Iterator[Progress]:
    with Progress(disable=True) as progress:
        yield progress


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"cache_bytes": 200_000}], ids=["one", "workers", "cache"])
def test_short_soak_leaves_nothing_behind(progress: Progress, options: dict[str, int]) -> None:
    report = soak(Options(5000, leaving=0.1, parts=2, idle_s=0.5, **options), progress)
    assert report.faults == []
    answered = sum(sum(outcome.answered.values()) for outcome in report.outcomes)
    left = sum(sum(outcome.left.values()) for outcome in report.outcomes)
    assert answered + left == 5000
    assert left > 250
    assert {"ok", "malformed_request", "unknown_model"} <= set(report.outcomes[-1].answered)
    assert {point for outcome in report.outcomes for point in outcome.left} == set(loading.LEAVING_POINTS)
    assert len(report.states[-1].held) == {1: 1, 2: 4}[options.get("workers", 1)]
    assert report.samples[-1][0] == 5000


@pytest.mark.parametrize(("slope", "faults", "code"), [(0.0, [], 0), (2.0, [], 1), (0.0, ["1 more Pending"], 1)])
def test_command_says_what_was_found_and_whether_it_is_kept(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    slope: float,
    faults: list,
    code: int,
) -> None:
    samples = [(1000.0 * i, 1e8 + slope * 1000 * i) for i in range(50)]
    outcome = SoakOutcome(1.0, {"ok": 90}, {"wait": 10}, 90, 0, [])
    report = Report(faults, [outcome, outcome], [state(), state()], samples, 5000, Trend(slope, slope, slope))
    monkeypatch.setattr(soaking, "soak", lambda options, progress: report)
    plot, raw = tmp_path / "plot.svg", tmp_path / "raw.json"
    monkeypatch.setattr("sys.argv", ["soak", "--requests", "200", "--plot", str(plot), "--raw", str(raw)])
    assert soaking.main() == code
    printed = capsys.readouterr().out
    assert "answered: ok 180\nleft: wait 20\n" in printed
    assert f"memory: {slope:+.2f} bytes per request" in printed
    assert printed.splitlines()[-1] == (
        "kept" if not code else (faults or ["memory grows by 2.00 bytes per request"])[0]
    )
    assert plot.read_text().count("<svg") == 1
    assert json.loads(raw.read_text())["warm_up"] == 5000


def test_failed_server_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> Report:
        raise ServerFailed("the server did not get ready")

    monkeypatch.setattr(soaking, "soak", fail)
    monkeypatch.setattr("sys.argv", ["soak"])
    assert soaking.main() == 1
    assert "the server did not get ready" in capsys.readouterr().err


def test_plot_needs_no_samples_of_a_certain_number(tmp_path: Path) -> None:
    save_plot(tmp_path / "p.svg", [(0.0, 1.0), (1.0, 1.0)], 0, Trend(0, 0, 0))
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_mix_has_every_kind_and_shares_that_add_up(tmp_path: Path) -> None:
    items = save_models(tmp_path)
    assert sum(item.share for item in items) == pytest.approx(1)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "wide", "slow"}
    assert {code for item in items for code in item.codes} > {"ok", "queue_full", "unknown_variant", "not_found"}
