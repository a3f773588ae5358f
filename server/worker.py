"""A lane at work: its thread, the batch that it runs, and the probe that tells a bad lane from a bad input.

The thread only runs batches. It sleeps on its mailbox and hands each outcome to the event loop with one wake-up, so
that a batch costs two thread switches however many requests it holds.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from server import batching
from server.batching import Plan
from server.breaker import Breaker
from server.errors import OutOfMemory
from server.outcome import Future
from server.ragged import Ragged
from server.routes import LaneSpec, LaneState
from server.tensors import Tensors

logger = logging.getLogger(__name__)

INLINE_LANE_S = 1e-4
"""A lane whose single-row run is shorter than this runs on the loop: two thread switches would cost more than it."""

INLINE_BATCH_S = 1e-3
"""...except a batch that is predicted to hold the loop for longer than this."""


class Run:
    """A batch on its way through a lane.

    Attributes:
        worker: The lane.
        batch: The requests.
        started_s: When it was dispatched.
        compute_s: Seconds that it took; ``assemble_s`` of them passed before it ran.
        outputs: Of each request, once it has run.
        error: What went wrong; ``None`` when nothing did.
        probe_passed: After an error, whether the lane still runs inputs that are known to work; ``None`` when no such
            inputs are known.
    """

    __slots__ = ("assemble_s", "batch", "compute_s", "error", "outputs", "probe_passed", "started_s", "worker")

    def __init__(self, worker: "Worker", batch: Plan[Future], started_s: float) -> None:
        self.worker, self.batch, self.started_s = worker, batch, started_s
        self.compute_s = self.assemble_s = 0.0
        self.outputs: list[Tensors] = []
        self.error: BaseException | None = None
        self.probe_passed: bool | None = None


class Worker:
    """One lane with its thread.

    Construct it and call it on the event loop.

    Args:
        spec: The lane.
        state: What routing knows of it.
        ragged: How requests of unequal length are joined.
        batchable: Whether a batch is split among its requests.
        clock: Monotonic seconds.
        finished: Called on the loop with each batch that the thread has run.
        probed: Called on the loop with the outcome of each probe that was asked for.

    Attributes:
        spec: As given.
        state: As given.
        breaker: Whether it must get no work.
        inline: Whether its small batches run on the loop.
        run: The batch that it runs; ``None`` while it is idle.
    """

    def __init__(  # noqa: PLR0913  (what a thread needs to know, once)
        self,
        spec: LaneSpec,
        state: LaneState,
        ragged: Ragged,
        batchable: bool,
        clock: Callable[[], float],
        finished: Callable[[Run], None],
        probed: Callable[["Worker", bool], None],
    ) -> None:
        self.spec, self.state, self.breaker = spec, state, Breaker()
        self.inline = spec.latency is not None and spec.latency.predict_s(1) < INLINE_LANE_S
        self.run: Run | None = None
        self._works = spec.probe  # inputs that are known to work
        self._ragged, self._batchable, self._clock = ragged, batchable, clock
        self._finished, self._probed = finished, probed
        self._loop = asyncio.get_running_loop()
        self._mailbox: SimpleQueue[Run | bool] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, number: int) -> None:
        """Start the thread."""
        name = f"lane-{self.spec.variant}-{self.spec.device}-{number}"
        # Daemonic: a process that ends without stop() must not hang on a thread that waits for work.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, run: Run) -> None:
        """Let the thread run a batch."""
        self._mailbox.put(run)

    def probe(self) -> None:
        """Let the thread run the inputs that are known to work."""
        self._mailbox.put(True)

    def stop(self) -> None:
        """Let the thread end after what it has got; idempotent."""
        self._mailbox.put(False)

    def join(self) -> None:
        """Wait for the thread's end."""
        if self._thread is not None:
            self._thread.join()

    def execute(self, run: Run) -> None:
        """Assemble, run and split one batch; in the thread, or on the loop for a tiny model. Never raises."""
        started_s = self._clock()
        requests = run.batch.requests
        try:
            inputs = batching.assemble(requests, self._ragged)
            run.assemble_s = self._clock() - started_s
            outputs = self.spec.runner.run(inputs)
            run.outputs = batching.split(outputs, requests, self._ragged) if self._batchable else [outputs]
            if self._works is None:
                self._works = self._first_row(requests[0].request.inputs)
        except BaseException as exc:  # noqa: BLE001  A thread that died would leave its clients waiting for ever.
            run.error = exc
            if not isinstance(exc, OutOfMemory) or run.batch.rows == 1:  # else a smaller batch tells more than a probe
                run.probe_passed = self._passes_probe()
        run.compute_s = self._clock() - started_s

    def _first_row(self, inputs: Tensors) -> Tensors:
        # A copy: the request's memory may be used for another one later.
        return {name: (array[:1] if self._batchable else array).copy() for name, array in inputs.items()}

    def _passes_probe(self) -> bool | None:
        if self._works is None:
            return None
        try:
            self.spec.runner.run(self._works)
        except BaseException:  # as above
            logger.debug("variant %s on %s fails its probe", self.spec.variant, self.spec.device, exc_info=True)
            return False
        return True

    @property
    def can_probe(self) -> bool:
        """Whether inputs are known that work."""
        return self._works is not None

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        # A function of its own, so that an idle thread keeps no batch alive in its variables.
        message = self._mailbox.get()
        try:
            if isinstance(message, Run):
                self.execute(message)
                self._loop.call_soon_threadsafe(self._finished, message)
            elif message:
                self._loop.call_soon_threadsafe(self._probed, self, self._passes_probe() is not False)
        except RuntimeError:  # The loop is closed: nobody is left to wait for the outcome.
            return False
        return message is not False
