"""Alarms ring once, in their order, unless they are cleared."""

import asyncio

from server.alarms import Alarms


async def test_what_is_not_cleared_rings_once_and_in_order() -> None:
    rung: list[str] = []
    last = asyncio.Event()
    alarms = Alarms(0.001)
    calls = [lambda name=name: rung.append(name) for name in "abc"]  # type: ignore[misc]
    for call in (*calls, last.set):
        alarms.set(call)
    alarms.clear(calls[1])
    await last.wait()
    assert rung == ["a", "c"]
    assert not len(alarms)
    alarms.clear(calls[0])  # without effect
    last.clear()
    alarms.set(last.set)
    await last.wait()


async def test_alarm_set_by_an_alarm_rings_later() -> None:
    alarms, last = Alarms(0), asyncio.Event()
    alarms.set(lambda: alarms.set(last.set))
    await last.wait()
    assert not len(alarms)


async def test_cleared_alarms_leave_the_later_ones_in_time() -> None:
    alarms, last = Alarms(0.001), asyncio.Event()
    never = asyncio.Event()
    for _ in range(3):
        alarms.set(never.set)
        alarms.clear(never.set)
        await asyncio.sleep(0)
    alarms.set(last.set)
    await last.wait()
    assert not never.is_set()


async def test_alarm_that_is_due_after_another_rings_too() -> None:
    alarms, first, second = Alarms(0.02), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    alarms.set(first.set)
    loop.call_later(0.002, alarms.set, second.set)
    async with asyncio.timeout(30):
        await first.wait()
        await second.wait()
