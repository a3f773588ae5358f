"""The proof of padding: requests of unequal length may share a run only if zeros at the end change no answer.

A sequence model with a mask ignores what the mask leaves out, and a mask padded with zeros leaves the padding out. A
model without one counts the padding in, and nothing in its signature says so: hence the proof by running it.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from optimizers.errors import PassFailed
from optimizers.evidence import BATCHING_MAX_CHANGED, BATCHING_MIN_SQNR_DB, HeldOut, Runner, stack
from optimizers.fidelity import compare, worst_sqnr_db
from server.artifact import Padding
from server.errors import InferenceFailed
from server.tensors import Array, Signature, Tensors

_MOST_SAMPLES = 64
_IDENTICAL_DB = 200.0


class _Step(msgspec.Struct, frozen=True):
    """Requests and their lengths before and after padding."""

    singles: tuple[Tensors, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


def prove_padding(session: Runner, signature: Signature, held_out: HeldOut, workers: int = 1) -> Padding:
    """Find out whether inputs may be padded with zeros along a shared variable axis, by running the original.

    The samples are padded by one and to twice their length. Where the model cannot run anything longer (its positions
    end there), the first half of each sample is padded to the whole length instead. Answers must agree as those of
    batches must (40 dB, 1 % of the decisions, of the same kind); outputs that grow with the axis are cut back first.

    Args:
        session: The original.
        signature: Its signature.
        held_out: Samples, at least one; 64 are used. Their decision counts, not their answers.
        workers: Runs at a time.
    """
    names = _variable_axes(signature)
    if not names:
        return Padding(False, "no variable axis with a name beside the batch")
    refusals = []
    for name in names:
        found = _prove(session, signature, held_out, name, workers)
        if found.paddable:
            return found
        refusals.append(found)
    return refusals[0]


def _variable_axes(signature: Signature) -> list[str]:
    """Return the names of the variable axes other than the first, in the order of the inputs."""
    first = {spec.shape[0] for spec in signature.inputs if spec.shape}
    names = [size for spec in signature.inputs for size in spec.shape[1:] if isinstance(size, str)]
    return [name for name in dict.fromkeys(names) if name not in first]


def _prove(session: Runner, signature: Signature, held_out: HeldOut, name: str, workers: int) -> Padding:
    axes = {spec.name: spec.shape.index(name) for spec in signature.inputs if name in spec.shape}
    if any(spec.shape.count(name) > 1 for spec in signature.inputs):
        return Padding(False, f"axis '{name}' occurs twice in one input")
    if any(spec.datatype == "BYTES" for spec in signature.inputs if spec.name in axes):
        return Padding(False, f"axis '{name}' holds text, which has no zero")
    singles, output_axes = held_out.singles[:_MOST_SAMPLES], dict[str, int]()
    worst = _IDENTICAL_DB
    try:
        steps, until = _steps(session, singles, axes)
        for step in steps:
            sqnr, changed, output_axes = _measured(session, step, axes, held_out.decision, workers)
            if sqnr < BATCHING_MIN_SQNR_DB or changed > BATCHING_MAX_CHANGED:
                return Padding(False, _refusal(name, step, sqnr, changed))
            worst = min(worst, sqnr)
    except (PassFailed, InferenceFailed) as exc:
        return Padding(False, f"padding axis '{name}' fails: {exc}")
    seen = "identical" if worst >= _IDENTICAL_DB else f"{worst:.0f} dB"
    reason = f"zeros at the end of axis '{name}' change no answer ({seen}, {len(singles)} samples, {until})"
    return Padding(True, reason, axes, output_axes)


def _steps(session: Runner, singles: Sequence[Tensors], axes: dict[str, int]) -> tuple[list[_Step], str]:
    """Return what to compare, and up to which length that is."""
    lengths = [_length(single, axes) for single in singles]
    longest = max(lengths)
    twice = _padded(singles[lengths.index(longest)], axes, 2 * longest)
    try:
        session.run(twice)
    except InferenceFailed as exc:
        half = tuple(max(length // 2, 1) for length in lengths)
        shorter = tuple(_cut(single, axes, size) for single, size in zip(singles, half, strict=True))
        limit = f"length {longest}, beyond which it fails: {str(exc).splitlines()[0][:200]}"
        return [_Step(shorter, half, tuple(lengths))], f"from length {min(half)} to {limit}"
    steps = [_Step(tuple(singles), tuple(lengths), tuple(grow(n) for n in lengths)) for grow in (_one_more, _doubled)]
    return steps, f"from length {min(lengths)} to {2 * longest}"


def _measured(
    session: Runner, step: _Step, axes: dict[str, int], decision: str, workers: int
) -> tuple[float, float, dict[str, int]]:
    """Return the SQNR in decibel and the share of changed decisions through padding, and the axes to cut back."""
    padded = [_padded(single, axes, size) for single, size in zip(step.singles, step.after, strict=True)]
    with ThreadPoolExecutor(workers) as pool:
        alone, seen = list(pool.map(session.run, step.singles)), list(pool.map(session.run, padded))
    output_axes: dict[str, int] = {}
    for name, array in alone[0].items():
        axis = _grown_axis(name, array, seen[0][name], (step.before[0], step.after[0]))
        if axis is not None:
            output_axes[name] = axis
    reference = stack(alone)
    answers = stack([_cut(answer, output_axes, size) for answer, size in zip(seen, step.before, strict=True)])
    agreement = compare(reference, answers, decision).agreement
    return worst_sqnr_db(reference, answers), 1 - agreement, output_axes


def _grown_axis(name: str, alone: Array, padded: Array, lengths: tuple[int, int]) -> int | None:
    """Return the axis along which an output grew with its input, ``None`` when it did not grow.

    Raises:
        PassFailed: If its shape changed in any other way: nobody could say which part belongs to the request.
    """
    if alone.shape == padded.shape:
        return None
    if alone.ndim == padded.ndim:
        grown = [axis for axis, sizes in enumerate(zip(alone.shape, padded.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(grown) == 1 and (alone.shape[grown[0]], padded.shape[grown[0]]) == lengths:
            return grown[0]
    raise PassFailed(
        f"output '{name}' has shape {list(alone.shape)} at length {lengths[0]} and {list(padded.shape)} at {lengths[1]}"
    )


def _refusal(name: str, step: _Step, sqnr: float, changed: float) -> str:
    sizes = f"zeros at the end of axis '{name}', from length {step.before[0]} to {step.after[0]},"
    if sqnr < BATCHING_MIN_SQNR_DB:
        return (
            f"{sizes} change the answers: SQNR {sqnr:.1f} dB < {BATCHING_MIN_SQNR_DB:.0f} dB "
            f"on {len(step.singles)} samples"
        )
    return f"{sizes} change {changed:.1%} of the decisions on {len(step.singles)} samples"


def _one_more(length: int) -> int:
    return length + 1


def _doubled(length: int) -> int:
    return 2 * length


def _length(single: Tensors, axes: dict[str, int]) -> int:
    return next(int(single[name].shape[axis]) for name, axis in axes.items())


def _padded(single: Tensors, axes: dict[str, int], size: int) -> dict[str, Array]:
    """Return a request whose inputs have ``size`` elements along their axes, zeros at the end."""
    found = dict(single)
    for name, axis in axes.items():
        width = [(0, 0)] * found[name].ndim
        width[axis] = (0, size - found[name].shape[axis])
        found[name] = np.pad(found[name], width)
    return found


def _cut(tensors: Mapping[str, Array], axes: dict[str, int], size: int) -> dict[str, Array]:
    """Return tensors with the first ``size`` elements along their axes."""
    found = dict(tensors)
    for name, axis in axes.items():
        found[name] = np.ascontiguousarray(found[name].take(range(size), axis=axis))
    return found
