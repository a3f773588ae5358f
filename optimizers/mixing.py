"""Mixed precision: which layers of a quantized candidate stay in float, found on a simulation and then built."""

from typing import Literal

import msgspec
import onnx

from optimizers.building import Chain, Line
from optimizers.errors import PassFailed
from optimizers.exam import Exam
from optimizers.graph import load_model
from optimizers.isolation import Form
from optimizers.passes import PassContext
from optimizers.passes.activations import ranges
from optimizers.passes.adaround import AdaRound
from optimizers.passes.catalog import settings_of
from optimizers.passes.int8 import WEIGHTED_OPS, prepared, reduced_range
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.roots import quantizer_index
from optimizers.search import Gate, unfaithful
from optimizers.sensitivity import LayerSensitivity, Samples, rank, smallest_float_set
from optimizers.store import key_of
from optimizers.switchboard import Scheme, Switchboard, rounded_tensors
from server.artifact import Fidelity

_RESULT = "mixed.json"
_MOST_RANKED = 48
"""Samples for the ranking: errors of single layers differ by factors, which a few samples show."""


class Accept(msgspec.Struct, frozen=True):
    """Whether a fidelity on the search samples is good enough to go on.

    Half of the misses that the gate allows: the held-out samples must pass it as well.

    Attributes:
        gate: The fidelity that is required in the end.
    """

    gate: Gate

    def __call__(self, fidelity: Fidelity) -> bool:
        """Judge one fidelity."""
        allowed = (1 - self.gate.min_agreement) / 2
        return 1 - fidelity.agreement <= allowed + 1e-12 and not unfaithful(fidelity, self.gate)


class Mixed(msgspec.Struct, frozen=True):
    """What the search for float layers found.

    Attributes:
        ranking: The layers, the most sensitive first.
        keep: Names of those that stay in float; ``None`` when no set is faithful enough.
        reason: What was found, with numbers.
    """

    ranking: tuple[LayerSensitivity, ...]
    keep: tuple[str, ...] | None
    reason: str

    def applied_to(self, chain: Chain) -> Chain:
        """Return the chain whose quantization, and the rounding before it, leaves these layers alone."""
        keep = self.keep or ()
        return tuple(
            msgspec.structs.replace(step, keep=keep) if isinstance(step, (AdaRound, Int8Dynamic, Int8Static)) else step
            for step in chain
        )


def mix(line: Line, base: Chain, chain: Chain, context: PassContext, exam: Exam, accept: Accept) -> Mixed:
    """Rank the layers of a quantization and find the smallest set that must stay in float.

    Args:
        line: Builds the FP32 model that the quantization takes.
        base: The exact passes.
        chain: The passes behind them; one of them is an INT8 pass.
        context: Calibration data and an existing folder.
        exam: The search samples.
        accept: Whether a fidelity is good enough.

    Raises:
        PassFailed: If the layers cannot be simulated, with the reason.
        InferenceFailed: If the simulation fails on the samples.
    """
    index = quantizer_index(chain)
    step = chain[index]
    if not isinstance(step, (Int8Dynamic, Int8Static)):
        raise PassFailed(f"{step.spec.name} quantizes no layers one by one")
    before = line.build("", (*base, *chain[:index]), "fp32").form
    key = key_of("mixed", before.sha256, settings_of(step), accept, exam.digest, exam.rows, context.host.fingerprint)
    found = exam.store.read(key, _RESULT)
    if found is not None:
        return msgspec.json.decode(found, type=Mixed)
    mixed = _mix(before, step, context, exam, accept)
    exam.store.write(key, _RESULT, msgspec.json.encode(mixed))
    return mixed


def _mix(form: Form, step: Int8Dynamic | Int8Static, context: PassContext, exam: Exam, accept: Accept) -> Mixed:
    model = load_model(form.model)
    samples = Samples(exam.samples, exam.rows, exam.workers)
    few = Samples(exam.few(_MOST_RANKED), exam.rows, exam.workers)
    board = Switchboard(model, _scheme(model, step, context), context.work, exam.samples.singles[0])
    try:
        ranking = rank(board, few)
        found = smallest_float_set(board, ranking, accept, samples)
    finally:
        board.close()
    if found is None:
        return Mixed(ranking, None, f"no set of float layers is faithful on {exam.count} search samples")
    share = f"{len(found.keep)} of {len(ranking)} layers stay in float, {found.macs_share:.0%} of the products in INT8"
    return Mixed(ranking, found.keep, f"{share}; simulated agreement {found.fidelity.agreement:.3f}")


def _scheme(model: onnx.ModelProto, step: Int8Dynamic | Int8Static, context: PassContext) -> Scheme:
    """Return how the pass quantizes, with the ranges that it would find."""
    bits: Literal[7, 8] = 7 if reduced_range(context.host) else 8
    if isinstance(step, Int8Dynamic):
        return Scheme("dynamic", frozenset({"MatMul", "Gemm"}), bits)
    ready = prepared(model)
    seen = ranges(ready, rounded_tensors(ready, WEIGHTED_OPS), context.calibration, context.work, step.method)
    return Scheme("static", WEIGHTED_OPS, bits, seen)
