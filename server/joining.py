"""Requests of more rows than a batch: parted, run wherever there is room, and joined again."""

from collections.abc import Sequence

import numpy as np

from server.outcome import Completion, Future
from server.tensors import Array, Tensors


def parts_of(inputs: Tensors, rows: int, size: int) -> list[Tensors]:
    """Part inputs along axis 0 into views of at most ``size`` rows each."""
    return [{name: array[start : start + size] for name, array in inputs.items()} for start in range(0, rows, size)]


def join(parts: Sequence[Future], whole: Future) -> None:
    """Settle a future with the joined answers of its parts; call it on the event loop.

    The first part that fails fails the whole, and the others are cancelled; so they are when the whole is.
    """
    _Join(parts, whole)


class _Join:
    def __init__(self, parts: Sequence[Future], whole: Future) -> None:
        self._parts, self._whole, self._open = parts, whole, len(parts)
        for part in parts:
            part.add_done_callback(self._part_done)
        whole.add_done_callback(self._whole_done)

    def _part_done(self, part: Future) -> None:
        self._open -= 1
        if self._whole.done():
            if not part.cancelled():
                part.exception()  # looked at, so that it is not reported as forgotten
            return
        if part.cancelled():
            self._whole.cancel()
        elif (error := part.exception()) is not None:
            self._whole.set_exception(error)
        elif not self._open:
            self._whole.set_result(_joined([each.result() for each in self._parts]))

    def _whole_done(self, _: Future) -> None:
        for part in self._parts:
            part.cancel()


def _joined(parts: Sequence[Completion]) -> Completion:
    outputs: dict[str, Array] = {
        name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs
    }
    return Completion(
        outputs,
        "+".join(dict.fromkeys(part.variant for part in parts)),
        "+".join(dict.fromkeys(part.device for part in parts)),
        max(part.batch_rows for part in parts),
        max(part.queue_s for part in parts),
        max(part.compute_s for part in parts),
        max(part.assemble_s for part in parts),
    )
