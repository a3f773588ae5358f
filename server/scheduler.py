"""The scheduler of one model: bounded queues, lanes that pull from them, deadlines, cancellation, draining.

All state belongs to the event loop. A lane's thread only runs batches: it blocks on its mailbox, and hands each outcome
to the loop with one wake-up, so a batch costs two thread switches however many requests it holds. What may wait, share
a batch, or go where is decided in ``batching`` and ``routing``; this module holds only threads, timers and futures.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from queue import SimpleQueue

import msgspec

from server import batching, routing
from server.batching import BatchLimits, Pending, Plan, RequestQueue
from server.errors import DeadlineExpired, Draining, InferenceFailed, SlipstreamError, UnknownVariant
from server.metrics import ModelMetrics
from server.routing import LaneSpec, LaneState, Runner
from server.tensors import InferRequest, Tensors

__all__ = ["BatchLimits", "Completion", "LaneSpec", "Runner", "Scheduler"]

logger = logging.getLogger(__name__)

# A lane whose single-row run is shorter than this runs on the loop: two thread switches would cost more than the run.
INLINE_LANE_S = 1e-4
# ...except a batch that is predicted to hold the loop for longer than this.
INLINE_BATCH_S = 1e-3
# The deadline timer coalesces expiries that are closer together, so that a queue that expires costs little.
_EXPIRY_STEP_S = 1e-3
# Cancelled requests are looked for at most this often when admission would refuse.
_SWEEP_STEP_S = 1e-2


class Completion(msgspec.Struct, frozen=True):
    """The answer to one request.

    Attributes:
        outputs: Name -> array with the request's own rows; views of the batch's outputs.
        variant: The variant that ran it.
        device: Where.
        batch_rows: Rows of the batch.
        queue_s: Seconds from admission to dispatch.
        compute_s: Seconds of the batch's run with assembly and split.
    """

    outputs: Tensors
    variant: str
    device: str
    batch_rows: int
    queue_s: float
    compute_s: float


_Future = asyncio.Future[Completion]


class _Run:
    """A batch on its way through a lane."""

    __slots__ = ("batch", "compute_s", "error", "lane", "outputs", "started_s")

    def __init__(self, lane: "_Lane", batch: Plan[_Future], started_s: float) -> None:
        self.lane, self.batch, self.started_s = lane, batch, started_s
        self.compute_s = 0.0
        self.outputs: list[Tensors] = []  # per request
        self.error: BaseException | None = None


class _Lane:
    """A lane's spec, its state for routing, its thread's mailbox, and the batch that it runs."""

    def __init__(self, spec: LaneSpec, state: LaneState) -> None:
        self.spec, self.state = spec, state
        self.inline = spec.latency is not None and spec.latency.predict_s(1) < INLINE_LANE_S
        self.mailbox: SimpleQueue[_Run | None] = SimpleQueue()
        self.run: _Run | None = None


class Scheduler:
    """Serve one model's requests on its lanes.

    Construct it and call it on the event loop; each lane's thread starts at once.

    Args:
        lanes: Lanes in order of preference; the first one's variant and device take unpinned work first.
        limits: The model's limits.
        metrics: Where waiting times, batches and the queue's length are counted.
        cores: Cores that unpinned work may keep busy on one device.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lanes: Sequence[LaneSpec],
        limits: BatchLimits,
        metrics: ModelMetrics,
        cores: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._metrics, self._cores, self._clock = limits, metrics, cores, clock
        self._loop = asyncio.get_running_loop()
        self._lanes = [_Lane(spec, routing.state_of(spec, limits, cores)) for spec in lanes]
        self._routes = routing.routes_of([lane.state for lane in self._lanes])
        self._queues: dict[str, RequestQueue[_Future]] = {pin: RequestQueue() for pin in self._routes}
        self._rows = 0  # of all queues together
        self._dispatch_due = False
        self._delay = _Timer(self._loop, self._dispatch)
        self._expiry = _Timer(self._loop, self._expire)
        self._swept_s = float("-inf")
        self._draining = False
        self._drained: asyncio.Future[None] | None = None
        self._threads = [self._start_thread(number, lane) for number, lane in enumerate(self._lanes)]

    def _start_thread(self, number: int, lane: _Lane) -> threading.Thread:
        spec = lane.spec
        name = f"lane-{spec.variant}-{spec.device}-{number}"
        # Daemonic: a process that ends without close() must not hang on a thread that waits for work.
        thread = threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)
        thread.start()
        self._metrics.lane_up(spec.variant, spec.device, True)
        return thread

    # Admission.

    def submit(self, request: InferRequest) -> asyncio.Future[Completion]:
        """Admit a request.

        Cancelling the future drops the request if its batch has not formed; a batch that runs is not stopped.

        Args:
            request: A request that fits the model's signature. Its arrays must not change until the future is done.

        Returns:
            A future of the answer. It fails with ``DeadlineExpired``, ``InferenceFailed`` or ``Draining``.

        Raises:
            Draining: If ``drain`` or ``close`` began.
            UnknownVariant: If the request pins a variant that no lane has.
            SignatureMismatch: If the model is batched and the inputs have no common batch size.
            QueueFull: If too many rows wait.
            DeadlineUnmeetable: If the answer is predicted to come after the deadline.
        """
        if self._draining:
            raise Draining("the model is draining; send the request to another replica")
        queue = self._queues.get(request.variant)
        if queue is None:
            known = ", ".join(pin for pin in self._queues if pin)
            raise UnknownVariant(f"unknown variant '{request.variant}'; this model serves: {known}")
        limits = self._limits
        now = self._clock()
        future = self._loop.create_future()
        pending = batching.pending_of(request, limits.batchable, now, limits.default_timeout_s, future)
        if pending.deadline_s is not None or self._rows + pending.rows > limits.max_queue_rows:
            self._admit(pending, now)
        queue.append(pending)
        self._rows += pending.rows
        self._dispatch_soon()
        if pending.deadline_s is not None:
            self._expiry.set(pending.deadline_s, now)
        return future

    def _admit(self, pending: Pending[_Future], now: float) -> None:
        refusal = partial(routing.refusal, pending, self._routes, self._queues, self._limits, now, self._cores)
        refused = refusal()
        if refused is not None and now >= self._swept_s + _SWEEP_STEP_S:
            # The rows of clients that left still count; look again without them.
            self._sweep(now)
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
        """Give every idle lane that may take work its next batch; then run at most one batch on the loop itself."""
        self._dispatch_due = False
        inline: _Run | None = None
        if self._rows:
            now = self._clock()
            for lane in self._lanes:
                if lane.state.busy or (lane.inline and inline is not None):
                    continue
                run = lane.run = self._next_run(lane, now)
                if run is None:
                    continue
                if lane.inline and lane.state.busy_until_s - now < INLINE_BATCH_S:
                    inline = run
                else:
                    lane.mailbox.put(run)
        if inline is not None:
            self._execute(inline)
            inline.lane.state.busy, inline.lane.run = False, None
            self._answer(inline)
            if self._rows:
                self._dispatch_soon()
        self._settle()

    def _next_run(self, lane: _Lane, now: float) -> _Run | None:
        """Take an idle lane's next batch out of the queues; ``None`` when there is nothing for it."""
        state = lane.state
        while (pin := routing.choose(state, self._routes, self._queues, now, self._cores)) is not None:
            queue = self._queues[pin]
            if self._limits.max_queue_delay_s and not self._draining:
                run_s = state.run_s(state.max_rows)
                ready_s = batching.ready_at(queue, state.max_rows, self._limits.max_queue_delay_s, run_s)
                if ready_s > now:
                    self._delay.set(ready_s, now)
                    return None
            rows = queue.rows
            batch = batching.plan(queue, now, state.max_rows)
            self._rows -= rows - queue.rows
            _fail(batch.expired, partial(_expired, now))
            if batch.requests:
                state.start(batch.rows, bool(pin), now)
                return _Run(lane, batch, now)
        return None

    # Execution.

    def _work(self, lane: _Lane) -> None:
        """Run a lane's batches until its mailbox says ``None``; the body of the lane's thread."""
        while self._work_once(lane):
            pass

    def _work_once(self, lane: _Lane) -> bool:
        # A function of its own, so that an idle thread keeps no batch alive in its variables.
        run = lane.mailbox.get()
        if run is None:
            return False
        self._execute(run)
        try:
            self._loop.call_soon_threadsafe(self._finish, run)
        except RuntimeError:  # The loop is closed: nobody is left to wait for the outcome.
            return False
        return True

    def _execute(self, run: _Run) -> None:
        """Assemble, run and split one batch; in the lane's thread, or on the loop for a tiny model. Never raises."""
        started_s = self._clock()
        try:
            outputs = run.lane.spec.runner.run(batching.assemble(run.batch.requests))
            run.outputs = [outputs]
            if self._limits.batchable:
                run.outputs = batching.split(outputs, [pending.rows for pending in run.batch.requests])
        except BaseException as exc:  # noqa: BLE001  A thread that died would leave its clients waiting for ever.
            run.error = exc
        run.compute_s = self._clock() - started_s

    def _finish(self, run: _Run) -> None:
        """Refill a lane whose thread is done with a batch, then answer that batch."""
        run.lane.state.busy, run.lane.run = False, None
        try:
            self._dispatch()
        finally:
            self._answer(run)

    def _answer(self, run: _Run) -> None:
        spec, rows, requests = run.lane.spec, run.batch.rows, run.batch.requests
        if run.error is not None:
            logger.error(
                "variant %s on %s failed on a batch of %d rows", spec.variant, spec.device, rows, exc_info=run.error
            )
            text = f"variant '{spec.variant}' failed on {spec.device}; the server's log has the details"
            _fail(requests, lambda _: InferenceFailed(text))
            return
        for pending, outputs in zip(requests, run.outputs, strict=True):
            if not pending.future.done():
                queue_s = run.started_s - pending.arrival_s
                answer = Completion(outputs, spec.variant, spec.device, rows, queue_s, run.compute_s)
                pending.future.set_result(answer)
        # After all answers: nobody's answer may hang on a metric.
        for pending in requests:
            self._metrics.dispatched(run.started_s - pending.arrival_s)
        self._metrics.batch_finished(spec.variant, spec.device, rows, run.compute_s)

    # Expiry.

    def _expire(self) -> None:
        self._sweep(self._clock())
        self._settle()

    def _sweep(self, now: float) -> None:
        """Answer expired requests, forget cancelled ones, and set the timer for the next deadline."""
        self._swept_s = now
        self._expiry.cancel()
        for queue in self._queues.values():
            expired, deadline_s = batching.sweep(queue, now)
            _fail(expired, partial(_expired, now))
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
        running = [lane.run for lane in self._lanes if lane.run is not None]
        logger.warning("drain timed out after %g s: %d rows wait, %d batches run", timeout_s, self._rows, len(running))
        for run in running:
            _fail(run.batch.requests, _drained)
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
        if not self._loop.is_closed():
            self._fail_waiting()
        for lane in self._lanes:
            lane.mailbox.put(None)
        for lane, thread in zip(self._lanes, self._threads, strict=True):
            thread.join()
            self._metrics.lane_up(lane.spec.variant, lane.spec.device, False)

    def _is_empty(self) -> bool:
        return not self._rows and not any(lane.state.busy for lane in self._lanes)

    def _settle(self) -> None:
        self._metrics.queue_rows(self._rows)
        if self._drained is not None and not self._drained.done() and self._is_empty():
            self._drained.set_result(None)

    def _fail_waiting(self) -> None:
        for queue in self._queues.values():
            _fail(list(queue), _drained)
            queue.replace(())
        self._rows = 0


class _Timer:
    """One timer of the loop that calls back at the earliest of the times it was set to, in the scheduler's clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._handle: asyncio.TimerHandle | None = None
        self._at_s = 0.0

    def set(self, at_s: float, now: float) -> None:
        """Call back at ``at_s``, unless it calls back earlier already."""
        if self._handle is None or at_s < self._at_s:
            self.cancel()
            self._at_s = at_s
            self._handle = self._loop.call_later(at_s - now, self._fire)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._callback()


def _fail(requests: Iterable[Pending[_Future]], reason: Callable[[Pending[_Future]], SlipstreamError]) -> None:
    """Fail what is not settled yet, each request with an exception of its own: a raised one collects tracebacks."""
    for pending in requests:
        if not pending.future.done():
            pending.future.set_exception(reason(pending))


def _expired(now: float, pending: Pending[_Future]) -> SlipstreamError:
    waited_ms = (now - pending.arrival_s) * 1e3
    return DeadlineExpired(f"the deadline passed after {waited_ms:.1f} ms in the queue; retry later or allow more time")


def _drained(_: Pending[_Future]) -> SlipstreamError:
    return Draining("the model stopped before the request was run; send it to another replica")
