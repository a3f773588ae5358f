"""Requests of unequal length in one batch: padded to the longest, and cut back afterwards. Pure.

Only along the axis for which the optimizer has proven that padding changes no answer (``artifact.Padding``).
"""

from collections.abc import Sequence

import numpy as np

from server.artifact import Padding
from server.errors import InferenceFailed
from server.tensors import Array, Tensors

MOST_PADDING = 1.5
"""A batch holds at most so many times the elements of its requests; beyond that two batches are cheaper."""


class Ragged:
    """The axis of a model along which requests may differ.

    Args:
        padding: The proof; without one, nothing may differ.
    """

    def __init__(self, padding: Padding | None = None) -> None:
        proven = padding is not None and padding.paddable
        self._axes = padding.axes if padding is not None and proven else {}
        self._output_axes = padding.output_axes if padding is not None and proven else {}
        self._value = padding.value if padding is not None else 0

    def axis(self, name: str) -> int | None:
        """Return the axis of an input that may be padded; ``None`` for an input that may not."""
        return self._axes.get(name)

    def length(self, inputs: Tensors) -> int:
        """Return the length of a request along the axis; 0 when the model has none, or its inputs disagree."""
        if not self._axes:
            return 0
        sizes = {inputs[name].shape[axis] for name, axis in self._axes.items() if axis < inputs[name].ndim}
        return int(sizes.pop()) if len(sizes) == 1 else 0

    def join(self, requests: Sequence[Tensors], rows: int, length: int) -> dict[str, Array]:
        """Join requests along axis 0 with one copy, padded at the end of the axis.

        Args:
            requests: Inputs of at least one request; equal but for axis 0 and the ragged axis.
            rows: Of all requests together.
            length: Of the longest.
        """
        joined: dict[str, Array] = {}
        for name, first in requests[0].items():
            axis = self._axes.get(name)
            if axis is None:
                joined[name] = np.concatenate([request[name] for request in requests])
                continue
            shape = [rows, *first.shape[1:]]
            shape[axis] = length
            whole = np.empty(shape, first.dtype)
            start = 0
            for request in requests:
                part = request[name]
                stop = start + len(part)
                target = np.moveaxis(whole[start:stop], axis, -1)
                target[..., : part.shape[axis]] = np.moveaxis(part, axis, -1)
                target[..., part.shape[axis] :] = self._value
                start = stop
            joined[name] = whole
        return joined

    def cut(self, outputs: Tensors, length: int) -> Tensors:
        """Return one request's outputs without what the padding added: views.

        Raises:
            InferenceFailed: If an output is shorter than the request.
        """
        if not self._output_axes:
            return outputs
        cut: dict[str, Array] = dict(outputs)
        for name, axis in self._output_axes.items():
            if name not in cut:
                continue
            if cut[name].shape[axis] < length:
                raise InferenceFailed(
                    f"output '{name}' has {cut[name].shape[axis]} positions for {length} of the input"
                )
            cut[name] = cut[name][(slice(None),) * axis + (slice(length),)]
        return cut
