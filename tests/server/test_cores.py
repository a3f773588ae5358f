"""Cores that a process may use, and INT8 on them."""

from pathlib import Path

import pytest

from server import cores as module
from server.cores import saturates_int8, usable_cores


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [
        ("cpu.max", "max 100000", 8),
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "50000 100000", 1),
        ("pods/one/cpu.max", "300000 100000", 3),
        ("pods/cpu.max", "400000 100000", 4),
    ],
)
def test_cores_are_cut_by_cgroup_v2_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file, text, cores):
    (tmp_path / "own").write_text("0::/pods/one\n")
    monkeypatch.setattr(module, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_cores_are_cut_by_cgroup_v1_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path) == cores


def test_cores_are_cut_by_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert usable_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("cpuinfo", "saturates"),
    [
        ("flags\t\t: fpu avx2 avx512f", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx2 avx_vnni", False),
        ("Features\t: fp asimd asimddp", False),
        ("", False),
    ],
)
def test_x86_without_int8_dot_product_saturates(tmp_path: Path, cpuinfo: str, saturates: bool):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert saturates_int8(file) is saturates
    assert not saturates_int8(tmp_path / "missing")
