"""The nursery: jobs in processes of their own; whatever one of them does, the next one runs."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from optimizers.nursery import LOG, Nursery, resident_bytes


def main(folder: str) -> None:
    """A job: does what a file in its folder says. A child process imports this module."""
    place = Path(folder)
    order = (place / "order").read_text()
    if order == "hang":
        (place / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    if order == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == "raise":
        raise ValueError("no good")
    print("done", flush=True)  # noqa: T201
    (place / "result").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with closing(Nursery(__name__)) as made:
        yield made


def job(folder: Path, order: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "order").write_text(order)
    return folder


def test_each_job_has_a_process_of_its_own_and_its_own_log(nursery: Nursery, tmp_path: Path) -> None:
    folders = [job(tmp_path / name, "work") for name in ("a", "b")]
    assert [nursery.run(folder, 30) for folder in folders] == ["", ""]
    pids = {(folder / "result").read_text() for folder in folders} | {str(os.getpid())}
    assert len(pids) == 3
    assert [(folder / LOG).read_text() for folder in folders] == ["done\n", "done\n"]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("crash", "its process was killed by signal 11"),
        ("raise", "its process ended with status 1: ValueError: no good"),
    ],
)
def test_the_next_job_runs_after_one_that_failed(nursery: Nursery, tmp_path: Path, order: str, reason: str) -> None:
    assert nursery.run(job(tmp_path / "bad", order), 30) == reason
    assert nursery.run(job(tmp_path / "good", "work"), 30) == ""


def test_job_that_hangs_is_killed(nursery: Nursery, tmp_path: Path) -> None:
    folder = job(tmp_path / "job", "hang")
    assert nursery.run(folder, 0.3) == "stopped after 0.3 s without a result"
    assert not Path(f"/proc/{(folder / 'pid').read_text()}").exists()
    assert nursery.run(job(tmp_path / "next", "work"), 30) == ""


def test_a_nursery_that_was_lost_starts_again(tmp_path: Path) -> None:
    with closing(Nursery(__name__)) as nursery:
        assert nursery.run(job(tmp_path / "a", "work"), 30) == ""
        process = nursery._process
        assert process is not None
        process.kill()
        process.wait()
        assert nursery.run(job(tmp_path / "b", "work"), 30) == ""


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    nursery = Nursery(__name__)
    nursery.run(job(tmp_path / "a", "work"), 30)
    process = nursery._process
    assert process is not None
    nursery.close()
    assert process.returncode == 0
    nursery.close()  # twice does no harm


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    assert resident_bytes(os.getpid()) > 1_000_000
    assert resident_bytes(2**22 + 1) == 0
