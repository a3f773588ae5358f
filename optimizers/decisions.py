"""Decisions: what a model decides, told from the original's answers, and whether a candidate decides the same.

* ``top1``: the largest column of the first 2-D float output, and the label beside it; without scores, the label (1-D
  outputs that are no floats) alone.
* ``binary``: one column of class scores; the side of 0.5 for probabilities, of 0 for logits. One column is taken for a
  regression unless something says otherwise: 0/1 labels with both classes; probabilities on both sides of 0.5 of which
  half are clear (below 0.1 or above 0.9) or whose name says ``prob``; values of both signs whose name says ``logit``.
* ``nearest_neighbour``: embeddings, that is rows of unit norm; the nearest other held-out sample by cosine.
* ``tokens``, ``pixels``, ``maps``, ``near``: outputs with a position axis, see ``dense``.
* ``close``: everything else; every element within 1 % of the original's scale.

A recipe may name the decision of outputs instead. Then these outputs decide, all of them, and no other one; they are
not asked what they look like, only whether their shape allows it. Such a decision is written ``top1 of logits``, with
``; `` between several.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from optimizers import dense
from optimizers.errors import PassFailed, RecipeError
from optimizers.outputs import (
    are_shares,
    embedding_name,
    first_of_rank,
    float_names,
    label_name,
    label_names,
    rows_of,
    scores_name,
)
from optimizers.recipe import DECISIONS
from server.tensors import Array, Signature, Tensors

CLOSE_RTOL = 1e-2
LEAST_NEIGHBOURS = 3
"""With two samples each is the other's nearest neighbour, whatever the embedding."""

_TIE = 1e-6
_CLEAR = 0.1
_OF, _NEXT = " of ", "; "


def decision_for(reference: Tensors, labels: Array | None = None, named: Mapping[str, str] | None = None) -> str:
    """Tell which decision the original's outputs take.

    Args:
        reference: Name -> the original's output, axis 0 = samples, in the order of the signature.
        labels: Integer class per sample; they only tell a binary classifier from a regression.
        named: Output -> kind of decision, from the recipe; only where it is empty the outputs are asked.

    Raises:
        RecipeError: If an output is named that does not exist or whose shape does not allow its kind.
    """
    if named:
        return _named_decision(reference, named)
    if scores_name(reference) is not None:
        return "top1"
    embedding = embedding_name(reference)
    if embedding is not None and len(reference[embedding]) >= LEAST_NEIGHBOURS:
        return "nearest_neighbour"
    positions = _decision_of_positions(reference)
    if positions:
        return positions
    if label_names(reference):
        return "top1"
    if binary_name(reference, labels) is not None:
        return "binary"
    # Rows of unit norm from too few samples for neighbours are few numbers of equal importance: close.
    return "near" if embedding is None and dense.is_dense(reference) else "close"


def binary_name(reference: Tensors, labels: Array | None = None) -> str | None:
    """Return the output with one column of class scores, ``None`` when there is none."""
    for name in float_names(reference):
        array = reference[name]
        if not array.size or array.shape not in ((len(array),), (len(array), 1)) or not np.isfinite(array).all():
            continue
        values = array.reshape(-1).astype(np.float64)
        sides = values > threshold_of(values)
        if sides.all() or not sides.any():
            continue
        if labels is not None and set(np.unique(labels).tolist()) == {0, 1}:
            return name
        if are_shares(values):
            clear = float(np.mean((values < _CLEAR) | (values > 1 - _CLEAR)))
            if clear >= 0.5 or "prob" in name.lower():
                return name
        elif "logit" in name.lower():
            return name
    return None


def threshold_of(values: Array) -> float:
    """Return the threshold of one column of class scores: 0.5 for probabilities, 0 for logits."""
    return 0.5 if are_shares(values) else 0.0


def agreements(reference: Tensors, candidate: Tensors, decision: str) -> Array:
    """Return per sample, BOOL ``[samples]``, whether the candidate decides as the original does.

    Raises:
        PassFailed: If the outputs do not allow this decision.
    """
    named = _parts(decision)
    if named:
        return np.asarray(np.all([_output_agrees(reference, candidate, *part) for part in named.items()], axis=0))
    if decision == "top1":
        return _same_top1(reference, candidate)
    if decision == "binary":
        return np.asarray(sides_of(reference, reference) == sides_of(candidate, reference))
    if decision == "nearest_neighbour":
        name = _require(embedding_name(reference) or first_of_rank(reference, 2), "embeddings")
        return _same_neighbours(reference[name], candidate[name])
    if decision == "tokens":
        name = _require(dense.tokens_name(reference) or first_of_rank(reference, 3), "class scores per token")
        return dense.same_classes(reference[name], candidate[name], axis=-1)
    if decision == "pixels":
        name = _require(dense.pixels_name(reference) or first_of_rank(reference, 4), "class scores per pixel")
        return dense.same_classes(reference[name], candidate[name], axis=1)
    if decision == "maps":
        name = _require(dense.map_name(reference) or first_of_rank(reference, 3, 4), "a map")
        return dense.same_peaks(reference, candidate, name)
    return _all_rows(reference, candidate, dense.near_rows if decision == "near" else _close_rows)


def require_outputs(named: Mapping[str, str], signature: Signature) -> None:
    """Check that a recipe names the decision of outputs that exist.

    Args:
        named: Output -> kind of decision.
        signature: The model's.

    Raises:
        RecipeError: If one does not exist, with the outputs and the kinds.
    """
    outputs = [spec.name for spec in signature.outputs]
    for name, kind in named.items():
        if name not in outputs:
            raise RecipeError(
                f"the decision '{kind}' is for an output '{name}', which the model does not have; "
                f"its outputs are {', '.join(outputs)}; kinds of decisions are {', '.join(DECISIONS)}"
            )


def class_part(reference: Tensors, decision: str) -> tuple[Tensors, str]:
    """Return the outputs that decide about classes and the plain kind of their decision.

    Args:
        reference: Name -> the original's output.
        decision: From ``decision_for``.

    Returns:
        Of a decision that names its outputs the first one for a class; any other decision as it is.
    """
    for name, kind in _parts(decision).items():
        if kind in ("top1", "binary"):
            return {name: reference[name]}, kind
    return reference, decision


def sides_of(outputs: Tensors, reference: Tensors) -> Array:
    """Return the class 0 or 1 of each sample of a binary classifier as BOOL ``[samples]``.

    Raises:
        PassFailed: If no output of the reference has one column.
    """
    columns = [
        n for n in float_names(reference) if reference[n].shape in ((len(reference[n]),), (len(reference[n]), 1))
    ]
    name = _require(binary_name(reference) or next(iter(columns), None), "one column of class scores")
    return np.asarray(outputs[name].reshape(-1) > threshold_of(reference[name]))


def top1_name(reference: Tensors) -> str | None:
    """Return the output whose largest column ``top1`` compares; ``None`` where it compares labels.

    A few of the samples may look otherwise than all, from which the decision was taken: then it is the first 2-D one.
    """
    scores = scores_name(reference)
    return first_of_rank(reference, 2) if scores is None and not label_names(reference) else scores


def classes_of(outputs: Tensors, reference: Tensors, decision: str) -> Array | None:
    """Return the decided class per sample, ``None`` where the decision is no class.

    Args:
        outputs: The original's or a candidate's outputs.
        reference: The original's outputs, which tell where the decision is.
        decision: From ``decision_for``.
    """
    reference, decision = class_part(reference, decision)
    if decision == "binary":
        return sides_of(outputs, reference).astype(np.int64)
    if decision != "top1":
        return None
    scores = top1_name(reference)
    label = label_name(reference, scores)
    if label is not None:
        return outputs[label]
    return None if scores is None else outputs[scores].argmax(axis=-1)


def _named_decision(reference: Tensors, named: Mapping[str, str]) -> str:
    """Write a named decision, in the order of the signature."""
    for name, kind in named.items():
        fitting = _kinds_of(reference[name]) if name in reference else []
        if kind not in fitting:
            seen = [f"{n} {list(array.shape)}: {', '.join(_kinds_of(array))}" for n, array in reference.items()]
            raise RecipeError(
                f"the decision '{kind}' does not fit the output '{name}'; "
                f"outputs [samples, ...] and the kinds that fit are {'; '.join(seen)}"
            )
    return _NEXT.join(f"{named[name]}{_OF}{name}" for name in reference if name in named)


def _parts(decision: str) -> dict[str, str]:
    """Return output -> kind of a named decision; nothing of any other."""
    pairs = [part.partition(_OF) for part in decision.split(_NEXT)]
    return {name: kind for kind, of, name in pairs if of}


def _kinds_of(array: Array) -> list[str]:
    """Return the kinds of decisions that the shape of an output ``[samples, ...]`` allows."""
    shape, is_float = array.shape[1:], array.dtype.kind == "f"
    several = is_float and bool(shape) and shape[0] >= 2
    allowed = {
        "top1": several and len(shape) == 1 if is_float else not shape,
        "binary": is_float and shape in ((), (1,)),
        "nearest_neighbour": several and len(shape) == 1,
        "tokens": is_float and len(shape) == 2 and shape[1] >= 2,
        "pixels": several and len(shape) == 3,
        "maps": is_float and len(shape) in (2, 3),
    }
    return [kind for kind in DECISIONS if allowed.get(kind, True)]


def _output_agrees(reference: Tensors, candidate: Tensors, name: str, kind: str) -> Array:
    if kind == "maps":  # what lies at the peaks is in the other outputs
        return dense.same_peaks(reference, candidate, name)
    return agreements({name: reference[name]}, {name: candidate[name]}, kind)


def _decision_of_positions(reference: Tensors) -> str:
    """Return ``maps``, ``tokens``, ``pixels``, or nothing; a map beside class scores is that of a detector."""
    scores = dense.tokens_name(reference), dense.pixels_name(reference)
    single = dense.map_name(reference)
    if single is not None and (scores == (None, None) or 1 in reference[single].shape[1:]):
        return "maps"
    return "tokens" if scores[0] is not None else "pixels" if scores[1] is not None else ""


def _require(name: str | None, wanted: str) -> str:
    if name is None:
        raise PassFailed(f"no output holds {wanted}")
    return name


def _same_top1(reference: Tensors, candidate: Tensors) -> Array:
    scores = top1_name(reference)
    if scores is None:
        _require(next(iter(label_names(reference)), None), "class scores or labels")
        return _equal_rows(reference, candidate, label_names(reference))
    same = np.asarray(reference[scores].argmax(axis=-1) == candidate[scores].argmax(axis=-1))
    label = label_name(reference, scores)
    return same if label is None else same & (reference[label] == candidate[label])


def _all_rows(reference: Tensors, candidate: Tensors, fits: Callable[[Array, Array], Array]) -> Array:
    floats = float_names(reference)
    same = _equal_rows(reference, candidate, [name for name in reference if name not in floats])
    for name in floats:
        same = same & fits(reference[name], candidate[name])
    return same


def _equal_rows(reference: Tensors, candidate: Tensors, names: list[str]) -> Array:
    same = np.ones(len(next(iter(reference.values()))), np.bool_)
    for name in names:
        same &= np.all(rows_of(reference[name] == candidate[name]), axis=1)
    return same


def _close_rows(reference: Array, candidate: Array) -> Array:
    finite = np.where(np.isfinite(reference), reference, 0).astype(np.float64)
    scale = np.maximum(np.abs(finite), math.sqrt(float(np.mean(finite**2))) if finite.size else 0.0)
    both = np.isfinite(reference) & np.isfinite(candidate)
    error = np.abs(finite - np.where(both, candidate, 0).astype(np.float64))
    same_bits = (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))
    return np.asarray(np.all(rows_of(np.where(both, error <= CLOSE_RTOL * scale, same_bits)), axis=1))


def _same_neighbours(reference: Array, candidate: Array) -> Array:
    """Compare nearest neighbours; a neighbour that ties with the original's (duplicates) counts as the same."""
    if len(reference) < LEAST_NEIGHBOURS:
        raise PassFailed(f"nearest neighbours need {LEAST_NEIGHBOURS} held-out samples, there are {len(reference)}")
    original, seen = _similarities(reference), _similarities(candidate)
    chosen = np.take_along_axis(original, seen.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.asarray(chosen >= original.max(axis=1) - _TIE)


def _similarities(rows: Array) -> Array:
    """Return the cosine of every pair, ``[samples, samples]``, with -inf on the diagonal."""
    wide = rows.astype(np.float64)
    wide = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    similarity: Array = wide @ wide.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity
