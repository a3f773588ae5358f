"""Engines are built for a range of shapes; what lies outside of it runs on the variant that the engine was made of."""

import logging

from server.artifact import Profile
from server.session import Opened
from server.tensors import Array, Signature, Tensors

logger = logging.getLogger(__name__)


class RangedSession:
    """An engine and, for shapes that it was not built for, the session of its source; takes the place of a ``Session``.

    Args:
        engine: The opened engine.
        profile: The shapes that it takes.
        otherwise: Runs every other shape. It belongs to someone else, who closes it.

    Attributes:
        signature: Of the source: the same names, and variable axes by their names.
        device: Of the engine.
        providers: Of the engine.
    """

    def __init__(self, engine: Opened, profile: Profile, otherwise: Opened) -> None:
        self.signature: Signature = otherwise.signature
        self.device, self.providers = engine.device, engine.providers
        self._engine, self._profile, self._otherwise = engine, profile, otherwise
        self._told = False

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run the engine, or its source for shapes outside of the profile; see ``Session.run``.

        Raises:
            InferenceFailed: If the run fails.
        """
        if covers(self._profile, inputs):
            return self._engine.run(inputs, outputs)
        if not self._told:
            self._told = True
            shapes = {name: list(array.shape) for name, array in inputs.items()}
            logger.warning(
                "shapes %s lie outside of the engine's profile, up to %s, and run on %s; build it for these as well",
                shapes,
                {name: list(shape) for name, shape in self._profile.maximum.items()},
                self._otherwise.device.name,
            )
        return self._otherwise.run(inputs, outputs)

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


def covers(profile: Profile, inputs: Tensors) -> bool:
    """Whether an engine of this profile takes inputs of these shapes; inputs that the profile leaves out always fit."""
    for name, lowest in profile.minimum.items():
        if name in inputs:
            shape, highest = inputs[name].shape, profile.maximum[name]
            if len(shape) != len(lowest) or any(
                not low <= size <= high for low, size, high in zip(lowest, shape, highest, strict=True)
            ):
                return False
    return True
