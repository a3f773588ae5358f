"""What happens to lanes that fail: taken down, tried again after a pause, and brought up when they work."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from server.errors import DeviceLost, LaneDown, OutOfMemory
from server.metrics import ModelMetrics
from server.timer import Timer
from server.worker import Run, Worker

logger = logging.getLogger(__name__)


class Recovery:
    """Watches over the lanes of one model; on the event loop.

    Args:
        workers: The lanes.
        metrics: Where lanes that go down and come up are shown.
        clock: Monotonic seconds.
        changed: Called after a lane has gone down or come up.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        metrics: ModelMetrics,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._workers, self._metrics, self._clock, self._changed = workers, metrics, clock, changed
        self._timer = Timer(asyncio.get_running_loop(), self._retry)
        self._stopped = False

    @property
    def down(self) -> tuple[str, ...]:
        """The lanes that are down, as ``variant on device``."""
        return tuple(_name(worker) for worker in self._workers if not worker.state.up)

    def error(self) -> LaneDown:
        """Make the error of a request that no lane can run."""
        soonest_s = min((w.breaker.retry_at_s for w in self._workers if w.breaker.open), default=0.0)
        text = f"no lane can run the request, all fail: {', '.join(self.down)}"
        return LaneDown(text, max(0.0, soonest_s - self._clock()))

    def failed(self, run: Run) -> bool:
        """Note a batch that failed; return whether the lane is at fault and is down, rather than an input."""
        worker, is_lost = run.worker, isinstance(run.error, DeviceLost)
        logger.error("lane %s failed on a batch of %d rows", _name(worker), run.batch.rows, exc_info=run.error)
        now = self._clock()
        worker.breaker.failed(now, False if is_lost else run.probe_passed)
        if worker.breaker.open:
            self._take_down(worker, now)
            # These would fail as well, and what is tried once more must not go to one of them.
            for other in self._workers:
                shares = other.spec.runner is worker.spec.runner or (
                    is_lost and other.spec.device == worker.spec.device
                )
                if shares and not other.breaker.open:
                    other.breaker.failed(now, False)
                    self._take_down(other, now)
        return worker.breaker.open

    def shrunk(self, run: Run) -> bool:
        """Whether a batch failed for want of memory only and its lanes take smaller ones from now on.

        A batch of one row cannot be smaller: that is a failure of the lane.
        """
        worker, rows = run.worker, run.batch.rows
        if not isinstance(run.error, OutOfMemory) or rows == 1:
            return False
        for other in self._workers:
            if other.spec.runner is worker.spec.runner:
                other.state.shrink(rows)
        self._metrics.out_of_memory(worker.spec.variant, worker.spec.device)
        logger.warning(
            "lane %s has no memory for a batch of %d rows: it takes %d from now on, and tries more later (%s)",
            _name(worker),
            rows,
            worker.state.limit_rows,
            run.error,
        )
        return True

    def _take_down(self, worker: Worker, now: float) -> None:
        pause_s = worker.breaker.retry_at_s - now
        logger.error("lane %s is down; it is tried again in %.1f s", _name(worker), pause_s)
        self._set(worker, up=False)
        self._timer.set(worker.breaker.retry_at_s, now)

    def probed(self, worker: Worker, passed: bool) -> None:
        """Note the outcome of a probe."""
        if passed:
            worker.breaker.passed()
            self._bring_up(worker)
        elif not self._stopped:
            now = self._clock()
            worker.breaker.failed(now, False)
            self._timer.set(worker.breaker.retry_at_s, now)

    def stop(self) -> None:
        """Try nothing more."""
        self._stopped = True
        self._timer.cancel()

    def _retry(self) -> None:
        """Try the lanes whose pause is over."""
        now = self._clock()
        for worker in self._workers:
            if not worker.breaker.open:
                continue
            if worker.breaker.retry_at_s > now:
                self._timer.set(worker.breaker.retry_at_s, now)
            elif worker.can_probe:
                worker.probe()
            else:
                worker.breaker.half_open()
                self._bring_up(worker)

    def _bring_up(self, worker: Worker) -> None:
        logger.warning("lane %s is up again", _name(worker))
        self._set(worker, up=True)

    def _set(self, worker: Worker, *, up: bool) -> None:
        worker.state.up = up
        self._metrics.lane_up(worker.spec.variant, worker.spec.device, up)
        self._changed()


def _name(worker: Worker) -> str:
    return f"{worker.spec.variant} on {worker.spec.device}"
