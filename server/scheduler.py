"""The scheduler of one model: bounded queues, lanes that pull from them, deadlines, cancellation, failure, draining.

All state belongs to the event loop. What may wait, share a batch, or go where is decided in ``batching``, ``order`` and
``routing``; batches run in ``worker``; this module holds only timers and futures. It does not know who calls it: an
application in the same process, or front ends in others.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from server import batching, routing
from server.admission import Admission
from server.batching import BatchLimits
from server.errors import Draining, InferenceFailed, SlipstreamError, UnknownVariant
from server.estimate import Estimate
from server.metrics import ModelMetrics
from server.outcome import Completion, Future, drained, expired, fail
from server.prediction import latest_s, rows_that_may_wait
from server.ragged import Ragged
from server.recovery import Recovery
from server.routes import LaneSpec, Runner, routes_of, state_of
from server.sharing import Cores
from server.tensors import InferRequest
from server.timer import Timer
from server.waiting import Pending, RequestQueue, sweep
from server.worker import INLINE_BATCH_S, Run, Worker

__all__ = ["BatchLimits", "Completion", "Cores", "LaneSpec", "Runner", "Scheduler"]

logger = logging.getLogger(__name__)

# The deadline timer coalesces expiries that are closer together, so that a queue that expires costs little.
_EXPIRY_STEP_S = 1e-3
# Cancelled requests are looked for at most this often when admission would refuse.
_SWEEP_STEP_S = 1e-2
# After so many batches the limits by predicted work are computed again.
_LIMIT_STEP = 64
# A brown-out ends when nothing has waited for this long.
_CALM_S = 1.0


class Scheduler:
    """Serve one model's requests on its lanes.

    Construct it and call it on the event loop; each lane's thread starts at once.

    Args:
        lanes: Lanes in order of preference; the first one's variant and device take unpinned work first.
        limits: The model's limits.
        metrics: Where waiting times, batches and the queue's length are counted.
        cores: The cores, shared with the other models.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lanes: Sequence[LaneSpec],
        limits: BatchLimits,
        metrics: ModelMetrics,
        cores: Cores,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._metrics, self._clock = limits, metrics, clock
        self._loop = asyncio.get_running_loop()
        self._ragged = Ragged(limits.padding)
        self._admission = Admission(limits, self._ragged, self._loop.create_future)
        self._cores, self._room = cores, cores.join(self._dispatch)
        self._workers = self._workers_of(lanes)
        self._recovery = Recovery(self._workers, metrics, clock, self._lanes_changed)
        self._queues: dict[str, RequestQueue[Future]] = {
            pin: RequestQueue() for pin in ("", *dict.fromkeys(spec.variant for spec in lanes))
        }
        self._brown = False
        self._calm_since_s = 0.0
        self._reroute()
        self._rows = 0  # of all queues together
        self._batches = 0
        self._dispatch_due = False
        self._delay = Timer(self._loop, self._dispatch)
        self._expiry = Timer(self._loop, self._expire)
        self._swept_s = float("-inf")
        self._draining = False
        self._drained: asyncio.Future[None] | None = None
        self._start(self._workers)

    def _workers_of(self, lanes: Sequence[LaneSpec]) -> list[Worker]:
        alike = {(spec.variant, spec.device, spec.threads): Estimate(spec.latency) for spec in reversed(lanes)}
        return [self._worker(spec, alike[spec.variant, spec.device, spec.threads]) for spec in lanes]

    def _worker(self, spec: LaneSpec, times: Estimate) -> Worker:
        state = state_of(spec, self._limits, self._cores.count, times)
        return Worker(spec, state, self._ragged, self._limits.batchable, self._clock, self._finish, self._probed)

    def _start(self, workers: Sequence[Worker]) -> None:
        for number, worker in enumerate(workers):
            worker.start(number)
            self._metrics.lane_up(worker.spec.variant, worker.spec.device, True)

    def prefer(self, lanes: Sequence[LaneSpec]) -> None:
        """Take in lanes while the others serve; from now on they come first.

        Args:
            lanes: In order of preference, ahead of all that are there.
        """
        workers = self._workers_of(lanes)
        for spec in lanes:
            self._queues.setdefault(spec.variant, RequestQueue())
        self._workers[:0] = workers
        self._start(workers)
        self._lanes_changed()

    def _probed(self, worker: Worker, passed: bool) -> None:
        self._recovery.probed(worker, passed)

    @property
    def lanes_down(self) -> tuple[str, ...]:
        """The lanes that get no work because they fail, as ``variant on device``."""
        return self._recovery.down

    @property
    def serves(self) -> bool:
        """Whether any lane is up."""
        return bool(self._routes)

    # Admission.

    def submit(self, request: InferRequest) -> Future:
        """Admit a request.

        Cancelling the future drops the request if its batch has not formed; a batch that runs is not stopped.

        Args:
            request: A request that fits the model's signature. Its arrays must not change until the future is done.

        Returns:
            A future of the answer. It fails with ``DeadlineExpired``, ``InferenceFailed``, ``LaneDown``, ``Draining``.

        Raises:
            Draining: If ``drain`` or ``close`` began.
            UnknownVariant: If the request pins a variant that no lane has.
            LaneDown: If no lane that could run it is up.
            SignatureMismatch: If the model is batched and the inputs have no common batch size.
            QueueFull: If too many rows wait, or too much work.
            DeadlineUnmeetable: If the answer is predicted to come after the deadline.
        """
        if self._draining:
            raise Draining("the model is draining; send the request to another replica")
        queue = self._queues.get(request.variant)
        if queue is None:
            known = ", ".join(pin for pin in self._queues if pin)
            raise UnknownVariant(f"unknown variant '{request.variant}'; this model serves: {known}")
        route = self._routes.get(request.variant)
        if route is None:
            raise self._recovery.error()
        now = self._clock()
        pending = self._admission.pending(request, route, now)
        rows, deadline_s = self._rows + pending.rows, pending.deadline_s
        if rows > self._most_rows or (
            # Nearly always it can be kept, and this costs a tenth of a prediction.
            deadline_s is not None and latest_s(route.preferred[0], rows, now) > deadline_s
        ):
            self._admit(pending, now)
        self._enqueue(pending, self._part_rows[request.variant])
        self._dispatch_soon()
        if deadline_s is not None:
            self._expiry.set(deadline_s, now)
        return pending.future

    def _enqueue(self, pending: Pending[Future], most: int) -> None:
        """Let a request wait, in parts of at most so many rows."""
        queue = self._queues[pending.request.variant]
        for part in (pending,) if pending.rows <= most else self._admission.parted(pending, most):
            queue.append(part)
        self._rows += pending.rows

    def _admit(self, pending: Pending[Future], now: float) -> None:
        def refusal() -> SlipstreamError | None:
            return routing.refusal(pending, self._routes, self._queues, self._most_rows, now, self._room.share)

        refused = refusal()
        if refused is not None and now >= self._swept_s + _SWEEP_STEP_S:
            # The rows of clients that left still count; look again without them.
            self._sweep(now)
            refused = refusal()
        if refused is not None and self._limits.brownout and not self._brown:
            self._brown_out(True)
            refused = refusal()
        if refused is not None:
            raise refused

    # Dispatch.

    def _dispatch_soon(self) -> None:
        # Once per iteration of the loop, so that requests that arrive together share a batch.
        if not self._dispatch_due:
            self._dispatch_due = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give every idle lane that may take work its next batch; run those of tiny models here, for about 1 ms."""
        self._dispatch_due = False
        if self._rows:
            begun_s = now = self._clock()
            while (inline := self._start_batches(now)) is not None:
                inline.worker.execute(inline)
                self._settle_run(inline)
                now = self._clock()
                if now - begun_s > INLINE_BATCH_S:
                    self._dispatch_soon()
                    break
        self._room.set_waits(self._rows > 0)
        self._settle()

    def _start_batches(self, now: float) -> Run | None:
        """Hand lanes their next batches; return the first one that is to run on the loop, if any."""
        inline: Run | None = None
        for worker in self._workers:
            state = worker.state
            if state.busy or not state.up or (worker.inline and inline is not None):
                continue
            run = worker.run = self._next_run(worker, now)
            if run is None:
                continue
            if worker.inline and state.busy_until_s - now < INLINE_BATCH_S:
                inline = run
            else:
                worker.post(run)
        return inline

    def _next_run(self, worker: Worker, now: float) -> Run | None:
        """Take an idle lane's next batch out of the queues; ``None`` when there is nothing for it."""
        state = worker.state
        while (pin := routing.choose(state, self._routes, self._queues, now, self._room)) is not None:
            queue = self._queues[pin]
            if self._limits.max_queue_delay_s and not self._draining:
                run_s = state.times.run_s(state.max_rows)
                ready_s = batching.ready_at(queue, state.max_rows, self._limits.max_queue_delay_s, run_s)
                if ready_s > now:
                    self._delay.set(ready_s, now)
                    return None
            rows = queue.rows
            is_slower = state in self._routes[pin].slower
            batch = batching.plan(queue, now, state.next_rows, state.times, from_end=is_slower)
            self._rows -= rows - queue.rows
            fail(batch.expired, partial(expired, now))
            if batch.requests:
                state.start(batch.rows, bool(pin), now)
                if not pin:
                    self._room.take(state.device, state.threads)
                return Run(worker, batch, now)
        return None

    # Execution.

    def _finish(self, run: Run) -> None:
        """Refill a lane whose thread is done with a batch, then answer that batch."""
        state = run.worker.state
        self._release(run)
        if run.error is not None:
            self._failed(run)
        try:
            if state.pinned:
                self._dispatch()
            else:
                self._room.dispatch_all()
        finally:
            self._answer(run)

    def _settle_run(self, run: Run) -> None:
        """Do the same for a batch that ran on the loop, whose dispatch goes on by itself."""
        self._release(run)
        if run.error is not None:
            self._failed(run)
        self._answer(run)

    def _release(self, run: Run) -> None:
        worker, state = run.worker, run.worker.state
        state.busy, worker.run = False, None
        if not state.pinned:
            self._room.give(state.device, state.threads, run.compute_s)
        self._batches += 1
        if self._batches % _LIMIT_STEP == 0:
            self._set_limits()

    def _answer(self, run: Run) -> None:
        if run.error is not None:
            return
        spec, rows, requests = run.worker.spec, run.batch.rows, run.batch.requests
        if run.worker.state.up:  # else it was taken down meanwhile, and a probe brings it up again
            run.worker.breaker.passed()
        ratio = run.worker.state.times.observe(rows, run.compute_s)
        for pending, outputs in zip(requests, run.outputs, strict=True):
            if not pending.future.done():
                queue_s = run.started_s - pending.arrival_s
                times = (queue_s, run.compute_s, run.assemble_s)
                pending.future.set_result(Completion(outputs, spec.variant, spec.device, rows, *times))
        # After all answers: nobody's answer may hang on a metric.
        for pending in requests:
            self._metrics.dispatched(run.started_s - pending.arrival_s)
        self._metrics.batch_finished(spec.variant, spec.device, rows, run.compute_s, ratio)

    # Failure.

    def _failed(self, run: Run) -> None:
        """Run once more what may work elsewhere, alone, or in a smaller batch; fail the rest."""
        waiting = [pending for pending in run.batch.requests if not pending.future.done()]
        if not self._draining and self._limits.batchable and self._recovery.shrunk(run):
            self._set_limits()
            for pending in waiting:
                self._enqueue(pending, run.worker.state.limit_rows)
            return
        lane_is_down = self._recovery.failed(run)
        # Nobody else is in a batch of one: on a lane that is well it would fail again.
        may_work = not self._draining and (lane_is_down or len(run.batch.requests) > 1)
        again = [p for p in waiting if may_work and not p.retried and p.request.variant in self._routes]
        for pending in again:
            pending.retried, pending.alone = True, not lane_is_down
            self._enqueue(pending, pending.rows)
        self._metrics.retried(len(again))
        spec = run.worker.spec
        reason = f"variant '{spec.variant}' failed on {spec.device}; the server's log has the details"
        fail([p for p in waiting if p not in again], lambda _: InferenceFailed(reason))

    def _lanes_changed(self) -> None:
        """Route anew after a lane has gone down or come up; what no lane can run any more fails."""
        self._reroute()
        for pin, queue in self._queues.items():
            if queue.rows and pin not in self._routes:
                fail(list(queue), lambda _: self._recovery.error())
                self._rows -= queue.rows
                queue.replace(())
        self._dispatch_soon()

    def _reroute(self) -> None:
        states = [worker.state for worker in self._workers]
        self._routes = routes_of(states, faithful_first=self._limits.brownout and not self._brown)
        self._set_limits()

    def _set_limits(self) -> None:
        """Compute what depends on routes and run times."""
        self._part_rows = {pin: self._admission.part_rows(route) for pin, route in self._routes.items()}
        route = self._routes.get("")
        most = self._limits.max_queue_rows
        self._most_rows = most if route is None else rows_that_may_wait(route, self._limits, self._room.share)

    # Brown-out.

    def _brown_out(self, brown: bool) -> None:
        logger.warning("brown-out %s", "begins: overload is served by the fastest variant" if brown else "ends")
        self._brown = brown
        self._metrics.brownout(brown)
        self._reroute()

    # Expiry.

    def _expire(self) -> None:
        self._sweep(self._clock())
        self._settle()

    def _sweep(self, now: float) -> None:
        """Answer expired requests, forget cancelled ones, and set the timer for the next deadline."""
        self._swept_s = now
        self._expiry.cancel()
        for queue in self._queues.values():
            late, deadline_s = sweep(queue, now)
            fail(late, partial(expired, now))
            if deadline_s is not None:
                self._expiry.set(max(deadline_s, now + _EXPIRY_STEP_S), now)
        self._rows = sum(queue.rows for queue in self._queues.values())

    # The end.

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait until everything that was admitted is answered.

        Args:
            timeout_s: Seconds after which the rest is failed with ``Draining``; a batch that runs is not stopped.

        Returns:
            Whether everything was answered in time.
        """
        self._draining = True
        self._dispatch()  # What waits for a fuller batch leaves now.
        if not self._is_empty():
            self._drained = self._drained or self._loop.create_future()
            await asyncio.wait((self._drained,), timeout=timeout_s)
        if self._is_empty():
            return True
        running = [worker.run for worker in self._workers if worker.run is not None]
        logger.warning("drain timed out after %g s: %d rows wait, %d batches run", timeout_s, self._rows, len(running))
        for run in running:
            fail(run.batch.requests, drained)
        self._fail_waiting()
        return False

    def close(self) -> None:
        """Stop the lanes' threads and wait for them; idempotent.

        Call it on the loop, after ``drain``. What still waits fails with ``Draining``; a batch that runs is finished
        first, and answered as soon as the loop runs on.
        """
        self._draining = True
        self._delay.cancel()
        self._expiry.cancel()
        self._recovery.stop()
        if not self._loop.is_closed():
            self._fail_waiting()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
            self._metrics.lane_up(worker.spec.variant, worker.spec.device, False)
        self._cores.leave(self._room)

    def _is_empty(self) -> bool:
        return not self._rows and not any(worker.state.busy for worker in self._workers)

    def _settle(self) -> None:
        self._metrics.queue_rows(self._rows)
        if self._brown:
            self._calm_down()
        if self._drained is not None and not self._drained.done() and self._is_empty():
            self._drained.set_result(None)

    def _calm_down(self) -> None:
        now = self._clock()
        if self._rows:
            self._calm_since_s = now
        elif now > self._calm_since_s + _CALM_S:
            self._brown_out(False)

    def _fail_waiting(self) -> None:
        for queue in self._queues.values():
            fail(list(queue), drained)
            queue.replace(())
        self._rows = 0
