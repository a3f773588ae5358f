"""Inputs to try and to measure a model with: its golden ones, or ones that its signature allows."""

import logging
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from server.artifact import Batching, Golden
from server.errors import InferenceFailed
from server.session import MEASURED_ROWS, Opened, synthetic_inputs
from server.tensors import Signature, Tensors

logger = logging.getLogger(__name__)

TYPICAL_SIZE = 64
"""Of variable axes beside the batch, where threads are compared: the tokens of a short text. With the least size, 1,
there would be nothing for a second thread to do."""


class Sample(msgspec.Struct, frozen=True):
    """Inputs of one model.

    Attributes:
        batchable: Whether rows of different requests may share a run.
        probe: Inputs that are known to work; ``None`` when there are none.
        inputs: Makes a batch of so many rows as large as requests may be; ``None`` when none is known to work.
        sizes: Batch sizes to measure in rows, ascending from 1.
        tells_times: Whether requests take as long as these inputs: theirs are as large as their rows tell.
    """

    batchable: bool
    probe: Tensors | None
    inputs: Callable[[int], Tensors] | None
    sizes: tuple[int, ...] = (1,)
    tells_times: bool = True


def sample_of_golden(golden: Golden, batching: Batching) -> Sample:
    """Make a sample of an artifact's golden inputs, repeated where a batch has more rows."""
    if not batching.batchable:
        return Sample(False, golden.inputs, lambda _: golden.inputs)
    sizes = tuple(rows for rows in MEASURED_ROWS if rows <= max(batching.max_rows, 1))
    inputs = partial(_repeated, golden.inputs)
    return Sample(True, inputs(1), inputs, sizes)


def sample_of_plain(session: Opened) -> Sample:
    """Try a plain model with inputs of ones, which also warms it up, and see whether it may be batched."""
    signature = session.signature
    batchable = signature.shares_batch_axis
    ones = synthetic_inputs(signature, 1)
    try:
        session.run(ones)
    except InferenceFailed as exc:
        logger.info("not warmed up, inputs of ones do not suit the model: %s", exc)
        return Sample(batchable, None, None)
    if batchable and not _runs_two_rows(session):
        logger.warning("the model declares a variable batch axis but does not map two rows to two; it is not batched")
        batchable = False
    sizes = MEASURED_ROWS if batchable else (1,)
    if not _has_open_sizes(signature, batchable):
        return Sample(batchable, ones, partial(synthetic_inputs, signature), sizes)
    larger = partial(synthetic_inputs, signature, open_size=TYPICAL_SIZE)
    runs_larger = not _takes_text(signature) and _runs(session, larger(1))
    return Sample(batchable, ones, larger if runs_larger else None, sizes, tells_times=False)


def _repeated(inputs: Tensors, rows: int) -> Tensors:
    return {name: array.take(np.arange(rows) % len(array), axis=0) for name, array in inputs.items()}


def _has_open_sizes(signature: Signature, batchable: bool) -> bool:
    """Whether a request can be larger than its rows tell, so that times of inputs of ones promise what none keeps."""
    return _takes_text(signature) or any(
        not all(isinstance(size, int) for size in spec.shape[1 if batchable else 0 :]) for spec in signature.inputs
    )


def _takes_text(signature: Signature) -> bool:
    return any(spec.datatype == "BYTES" for spec in signature.inputs)


def _runs(session: Opened, inputs: Tensors) -> bool:
    try:
        session.run(inputs)
    except InferenceFailed:
        return False
    return True


def _runs_two_rows(session: Opened) -> bool:
    try:
        outputs = session.run(synthetic_inputs(session.signature, 2))
    except InferenceFailed:
        return False
    return all(array.shape[:1] == (2,) for array in outputs.values())
