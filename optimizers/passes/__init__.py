"""Passes: each takes a model and gives another one, with an account of what it did.

A pass changes a copy and never its input, so that a refused result costs nothing but time. What the result must fulfil
follows from the effect: ``exact`` and ``tolerance`` results must reproduce the outputs of their input (see ``check``),
``lossy`` ones are judged on held-out samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import onnx

from optimizers.host import HostFacts
from server.artifact import SessionOptions
from server.tensors import Tensors

Effect = Literal["exact", "tolerance", "lossy"]
"""What a pass may do to the outputs: rounding of FP32 only, rounding that accumulates, or anything the gate accepts."""


class PassContext(msgspec.Struct, frozen=True):
    """What a pass may use.

    Attributes:
        host: The machine that will serve.
        calibration: Batches of real inputs, each name -> array as the session takes it; empty when no data was given.
            The last batch may be smaller than the others.
        seed: For whatever is random.
        work: An existing folder for temporary files.
    """

    host: HostFacts
    calibration: Sequence[Tensors] = ()
    seed: int = 0
    work: Path = Path()


class PassResult(msgspec.Struct, frozen=True):
    """What a pass made.

    Attributes:
        model: The new model, or the input itself when nothing changed.
        changed: Whether ``model`` differs from the input.
        counts: What was fused, removed, converted, by name.
        note: One line for the report.
        options: How sessions of the new model must be opened; only ``config`` entries are taken over.
    """

    model: onnx.ModelProto
    changed: bool
    counts: dict[str, int] = {}
    note: str = ""
    options: SessionOptions = SessionOptions()


class Pass(Protocol):
    """One step of the graph-optimization stage; instances can be pickled.

    ``version`` is raised whenever the same input would give another result.
    """

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    @property
    def version(self) -> int:
        """Number of the form of the pass."""
        ...

    @property
    def effect(self) -> Effect:
        """Decides the check after the pass."""
        ...

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:
        """Apply the pass.

        Args:
            model: Left unchanged; weights are inside, not in external files.
            context: Host, calibration data, seed, folder.

        Raises:
            PassFailed: If it cannot be applied, with the reason.
        """
        ...


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a deep copy, for passes that edit in place."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin
