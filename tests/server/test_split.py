from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.artifact import LatencyTable
from server.split import Finding, Load, Split, Splits, Trial, compare, splits_of

SIZES = (1, 2, 4, 8)


class Machine:
    """A bench with the run times of a formula.

    Args:
        run_ms: Milliseconds of a run, from its threads and rows.
        slowdown: Factor on run times while all instances of a split run at once.
        has_time: Whether a split may be run with all its instances.
        has_memory: Whether a split is measured at all.
    """

    def __init__(
        self,
        run_ms: Callable[[int, int], float],
        slowdown: Callable[[Split], float] = lambda split: 1.0,
        has_time: Callable[[Split], bool] = lambda split: True,
        has_memory: Callable[[Split], bool] = lambda split: True,
    ) -> None:
        self.run_ms, self.slowdown, self.has_time, self.has_memory = run_ms, slowdown, has_time, has_memory
        self.cpu_shares = [1.0, 1.0]
        self.speeds = [1.0, 1.0]
        self.ran: list[str] = []

    def alone(self, splits: Sequence[Split]) -> Mapping[Split, LatencyTable]:
        return {split: self.table(split.threads) for split in splits if self.has_memory(split)}

    def table(self, threads: int) -> LatencyTable:
        times = tuple(self.run_ms(threads, rows) for rows in SIZES)
        return LatencyTable(SIZES, times, times, times, times)

    def together(self, split: Split, sizes: Sequence[int]) -> Load | None:
        if not self.has_time(split):
            return None
        self.ran.append(str(split))
        times = {rows: self.run_ms(split.threads, rows) * self.slowdown(split) for rows in sizes}
        rows_per_s = max(split.instances * rows / (ms / 1e3) for rows, ms in times.items())
        if split.threads > 1:
            return Load(rows_per_s, 0.1)  # what its callers wait says nothing
        return Load(rows_per_s * self.speeds.pop(0), self.cpu_shares.pop(0))


def amdahl(serial: float) -> Callable[[int, int], float]:
    """Return run times of 10 ms a row, a part of which no second thread helps with."""
    return lambda threads, rows: 10 * rows * (serial + (1 - serial) / threads)


def best(finding: Finding) -> str:
    assert finding.failure == ""
    return str(finding.trials[0].split)


@pytest.mark.parametrize(
    ("cores", "splits"),
    [
        (1, ["1 x 1 thread"]),
        (2, ["2 x 1 thread", "1 x 2 threads"]),
        (5, ["5 x 1 thread", "2 x 2 threads", "1 x 5 threads"]),
        (6, ["6 x 1 thread", "3 x 2 threads", "1 x 6 threads"]),
        (16, ["16 x 1 thread", "8 x 2 threads", "4 x 4 threads", "2 x 8 threads", "1 x 16 threads"]),
    ],
)
def test_splits_fill_the_cores(cores: int, splits: list[str]):
    assert [str(split) for split in splits_of(cores)] == splits


@given(st.integers(1, 512))
def test_every_split_fits_into_the_cores_and_none_fits_once_more(cores: int):
    splits = splits_of(cores)
    assert all(split.instances * split.threads <= cores < (split.instances + 1) * split.threads for split in splits)
    assert (splits[0], splits[-1]) == (Split(cores, 1), Split(1, cores))
    assert len(splits) == len({split.threads for split in splits}) <= 10


@pytest.mark.parametrize(
    ("serial", "split"),
    [
        (0.3, "16 x 1 thread"),
        (0.07, "16 x 1 thread"),
        (0.03, "4 x 4 threads"),
        (0.01, "2 x 8 threads"),
        (0.0, "1 x 16 threads"),
    ],
)
def test_threads_are_used_where_they_waste_little(serial: float, split: str):
    assert best(compare(Machine(amdahl(serial)), 16)) == split


def test_instances_that_slow_each_other_down_become_fewer():
    # 8 and more instances together exceed what the memory delivers.
    machine = Machine(amdahl(0.05), slowdown=lambda split: max(1.0, split.instances / 4))
    assert best(compare(machine, 16)) == "4 x 4 threads"


@pytest.mark.parametrize(("gain", "wins"), [(1.05, False), (1.15, False), (1.35, True)])
def test_lone_request_is_slowed_down_only_for_much_more_throughput(gain: float, wins: bool):
    # One thread takes 8 times as long; 8 instances of it serve so many times the rows.
    run_ms = {1: 80.0, 2: 1e3, 4: 1e3, 8: 10 * gain}
    finding = compare(Machine(lambda threads, rows: rows * run_ms[threads]), 8)
    assert best(finding) == ("8 x 1 thread" if wins else "1 x 8 threads")


def test_halved_time_is_worth_seven_per_cent():
    machine = Machine(amdahl(0.0))
    slow, fast = machine.table(1), machine.table(2)
    assert Trial(Split(1, 2), fast, 93.4).worth > Trial(Split(2, 1), slow, 100.0).worth
    assert Trial(Split(1, 2), fast, 93.2).worth < Trial(Split(2, 1), slow, 100.0).worth


def test_best_batch_size_of_each_split_counts():
    # A run costs 5 ms whatever its rows, which only batches spread.
    machine = Machine(lambda threads, rows: 5 + 0.1 * rows)
    finding = compare(machine, 2)
    plain = next(trial for trial in finding.trials if trial.split == Split(2, 1))
    assert plain.rows_per_s == pytest.approx(2 * 8 / 5.8e-3)
    assert str(plain) == "2 x 1 thread: 2759 rows/s, 5.1 ms for one row alone"


def test_splits_that_cannot_win_are_not_run_with_all_their_instances():
    machine = Machine(amdahl(0.3))
    finding = compare(machine, 16)
    assert best(finding) == "16 x 1 thread"
    assert machine.ran == ["16 x 1 thread"]
    assert str(finding.trials[-1]) == "1 x 16 threads: at most 290.9 rows/s, 3.44 ms for one row alone"
    assert [trial.is_bound for trial in finding.trials] == [False, True, True, True, True]


def test_most_promising_split_is_run_first():
    machine = Machine(amdahl(0.01), slowdown=lambda split: 3.0 if split.threads > 1 else 1.0)
    machine.speeds = [0.5, 0.5]
    finding = compare(machine, 4)
    assert machine.ran == ["4 x 1 thread", "1 x 4 threads", "2 x 2 threads", "4 x 1 thread"]
    assert best(finding) == "4 x 1 thread"


def test_cores_that_others_use_are_told():
    machine = Machine(amdahl(0.0))
    machine.cpu_shares = [0.6]
    assert compare(machine, 4) == Finding((), "its threads got 60% of the cores' time, something else runs on them")


def test_cores_that_others_begin_to_use_are_told():
    machine = Machine(amdahl(0.0))
    machine.cpu_shares = [1.0, 0.6]
    assert "60% of the cores' time" in compare(machine, 4).failure
    machine = Machine(amdahl(0.0))
    machine.speeds = [1.0, 0.8]
    assert compare(machine, 4).failure == (
        "400 rows/s at its beginning and 320 at its end, something else runs on the cores"
    )


def test_requests_that_come_end_it():
    assert "requests came" in compare(Machine(amdahl(0.0), has_time=lambda split: False), 4).failure


def test_split_without_time_or_memory_is_left_out():
    large = lambda split: split.threads == 1 or split.instances < 2  # noqa: E731
    assert best(compare(Machine(amdahl(0.0), has_memory=lambda split: split.threads == 1), 4)) == "4 x 1 thread"
    assert best(compare(Machine(amdahl(0.0), has_memory=large), 4)) == "1 x 4 threads"
    machine = Machine(amdahl(0.0), has_time=lambda split: split.threads < 4)
    assert best(compare(machine, 4)) == "2 x 2 threads"


def test_split_is_remembered_for_later_versions():
    quiet = True
    splits = Splits(lambda: quiet)
    assert splits.may_start_threads("a")
    splits.remember("a", Split(2, 2))
    splits.remember("b", Split(4, 1))
    quiet = False
    assert splits.known("a") == Split(2, 2)
    assert splits.known("c") is None
    assert [splits.may_start_threads(name) for name in "abc"] == [True, False, False]
