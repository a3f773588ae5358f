"""A model cut into stages, each a session on a device of its own, that successive batches pass through like a pipeline.

For a model that is too large, or too slow, for one device. While one batch is in the second stage, the next one is in
the first: as many threads as there are stages keep all devices busy.
"""

import threading
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from server.artifact import SessionOptions, Variant
from server.errors import ArtifactError, StartupError
from server.native import SUFFIX, NativeSession
from server.providers import Device
from server.session import Opened, Session
from server.tensors import Array, Signature, Tensors


class StagedSession:
    """Stages that are run one after another; takes the place of a ``Session``.

    ``run`` may be called from several threads at once; each stage runs one batch at a time.

    Args:
        name: Of the variant, for messages.
        stages: In order. A stage takes inputs of the model and outputs of earlier stages.
        signature: Of the whole model.

    Attributes:
        signature: As given.
        device: That of the first stage.
        devices: Of each stage.
        providers: Active execution providers, of all stages.

    Raises:
        ArtifactError: If a stage takes a tensor that nothing before it gives, or if an output is given by no stage.
    """

    def __init__(self, name: str, stages: Sequence[Session], signature: Signature) -> None:
        self.signature = signature
        self.device: Device = stages[0].device
        self.devices = tuple(stage.device for stage in stages)
        self.providers = tuple(dict.fromkeys(name for stage in stages for name in stage.providers))
        self._name, self._stages = name, tuple(stages)
        self._locks = [threading.Lock() for _ in stages]
        self._takes = [[spec.name for spec in stage.signature.inputs] for stage in stages]
        self._outputs = [spec.name for spec in signature.outputs]
        self._last_use = self._uses()

    def run(self, inputs: Tensors, outputs: tuple[str, ...] = ()) -> dict[str, Array]:
        """Run all stages; see ``Session.run``.

        Raises:
            InferenceFailed: If a stage fails or is closed.
        """
        tensors: dict[str, Array] = dict(inputs)
        for number, (stage, lock, takes) in enumerate(zip(self._stages, self._locks, self._takes, strict=True)):
            needed = {name: tensors[name] for name in takes if name in tensors}
            with lock:
                tensors |= stage.run(needed)
            for name in self._last_use[number]:
                tensors.pop(name, None)
        return {name: tensors[name] for name in outputs or self._outputs}

    def placement(self) -> dict[str, dict[str, int]]:
        """Return execution provider -> operator -> count of its nodes, of all stages; see ``Session.placement``."""
        placed: dict[str, dict[str, int]] = {}
        for stage in self._stages:
            for provider, ops in stage.placement().items():
                counts = placed.setdefault(provider, {})
                for op, count in ops.items():
                    counts[op] = counts.get(op, 0) + count
        return placed

    def close(self) -> None:
        """Release all stages once the runs in progress have ended; later runs fail."""
        for stage in self._stages:
            stage.close()

    def _uses(self) -> list[list[str]]:
        """Return, of each stage, the tensors between stages that nothing needs after it."""
        known = {spec.name for spec in self.signature.inputs}
        last: dict[str, int] = {}
        for number, (stage, takes) in enumerate(zip(self._stages, self._takes, strict=True)):
            if missing := [name for name in takes if name not in known]:
                raise ArtifactError(
                    f"stage {number + 1} of {self._name} takes {missing}, which nothing before it gives"
                )
            last |= dict.fromkeys(takes, number)
            known |= {spec.name for spec in stage.signature.outputs}
        if lost := [name for name in self._outputs if name not in known]:
            raise ArtifactError(f"no stage of {self._name} gives the outputs {lost}")
        return [
            [name for name, used in last.items() if used == number and name not in self._outputs]
            for number in range(len(self._stages))
        ]


def open_variant(
    folder: Path, variant: Variant, devices: Sequence[Device], options: SessionOptions, signature: Signature | None
) -> Opened:
    """Open a variant.

    Args:
        folder: Of its version.
        variant: What to open.
        devices: Where: the first one, or all of them one after another for stages, from the first one again where they
            are fewer than the stages.
        options: Of the session, or of each stage.
        signature: The manifest's; stages need it.

    Raises:
        StartupError: If a file cannot be opened on its device, or if the stages do not fit together.
    """
    if variant.file.endswith(SUFFIX):
        return NativeSession(folder / variant.file, devices[0])
    if not variant.stages or signature is None:
        return Session(folder / variant.file, devices[0], options)
    files = (variant.file, *variant.stages)
    stages: list[Session] = []
    try:
        for file, device in zip(files, islice(cycle(devices), len(files)), strict=True):
            stages.append(Session(folder / file, device, options))
        return StagedSession(variant.name, stages, signature)
    except StartupError:
        for stage in stages:
            stage.close()
        raise
