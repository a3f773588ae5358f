"""Passes: each takes a model and gives another one, with an account of what it did.

A pass changes a copy and never its input, so that a refused result costs nothing but time. What the result must fulfil
follows from the effect: ``exact`` and ``tolerance`` results must reproduce the outputs of their input (see ``check``),
``lossy`` ones are judged on samples that no pass has seen. Passes form chains, e.g. ``SmoothQuant``, ``Int8Static``,
``BiasCorrection``; each says what form it takes and what form it makes.

A pass is a frozen ``msgspec.Struct`` whose fields are its settings, or a class without any; either can be pickled, and
its settings are part of the key under which its result is cached.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import onnx

from server.artifact import SessionOptions
from server.host import HostFacts
from server.tensors import Tensors

Effect = Literal["exact", "tolerance", "lossy"]
"""What a pass may do to the outputs: rounding of FP32 only, rounding that accumulates, or anything the gate accepts."""


Form = Literal["fp32", "fp16", "bf16", "int8", "weight-only", "cpu-build"]
"""What kind of model a pass takes or makes; ``cpu-build`` holds onnxruntime's own operators, for this kind of CPU."""

Need = Literal["calibration", "reference", "host"]
"""What a pass cannot go without: real inputs, the unquantized model, or the facts of the host (its result then differs
between hosts, and counts on hosts like this one only)."""

Target = Literal["any", "cpu", "cuda", "tensorrt"]
"""Where the result of a pass pays."""


class PassSpec(msgspec.Struct, frozen=True):
    """What a pass declares.

    Attributes:
        name: Unique name.
        version: Raised whenever the same input would give another result.
        effect: Decides the check after the pass.
        consumes: The form that it takes.
        produces: The form that it makes.
        needs: What must be there.
        target: Where its result pays.
    """

    name: str
    version: int
    effect: Effect
    consumes: Form = "fp32"
    produces: Form = "fp32"
    needs: frozenset[Need] = frozenset()
    target: Target = "any"


class PassContext(msgspec.Struct, frozen=True):
    """What a pass may use.

    Attributes:
        host: The machine that will serve.
        calibration: Batches of real inputs, each name -> array as the session takes it; empty when no data was given.
            The last batch may be smaller than the others. Batches may come from disk: take them one by one, and keep
            none.
        seed: For whatever is random.
        work: An existing folder for temporary files.
        reference: The unquantized model that the chain started from, as a file; ``None`` where there is none. Tensors
            of both models that have the same name hold the same quantity.
    """

    host: HostFacts
    calibration: Sequence[Tensors] = ()
    seed: int = 0
    work: Path = Path()
    reference: Path | None = None


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
    """One step of the graph-optimization stage; instances can be pickled."""

    @property
    def spec(self) -> PassSpec:
        """Name, version, effect, and what it takes, makes and needs."""
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
