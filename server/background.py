"""Blocking work that must not hurt the requests in service: one call at a time, in a thread of low priority."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

NICENESS = 19
"""Of the background thread: beside a busy thread of the server it gets a seventieth of a core. With 10 it got a tenth,
and a request waited for it: the p99 of other models doubled while versions were swapped."""

_Result = TypeVar("_Result")


class Background:
    """Runs one blocking call after the other.

    A thread hands its priority on to the threads that it starts, and an unprivileged process cannot raise one again.
    So whatever starts threads that serve later, as a session with a pool does, must ask for normal priority.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._low = ThreadPoolExecutor(1, "background", initializer=_lower_priority)
        self._normal = ThreadPoolExecutor(1, "background-normal")

    async def run(self, call: Callable[..., _Result], *args: Any, low: bool = True) -> _Result:
        """Wait for the turn, then run ``call(*args)`` in a thread, of low or of normal priority.

        Cancelling gives up the result; a call that has begun goes on to its end.
        """
        async with self._turn:
            executor = self._low if low else self._normal
            return await asyncio.get_running_loop().run_in_executor(executor, call, *args)

    def close(self) -> None:
        """Take no more calls; one that runs goes on to its end."""
        for executor in (self._low, self._normal):
            executor.shutdown(wait=False, cancel_futures=True)


def _lower_priority() -> None:
    if sys.platform != "linux":  # elsewhere priorities belong to processes
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as exc:
        logger.warning("background work keeps its normal priority: %s", exc)
