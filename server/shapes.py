"""Shapes of the requests that a model got: what an engine should be built for."""

from typing import Any

from server.tensors import Signature, Tensors

MOST_SHAPES = 4096
"""Different ones that are counted; beyond, the rarer half is forgotten."""
BATCH = -1


class Shapes:
    """Counts the shapes of one model's requests, without their batch sizes. Belongs to the event loop.

    Args:
        signature: The model's; its variable axes are counted.
        batchable: Whether axis 0 is the batch, whose size is no matter of a request.
    """

    def __init__(self, signature: Signature, *, batchable: bool) -> None:
        self._specs = signature.inputs
        self._batchable = batchable
        self._open = [
            (spec.name, axis)
            for spec in signature.inputs
            for axis, size in enumerate(spec.shape)
            if not isinstance(size, int) and not (batchable and axis == 0)
        ]
        self._seen: dict[tuple[int, ...], int] = {}

    @property
    def vary(self) -> bool:
        """Whether there is anything to count."""
        return bool(self._open)

    def count(self, inputs: Tensors) -> None:
        """Count a request that fits the signature."""
        key = tuple([inputs[name].shape[axis] for name, axis in self._open])
        seen = self._seen
        seen[key] = seen.get(key, 0) + 1
        if len(seen) > MOST_SHAPES:
            self._seen = dict(sorted(seen.items(), key=lambda item: -item[1])[: MOST_SHAPES // 2])

    def table(self) -> list[dict[str, Any]]:
        """Return the shapes of all inputs with the number of their requests, the most frequent first.

        Axis 0 is -1 where it is the batch. Without variable axes, there is one entry, with 0 requests counted.
        """
        seen = self._seen or ({} if self._open else {(): 0})
        return [
            {"requests": count, "inputs": self._shapes(key)}
            for key, count in sorted(seen.items(), key=lambda item: (-item[1], item[0]))
        ]

    def _shapes(self, key: tuple[int, ...]) -> dict[str, list[int]]:
        sizes = dict(zip(self._open, key, strict=True))
        return {
            spec.name: [
                size if isinstance(size, int) else sizes.get((spec.name, axis), BATCH)
                for axis, size in enumerate(spec.shape)
            ]
            for spec in self._specs
        }
