"""Mixed precision: which layers lose the most in INT8, and the smallest set of them that must stay in FP32.

Layers are ranked by what each of them alone does to the outputs, for the share of the arithmetic that it saves. Along
this ranking the fidelity of "the first ``n`` layers stay float" rises with ``n``, nearly: a binary search finds the
least ``n`` in about ``log2(layers)`` evaluations, each a run of a ``Switchboard`` and no build. Errors of layers
neither add up nor rank exactly, so afterwards single layers are given back to INT8 while the result is still accepted.

A share of decisions is a noisy measure: of 128 samples, one more or less may agree by luck, and a search that tries
many sets finds the lucky ones. So a set does not count as accepted while its SQNR, which is far less noisy, lies below
that of a set that was refused. The set is fitted to its samples even so: judge the model built from it on others.

Either search can be cut short. Layers are ranked with the largest first, so that those nobody had time for are small,
and stay in float; a search for fewer float layers that ends early leaves the smallest set that it had accepted.

Source: binary search over a sensitivity ranking as in NVIDIA Model Optimizer and NNCF's ranked revert; error energy per
saved arithmetic is the greedy solution of the knapsack problem (G. B. Dantzig, 1957).
"""

import math
from collections.abc import Callable, Collection, Sequence

import msgspec

from optimizers.errors import PassFailed
from optimizers.evidence import HeldOut, compared, run_batched, run_singly
from optimizers.fidelity import worst_sqnr_db
from optimizers.switchboard import Switchboard
from server.artifact import Fidelity
from server.golden import MOST_DB
from server.tensors import Array, Tensors

_WORST = 1e20  # JSON knows no infinity
_MOST_GIVEN_BACK = 12


class LayerSensitivity(msgspec.Struct, frozen=True):
    """What one layer alone does in INT8.

    Attributes:
        node: Name of the node.
        op_type: Its operator.
        macs: Multiply-accumulates for one sample.
        error: Error energy over signal energy of the worst output when only this layer is quantized; 1e20 when
            the outputs then cannot be compared.
        score: ``error`` for each share of the model's multiply-accumulates that the layer saves.
    """

    node: str
    op_type: str
    macs: int
    error: float
    score: float


class FloatSet(msgspec.Struct, frozen=True):
    """Layers that stay in FP32.

    Attributes:
        keep: Names of their nodes, worst first; empty when all layers may be INT8.
        fidelity: With these layers in FP32 and all others in simulated INT8.
        macs_share: Share of the multiply-accumulates of all layers that are INT8, 0 to 1.
        tried: For each evaluation, in order, how many layers were float, and the agreement; 0 when the outputs could
            not be compared.
    """

    keep: tuple[str, ...]
    fidelity: Fidelity
    macs_share: float
    tried: tuple[tuple[int, float], ...]


class Samples(msgspec.Struct, frozen=True):
    """What candidates are evaluated on.

    Attributes:
        held_out: Samples with the original's answers.
        rows: Samples for each run; 1 for models that are not proven to be batchable.
        workers: Runs at a time.
    """

    held_out: HeldOut
    rows: int
    workers: int = 1


def rank(
    board: Switchboard, samples: Samples, goes_on: Callable[[int], bool] = lambda _: True
) -> tuple[LayerSensitivity, ...]:
    """Quantize each layer alone and return the layers, worst score first; one pass over the samples per layer.

    Args:
        board: The model.
        samples: A few dozen are enough: the energy of an error needs fewer samples than a share of decisions.
        goes_on: Asked after each layer, with the number of layers ranked, whether there is time for one more.

    Returns:
        The layers that were ranked; all of them, or the largest.

    Raises:
        InferenceFailed: If the session fails.
        PassFailed: If an output does not have one row per sample.
    """
    total = max(sum(layer.macs for layer in board.layers), 1)
    found: list[LayerSensitivity] = []
    for layer in sorted(board.layers, key=lambda layer: -layer.macs):
        outputs = _outputs(board, [layer.node], samples)
        error = _error(samples.held_out.reference, outputs)
        score = error * total / max(layer.macs, 1)
        found.append(LayerSensitivity(layer.node, layer.op_type, layer.macs, error, score))
        if not goes_on(len(found)):
            break
    return tuple(sorted(found, key=lambda layer: layer.score, reverse=True))


def smallest_float_set(
    board: Switchboard,
    ranking: Sequence[LayerSensitivity],
    accept: Callable[[Fidelity], bool],
    samples: Samples,
    most_given_back: int = _MOST_GIVEN_BACK,
    goes_on: Callable[[], bool] = lambda: True,
) -> FloatSet | None:
    """Find few layers to keep in FP32 so that the model is accepted.

    Args:
        board: The model.
        ranking: Its layers, from ``rank``; those that are missing stay in FP32 unless all layers may be INT8.
        accept: The gate.
        samples: What the gate is applied to, on at most ``log2(layers) + 3 + most_given_back`` passes.
        most_given_back: How many layers at most are tried in INT8 again, the largest first.
        goes_on: Asked, once there is an accepted set, whether there is time to evaluate one with fewer layers.

    Returns:
        The set, which was itself evaluated and accepted; ``None`` when not even FP32 is.

    Raises:
        InferenceFailed: If the session fails.
        PassFailed: If an output does not have one row per sample.
    """
    search = _Search(board, accept, samples)
    ranked = [layer.node for layer in ranking]
    names = [*(layer.node for layer in board.layers if layer.node not in ranked), *ranked]
    keep = _shortest_prefix(names, search, goes_on)
    if keep is None:
        return None
    tries = 0
    for layer in sorted((layer for layer in ranking if layer.node in keep), key=lambda layer: -layer.macs):
        if tries == most_given_back or len(keep) == 1:  # the empty set was refused before
            break
        if search.is_hopeless(keep, layer.error):
            continue
        if not goes_on():
            break
        tries += 1
        fewer = [name for name in keep if name != layer.node]
        keep = fewer if search.accepts(fewer) else keep
    return search.result(keep)


class _Search:
    """The evaluations of one search, each set once."""

    def __init__(self, board: Switchboard, accept: Callable[[Fidelity], bool], samples: Samples) -> None:
        self._board, self._accept, self._samples = board, accept, samples
        self._seen: dict[frozenset[str], Fidelity | None] = {}
        self._refused_db = -math.inf

    def accepts(self, keep: Collection[str]) -> bool:
        """Whether the gate accepts the model with these layers in FP32, and no luck was needed."""
        chosen = frozenset(keep)
        if chosen not in self._seen:
            self._seen[chosen] = self._fidelity(chosen)
        fidelity = self._seen[chosen]
        if fidelity is None:
            return False
        if self._accept(fidelity):
            return fidelity.sqnr_db >= self._refused_db
        self._refused_db = max(self._refused_db, fidelity.sqnr_db)
        return False

    def is_hopeless(self, keep: Collection[str], error: float) -> bool:
        """Whether an evaluated set with one more error would fall below the SQNR of a refused set; no run is needed."""
        fidelity = self._seen[frozenset(keep)]
        noise = error + (10 ** (-fidelity.sqnr_db / 10) if fidelity else math.inf)
        return -10 * math.log10(noise) < self._refused_db if noise else False

    def result(self, keep: Sequence[str]) -> FloatSet | None:
        """Return an accepted set with all that was tried; ``None`` for one whose outputs cannot be compared."""
        fidelity = self._seen[frozenset(keep)]
        if fidelity is None:
            return None
        tried = tuple((len(chosen), seen.agreement if seen else 0.0) for chosen, seen in self._seen.items())
        total = sum(layer.macs for layer in self._board.layers)
        quantized = sum(layer.macs for layer in self._board.layers if layer.node not in keep)
        return FloatSet(tuple(keep), fidelity, quantized / max(total, 1), tried)

    def _fidelity(self, keep: frozenset[str]) -> Fidelity | None:
        quantized = [layer.node for layer in self._board.layers if layer.node not in keep]
        outputs = _outputs(self._board, quantized, self._samples)
        held_out = self._samples.held_out
        try:
            return compared(outputs, held_out)
        except PassFailed:  # NaN or infinite
            return None


def _error(reference: Tensors, outputs: Tensors) -> float:
    sqnr_db = worst_sqnr_db(reference, outputs)
    if sqnr_db <= -MOST_DB:
        return _WORST
    return 0.0 if sqnr_db >= MOST_DB else float(10 ** (-sqnr_db / 10))


def _shortest_prefix(names: list[str], search: _Search, goes_on: Callable[[], bool]) -> list[str] | None:
    """Return the shortest accepted prefix that a binary search finds; ``None`` when all layers are not enough."""
    if search.accepts([]):
        return []
    if not search.accepts(names):
        return None
    refused, accepted = 0, len(names)
    while accepted - refused > 1 and goes_on():
        middle = (refused + accepted) // 2
        if search.accepts(names[:middle]):
            accepted = middle
        else:
            refused = middle
    return names[:accepted]


def _outputs(board: Switchboard, quantized: Collection[str], samples: Samples) -> dict[str, Array]:
    view = board.view(quantized)
    if samples.rows == 1:
        return run_singly(view, samples.held_out.singles, samples.workers)
    return run_batched(view, samples.held_out.singles, samples.rows, samples.workers)
