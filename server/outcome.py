"""How a request ends: with a completion, or with an exception of its own."""

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from server.errors import DeadlineExpired, Draining, SlipstreamError
from server.tensors import Tensors
from server.waiting import Pending


class Completion(msgspec.Struct, frozen=True):
    """The answer to one request.

    Attributes:
        outputs: Name -> array with the request's own rows; views of the batch's outputs.
        variant: The variant that ran it.
        device: Where.
        batch_rows: Rows of the batch.
        queue_s: Seconds from admission to dispatch.
        compute_s: Seconds of the batch's run with assembly and split; ``assemble_s`` of them were assembly.
    """

    outputs: Tensors
    variant: str
    device: str
    batch_rows: int
    queue_s: float
    compute_s: float
    assemble_s: float


Future = asyncio.Future[Completion]
"""Where the outcome of a request goes."""


def fail(requests: Iterable[Pending[Future]], reason: Callable[[Pending[Future]], SlipstreamError]) -> None:
    """Fail what is not settled yet, each request with an exception of its own: a raised one collects tracebacks."""
    for pending in requests:
        if not pending.future.done():
            pending.future.set_exception(reason(pending))


def expired(now: float, pending: Pending[Future]) -> SlipstreamError:
    """Make the error of a request that cannot be answered in time any more."""
    waited_ms = (now - pending.arrival_s) * 1e3
    if pending.deadline_s is not None and now < pending.deadline_s:
        left_ms = (pending.deadline_s - now) * 1e3
        text = f"after {waited_ms:.1f} ms in the queue {left_ms:.1f} ms are left, fewer than a run takes"
        return DeadlineExpired(f"{text}; retry later or allow more time")
    return DeadlineExpired(f"the deadline passed after {waited_ms:.1f} ms in the queue; retry later or allow more time")


def drained(_: Pending[Future]) -> SlipstreamError:
    """Make the error of a request that a stopping model did not get to."""
    return Draining("the model stopped before the request was run; send it to another replica")
