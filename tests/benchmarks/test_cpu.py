"""Reading CPU time from /proc."""

import os
from pathlib import Path

import pytest

from benchmarks import cpu

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def save_process(proc: Path, pid: int, parent: int, user: int, system: int, name: str = "python") -> None:
    (proc / str(pid)).mkdir()
    rest = " ".join(["0"] * 9)
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {rest} {user} {system} 99 99 20 0 4\n")


def test_tree_is_the_process_and_all_descendants(tmp_path: Path) -> None:
    save_process(tmp_path, 10, 1, 100, 20)
    save_process(tmp_path, 11, 10, 3, 4, name="a) S 1 (b")
    save_process(tmp_path, 12, 11, 5, 0)
    save_process(tmp_path, 13, 1, 1000, 1000)
    (tmp_path / "cpuinfo").touch()
    (tmp_path / "14").mkdir()  # ended between listing and reading
    assert cpu.tree_cpu_s(10, tmp_path) == pytest.approx(132 * TICK_S)
    assert cpu.tree_cpu_s(14, tmp_path) == 0


def test_idle_time_is_summed_over_threads(tmp_path: Path) -> None:
    for thread, nanoseconds in ((10, 1_500_000), (11, 500_000)):
        (tmp_path / "10" / "task" / str(thread)).mkdir(parents=True)
        (tmp_path / "10" / "task" / str(thread) / "schedstat").write_text(f"{nanoseconds} 7 3\n")
    assert cpu.idle_cpu_s(10, tmp_path) == pytest.approx(0.002)


def test_idle_time_counts_descendants(tmp_path: Path) -> None:
    save_process(tmp_path, 10, 1, 0, 0)
    save_process(tmp_path, 11, 10, 0, 0)
    for process, nanoseconds in ((10, 1_000_000), (11, 4_000_000)):
        (tmp_path / str(process) / "task" / "1").mkdir(parents=True)
        (tmp_path / str(process) / "task" / "1" / "schedstat").write_text(f"{nanoseconds} 7 3\n")
    assert cpu.idle_cpu_s(10, tmp_path) == pytest.approx(0.005)


def test_memory_is_that_of_the_tree(tmp_path: Path) -> None:
    save_process(tmp_path, 10, 1, 0, 0)
    save_process(tmp_path, 11, 10, 0, 0)
    save_process(tmp_path, 12, 10, 0, 0)  # ended between listing and reading
    for process in (10, 11):
        (tmp_path / str(process) / "smaps_rollup").write_text("0-1 ---p\nRss: 2000 kB\nPss: 1000 kB\nPss_Anon: 9 kB\n")
    assert cpu.tree_memory(10, tmp_path) == cpu.Memory(4.096, 2.048)


def test_own_process_has_used_cpu() -> None:
    assert cpu.tree_cpu_s(os.getpid()) > 0


def test_cpu_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: 9000\n")
    assert cpu.cpu_model(tmp_path / "cpuinfo") == "Some CPU: 9000"
    assert cpu.cpu_model(tmp_path / "none") == "unknown CPU"
