import asyncio
import os
import sys
import threading

import pytest

from server.background import NICENESS, Background

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux_only
async def test_only_the_background_thread_has_low_priority():
    background, before = Background(), niceness()
    assert await background.run(niceness) == min(19, NICENESS) != before
    assert await background.run(niceness, low=False) == before
    assert niceness() == before
    assert await asyncio.to_thread(niceness) == before
    background.close()


async def test_one_call_at_a_time_in_their_order():
    background, order, gate = Background(), list[str](), threading.Event()

    def first() -> None:
        assert gate.wait(30)
        order.append("first")

    calls = [
        asyncio.create_task(background.run(first)),
        asyncio.create_task(background.run(order.append, "second", low=False)),
    ]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*calls)
    assert order == ["first", "second"]
    background.close()


async def test_error_of_a_call_is_raised():
    background = Background()
    with pytest.raises(ZeroDivisionError):
        await background.run(lambda: 1 // 0)
    background.close()


async def test_priority_that_cannot_be_lowered_is_no_failure(monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(*_: int) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(sys, "platform", "linux")
    background = Background()
    assert await background.run(lambda: 7) == 7
    assert "keeps its normal priority" in caplog.text
    background.close()
