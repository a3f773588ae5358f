import threading
from pathlib import Path

import pytest

from server.artifact import SessionOptions
from server.bench import SessionBench, Subject
from server.errors import InferenceFailed, StartupError
from server.providers import CPU
from server.session import Session, synthetic_inputs
from server.split import Split, compare
from server.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", ("batch",)),), ())


class Meeting:
    """Lets runs go on once so many of them are in progress."""

    def __init__(self, parties: int) -> None:
        self.missing = parties
        self.complete = threading.Event()
        self.lock = threading.Lock()

    def attend(self) -> None:
        with self.lock:
            self.missing -= 1
            if self.missing == 0:
                self.complete.set()
        assert self.complete.wait(10), f"{self.missing} more runs should be in progress"


class FakeSession:
    """A session that computes nothing; batches of several rows attend the meeting, if there is one."""

    def __init__(self, threads: int = 1, meeting: Meeting | None = None) -> None:
        self.threads, self.meeting = threads, meeting
        self.signature = SIGNATURE
        self.runs, self.error = 0, None
        self.closed = False

    def run(self, inputs: dict) -> dict:
        self.runs += 1
        if self.error is not None:
            raise self.error
        if self.meeting is not None and len(inputs["x"]) > 1:
            self.meeting.attend()
        return {}

    def close(self) -> None:
        self.closed = True


class Opened:
    """Opens fake sessions and keeps them."""

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.meeting: Meeting | None = None
        self.failures = 0

    def __call__(self, threads: int) -> FakeSession:
        if self.failures:
            self.failures -= 1
            raise StartupError("no memory")
        self.sessions.append(FakeSession(threads, self.meeting))
        return self.sessions[-1]


class Clock:
    """A clock that goes on by a millisecond with every look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


@pytest.fixture
def opened() -> Opened:
    return Opened()


def bench_of(first: FakeSession, opened: Opened, *, budget_s: float = 1e3, memory: int = 0, quiet=lambda: True):
    subject = Subject(first, opened, lambda rows: synthetic_inputs(SIGNATURE, rows), (1, 2), 100)
    return SessionBench(subject, budget_s, quiet, memory, Clock())


FOUR, TWO, ONE = Split(4, 1), Split(2, 2), Split(1, 4)


def test_every_split_is_measured_alone_with_one_session(opened: Opened):
    first = FakeSession()
    tables = bench_of(first, opened).alone((FOUR, TWO, ONE))
    assert {split: table.rows for split, table in tables.items()} == dict.fromkeys((FOUR, TWO, ONE), (1, 2))
    assert [session.threads for session in opened.sessions] == [2, 4]
    assert first.runs > 2


def test_all_instances_run_at_the_same_time(opened: Opened):
    opened.meeting = Meeting(2)
    load = bench_of(FakeSession(), opened).together(TWO, (2,))
    assert load.rows_per_s > 0
    assert 0 <= load.cpu_share <= 1
    assert [session.threads for session in opened.sessions] == [2, 2]
    assert all(session.runs > 1 for session in opened.sessions)  # the first is a warm-up of one row


def test_instances_of_one_thread_share_the_session(opened: Opened):
    first = FakeSession(meeting=Meeting(4))
    assert bench_of(first, opened).together(FOUR, (2,)).rows_per_s > 0
    assert opened.sessions == []


@pytest.mark.parametrize(
    ("memory", "measured"), [(0, [FOUR, TWO, ONE]), (1600, [FOUR, TWO, ONE]), (1599, [FOUR, ONE]), (9, [FOUR])]
)
def test_copies_that_would_take_much_memory_are_left_out(opened: Opened, memory: int, measured: list[Split]):
    assert list(bench_of(FakeSession(), opened, memory=memory).alone((FOUR, TWO, ONE))) == measured


def test_nothing_is_begun_when_time_is_up(opened: Opened):
    bench = bench_of(FakeSession(), opened, budget_s=0)
    assert list(bench.alone((FOUR, TWO, ONE))) == [FOUR]
    assert bench.together(TWO, (1,)) is None
    assert bench.together(FOUR, (1,)) is not None  # or nobody could tell what the others are compared with


def test_nothing_is_measured_when_requests_come(opened: Opened):
    bench = bench_of(FakeSession(), opened, quiet=lambda: False)
    assert [bench.together(split, (1,)) for split in (FOUR, TWO)] == [None, None]
    assert opened.sessions == []


def test_sessions_that_are_kept_stay_open_and_no_others(opened: Opened):
    first = FakeSession()
    bench = bench_of(first, opened)
    bench.alone((FOUR, TWO, ONE))
    kept = bench.keep(TWO)
    bench.close()
    assert [session.threads for session in kept] == [2, 2]
    assert kept[0] is not kept[1]
    assert [session for session in opened.sessions if not session.closed] == kept
    assert first.closed


def test_one_session_is_kept_for_instances_of_one_thread(opened: Opened):
    first = FakeSession()
    bench = bench_of(first, opened)
    bench.alone((FOUR, TWO))
    assert bench.keep(FOUR) == [first] * 4
    assert not first.closed
    assert all(session.closed for session in opened.sessions)


def test_session_that_does_not_open_leaves_none_open(opened: Opened):
    opened.failures = 1
    bench = bench_of(FakeSession(), opened)
    with pytest.raises(StartupError, match="no memory"):
        bench.alone((FOUR, TWO, ONE))
    bench.close()
    assert len(opened.sessions) == 1
    assert opened.sessions[0].closed


def test_run_that_fails_ends_the_measurement(opened: Opened):
    first = FakeSession()
    first.error = InferenceFailed("bad")
    with pytest.raises(InferenceFailed, match="bad"):
        bench_of(first, opened).together(FOUR, (1,))


def test_real_sessions_are_compared(mlp: Path):
    def reopen(threads: int) -> Session:
        made.append(Session(mlp, CPU, SessionOptions(intra_op_threads=threads)))
        return made[-1]

    made: list[Session] = []
    first = reopen(1)
    subject = Subject(first, reopen, lambda rows: synthetic_inputs(first.signature, rows), (1, 4), mlp.stat().st_size)
    bench = SessionBench(subject, 1.0, lambda: True)
    finding = compare(bench, 2)
    split = finding.trials[0].split if finding.trials else Split(2, 1)
    kept = bench.keep(split)
    assert len(kept) == split.instances
    for session in made:
        is_open = session in kept
        try:
            assert session.run(synthetic_inputs(session.signature, 3))["y"].shape == (3, 10)
            assert is_open
        except InferenceFailed:
            assert not is_open
    bench.close()
