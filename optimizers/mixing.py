"""Mixed precision: which layers of a quantized candidate stay in float, found on a simulation and then built."""

import math
from typing import Literal

import msgspec
import onnx

from optimizers.budget import SPENT, Budget
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


class Lab(msgspec.Struct, frozen=True):
    """With what layers are simulated.

    Attributes:
        context: Calibration data and an existing folder.
        exam: The search samples.
        accept: Whether a fidelity is good enough.
        budget: How long the search may take.
    """

    context: PassContext
    exam: Exam
    accept: Accept
    budget: Budget


def mix(line: Line, base: Chain, chain: Chain, lab: Lab) -> Mixed:
    """Rank the layers of a quantization and find the smallest set that must stay in float.

    A search that the time budget cut short is not kept for later runs.

    Args:
        line: Builds the FP32 model that the quantization takes.
        base: The exact passes.
        chain: The passes behind them; one of them is an INT8 pass.
        lab: Samples, gate and time.

    Raises:
        PassFailed: If the layers cannot be simulated or there is not enough time for it, with the reason.
        InferenceFailed: If the simulation fails on the samples.
    """
    index = quantizer_index(chain)
    step = chain[index]
    if not isinstance(step, (Int8Dynamic, Int8Static)):
        raise PassFailed(f"{step.spec.name} quantizes no layers one by one")
    before = line.build("", (*base, *chain[:index]), "fp32").form
    exam = lab.exam
    host = lab.context.host.fingerprint
    key = key_of("mixed", before.sha256, settings_of(step), lab.accept, exam.digest, exam.rows, host)
    found = exam.store.read(key, _RESULT)
    if found is not None:
        return msgspec.json.decode(found, type=Mixed)
    pace = _Pace(lab.budget)
    mixed = _mix(before, step, lab, pace)
    if pace.is_cut:
        return msgspec.structs.replace(mixed, reason=f"{mixed.reason}; cut short: {SPENT}")
    exam.store.write(key, _RESULT, msgspec.json.encode(mixed))
    return mixed


def _mix(form: Form, step: Int8Dynamic | Int8Static, lab: Lab, pace: "_Pace") -> Mixed:
    model, exam = load_model(form.model), lab.exam
    samples = Samples(exam.samples, exam.rows, exam.workers)
    few = Samples(exam.few(_MOST_RANKED), exam.rows, exam.workers)
    board = Switchboard(model, _scheme(model, step, lab.context), lab.context.work, exam.samples.singles[0])
    try:
        pace.start(len(board.layers), exam.count / len(few.held_out.singles))
        ranking = rank(board, few, pace.may_rank)
        found = smallest_float_set(board, ranking, lab.accept, samples, goes_on=pace.may_search)
    finally:
        board.close()
    if found is None:
        return Mixed(ranking, None, f"no set of float layers is faithful on {exam.count} search samples")
    count = f"{len(found.keep)} of {len(board.layers)} layers stay in float"
    share = f"{count}, {found.macs_share:.0%} of the products in INT8"
    return Mixed(ranking, found.keep, f"{share}; simulated agreement {found.fidelity.agreement:.3f}")


class _Pace:
    """Keeps a search for float layers within the time budget.

    Args:
        budget: The time.
    """

    def __init__(self, budget: Budget) -> None:
        self.is_cut = False
        self._budget, self._started_s = budget, 0.0
        self._layers, self._evaluation_s, self._ratio = 0, 0.0, 1.0

    def start(self, layers: int, ratio: float) -> None:
        """Start the clock.

        Args:
            layers: Layers to rank.
            ratio: Samples of one evaluation of the search for each sample of the ranking.
        """
        self._layers, self._ratio, self._started_s = layers, ratio, self._budget.elapsed_s

    def may_rank(self, ranked: int) -> bool:
        """Whether one more layer can be ranked, and the search still take place.

        Raises:
            PassFailed: If the first layer shows that there is not enough time for all.
        """
        layer_s = (self._budget.elapsed_s - self._started_s) / ranked
        self._evaluation_s = layer_s * self._ratio
        search_s = self._evaluation_s * (2 + math.ceil(math.log2(self._layers)))
        refusal = self._budget.refusal(layer_s * (self._layers - ranked) + search_s)
        if ranked == 1 and refusal:
            raise PassFailed(refusal)
        return ranked == self._layers or self._allows(layer_s + search_s)

    def may_search(self) -> bool:
        """Whether one more set of layers can be evaluated."""
        return self._allows(self._evaluation_s)

    def _allows(self, needs_s: float) -> bool:
        self.is_cut = self.is_cut or bool(self._budget.refusal(needs_s))
        return not self.is_cut


def _scheme(model: onnx.ModelProto, step: Int8Dynamic | Int8Static, context: PassContext) -> Scheme:
    """Return how the pass quantizes, with the ranges that it would find."""
    bits: Literal[7, 8] = 7 if reduced_range(context.host) else 8
    if isinstance(step, Int8Dynamic):
        return Scheme("dynamic", frozenset({"MatMul", "Gemm"}), bits)
    ready = prepared(model)
    seen = ranges(ready, rounded_tensors(ready, WEIGHTED_OPS), context.calibration, context.work, step.method)
    return Scheme("static", WEIGHTED_OPS, bits, seen)
