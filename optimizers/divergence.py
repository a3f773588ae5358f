"""How far the class distributions are off where a decision is for a class, whatever the largest class is."""

import numpy as np

from optimizers.decisions import binary_name, class_part, top1_name
from optimizers.outputs import are_probabilities, are_shares
from server.tensors import Array, Tensors

TOP = 5

_LEAST_PROBABILITY = 1e-12


def top5_agreement(reference: Tensors, candidate: Tensors, decision: str) -> float | None:
    """Return the share of samples whose original top-1 is among the candidate's five largest columns.

    Args:
        reference: Name -> the original's output, axis 0 = samples.
        candidate: The candidate's.
        decision: From ``decision_for``.

    Returns:
        0 to 1; ``None`` without scores of more than five classes.
    """
    reference, decision = class_part(reference, decision)
    name = top1_name(reference) if decision == "top1" else None
    if name is None or reference[name].shape[1] <= TOP:
        return None
    chosen = reference[name].argmax(axis=1)[:, None]
    seen = candidate[name]
    above = np.count_nonzero(seen > np.take_along_axis(seen, chosen, axis=1), axis=1)
    return float(np.mean(above < TOP))


def divergence(reference: Tensors, candidate: Tensors, decision: str) -> float | None:
    """Return the mean over the samples of ``KL(p || q) = sum p log(p / q)``, p the original's distribution.

    Rows that sum to 1 are distributions; other values between 0 and 1 are probabilities of classes that do not exclude
    one another, whose divergences ``KL([p, 1 - p] || [q, 1 - q])`` add up; anything else is logits, of which softmax,
    or the sigmoid of a single column, is taken. The original tells for both sides.

    Args:
        reference: Name -> the original's output, axis 0 = samples.
        candidate: The candidate's.
        decision: From ``decision_for``.

    Returns:
        Nats, at least 0; ``None`` without class scores.
    """
    reference, decision = class_part(reference, decision)
    name = top1_name(reference) if decision == "top1" else binary_name(reference) if decision == "binary" else None
    if name is None or not np.isfinite(reference[name]).all():
        return None
    p, q = (side[name].astype(np.float64).reshape(len(side[name]), -1) for side in (reference, candidate))
    if are_probabilities(p):
        return _mean_kl(_normalized(p), _normalized(q))
    if are_shares(p):
        return _mean_kl(p, q) + _mean_kl(1 - p, 1 - q)
    if p.shape[1] == 1:
        return _mean_kl(_sigmoid(p), _sigmoid(q)) + _mean_kl(_sigmoid(-p), _sigmoid(-q))
    return _mean_kl(_softmax(p), _softmax(q))


def _mean_kl(p: Array, q: Array) -> float:
    p, q = np.maximum(p, _LEAST_PROBABILITY), np.maximum(q, _LEAST_PROBABILITY)
    return max(float(np.sum(p * np.log(p / q), axis=1).mean()), 0.0)


def _normalized(rows: Array) -> Array:
    clipped = np.maximum(rows, _LEAST_PROBABILITY)
    return np.asarray(clipped / clipped.sum(axis=1, keepdims=True))


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _sigmoid(logits: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))
