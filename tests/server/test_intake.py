"""What is read at a go, and what waits."""

import asyncio

import pytest

from server import intake
from server.intake import Intake


async def turn() -> None:
    await asyncio.sleep(0)


async def test_what_comes_alone_is_read_at_once_and_has_not_waited() -> None:
    seen: list[bytes] = []
    turns = Intake()
    for number in range(3 * intake.READ_AT_ONCE):
        assert turns.take(seen.append, b"%d" % number)
        assert len(seen) == number + 1
        assert turns.waited_s == 0.0
        await turn()


async def test_more_than_a_share_waits_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "READ_AT_ONCE", 4)
    turns, seen = Intake(), []
    order: list[int] = []

    def read(data: bytes) -> None:
        seen.append(turns.waited_s)
        order.append(int(data))

    taken = [turns.take(read, b"%d" % number) for number in range(10)]
    assert taken.count(True) == len(order) == 4
    others: list[int] = []
    asyncio.get_running_loop().call_soon(lambda: others.append(len(order)))
    await asyncio.sleep(0.02)
    assert order == list(range(10))
    assert others[0] < 10  # the rest of the loop had its turn in between
    assert seen[:4] == [0.0] * 4
    assert not turns.take(read, b"10") or order[-1] == 10


async def test_what_comes_while_others_wait_goes_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "READ_AT_ONCE", 1)
    turns, seen = Intake(), []
    for number in range(3):
        turns.take(seen.append, b"%d" % number)
    await turn()
    turns.take(seen.append, b"3")
    for _ in range(5):
        await turn()
    assert seen == [b"0", b"1", b"2", b"3"]
    assert turns.take(seen.append, b"4")  # and then the next is read at once again


async def test_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "READ_AT_ONCE", 1)
    turns = Intake()
    waits: list[float] = []
    turns.take(lambda _: None, b"")
    turns.take(lambda _: waits.append(turns.waited_s), b"")
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while loop.time() < began_s + 0.02:  # a long batch on the loop
        pass
    await turn()
    assert waits[0] >= 0.01
    assert turns.waited_s == 0.0


async def test_one_that_fails_does_not_keep_others_from_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "READ_AT_ONCE", 1)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    turns, seen = Intake(), []

    def fail(data: bytes) -> None:
        raise ValueError(data)

    turns.take(seen.append, b"0")
    turns.take(fail, b"1")
    turns.take(seen.append, b"2")
    for _ in range(5):
        await turn()
    assert seen == [b"0", b"2"]
    assert len(failures) == 1
