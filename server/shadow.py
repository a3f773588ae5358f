"""Shadowing: run a share of the live requests on a new version too, and compare, before it serves.

What is compared, output by output, as the new version's answer against the one that the client got:

====================================================  ============================================================
output                                                disagreement
====================================================  ============================================================
floating point, two axes or more, last axis 2 or more  share of positions with another argmax over the last axis
other floating point                                  1 if any element differs by more than 1 % of the largest
                                                      magnitude of the client's output, else 0
integers, booleans, text                              1 if any element differs, else 0
missing, another datatype or shape                    1
====================================================  ============================================================

A request's disagreement is the largest of its outputs', and 1 if the new version failed. It is ``same`` at 0.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from server.background import Background
from server.metrics import Metrics
from server.model import Model
from server.tensors import Array, InferRequest, InferResponse, Tensors

logger = logging.getLogger(__name__)

Result = Literal["same", "differs", "failed"]

MOST_WAITING = 4
"""Copies of requests that may wait; what comes while so many do is not compared."""
TOLERANCE = 0.01


class Tally(msgspec.Struct):
    """What the comparison came to so far.

    Attributes:
        same: Requests without a difference.
        differs: Requests with one.
        failed: Requests that the new version failed.
        skipped: Requests of the share that were not run, because others were waiting.
        disagreement: Sum over the compared requests.
    """

    same: int = 0
    differs: int = 0
    failed: int = 0
    skipped: int = 0
    disagreement: float = 0.0

    @property
    def compared(self) -> int:
        """Requests that were compared."""
        return self.same + self.differs + self.failed

    @property
    def mean_disagreement(self) -> float:
        """Mean over the compared requests, 0 to 1; 0 without any."""
        return self.disagreement / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        return (
            f"{self.compared} requests compared, {self.same} same, {self.differs} differ, {self.failed} failed, "
            f"mean disagreement {self.mean_disagreement:.4f}, {self.skipped} skipped"
        )


class Shadow:
    """Compares a new version with the one that serves.

    Use it on the event loop; only the new version's runs are elsewhere, one at a time in the background. ``offer`` is
    made to be the serving model's ``tap``, which is called after the answer.

    Args:
        candidate: The new version, loaded and not started.
        share: Of the offered requests, 0 to 1.
        background: Where the new version is run.
        is_busy: Whether requests wait now; nothing is run then.
        metrics: Where results are counted.

    Attributes:
        tally: What it came to so far.
    """

    def __init__(
        self,
        candidate: Model,
        share: float,
        background: Background,
        is_busy: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._candidate, self._share, self._background, self._is_busy = candidate, share, background, is_busy
        self._count = metrics.shadow_requests
        self._credit = 0.0
        self._copies: asyncio.Queue[tuple[InferRequest, Tensors]] = asyncio.Queue(MOST_WAITING)
        self.tally = Tally()

    def offer(self, request: InferRequest, response: InferResponse) -> None:
        """Take a copy of every ``1 / share``-th request and its answer, unless others wait or enough copies do."""
        self._credit += self._share
        if self._credit < 1:
            return
        self._credit -= 1
        if self._copies.full() or self._is_busy():
            self.tally.skipped += 1
            return
        # Copies, because arrays may be views of buffers that are used again, or of a far larger batch.
        inputs = msgspec.structs.replace(request, inputs=_copy(request.inputs))
        self._copies.put_nowait((inputs, _copy(response.outputs)))

    async def run(self, seconds: float) -> Tally:
        """Compare what is offered for so many seconds, and finish the comparison under way; return the tally."""
        end_s = asyncio.get_running_loop().time() + seconds
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout_at(end_s):
                    copy = await self._copies.get()
                await self._compare(*copy)
        return self.tally

    async def _compare(self, request: InferRequest, answered: Tensors) -> None:
        if self._is_busy():
            self.tally.skipped += 1
            return
        try:
            seen = await self._background.run(self._candidate.run_aside, request)
        except Exception as exc:  # noqa: BLE001  Whatever a version raises that does not serve yet harms nobody.
            logger.info("%s/%s fails a live request: %s", self._candidate.name, self._candidate.version, exc)
            self.tally.failed += 1
            self._finish("failed", 1.0)
            return
        difference = disagreement(answered, seen)
        if difference:
            self.tally.differs += 1
        else:
            self.tally.same += 1
        self._finish("differs" if difference else "same", difference)

    def _finish(self, result: Result, difference: float) -> None:
        self.tally.disagreement += difference
        self._count.labels(self._candidate.name, self._candidate.version, result).inc()


def disagreement(answered: Tensors, seen: Tensors) -> float:
    """Return how far two answers to one request differ, 0 to 1, as the module says.

    Args:
        answered: What the client got; only these outputs are compared.
        seen: What the new version gives.
    """
    return max((_difference(array, seen.get(name)) for name, array in answered.items()), default=0.0)


def _difference(expected: Array, seen: Array | None) -> float:
    if seen is None or seen.dtype != expected.dtype or seen.shape != expected.shape:
        return 1.0
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind != "f":
        return float(not np.array_equal(expected, seen))
    if expected.ndim >= 2 and expected.shape[-1] >= 2:
        return float(np.mean(expected.argmax(-1) != seen.argmax(-1)))
    # In double precision: differences of FP16 overflow.
    wide, other = expected.astype(np.float64), seen.astype(np.float64)
    allowed = TOLERANCE * np.max(np.abs(wide), where=np.isfinite(wide), initial=0.0)
    return float(not np.allclose(other, wide, rtol=0.0, atol=float(allowed), equal_nan=True))


def _copy(tensors: Tensors) -> dict[str, Array]:
    return {name: array.copy() for name, array in tensors.items()}
