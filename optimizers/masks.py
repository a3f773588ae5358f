"""Masks: which positions of a sequence count, told from the inputs.

A mask is an input of 0 and 1, ``[samples, positions]``, with at least one 1 in every sample: any such input whose name
says ``mask``, else one whose samples are all 1s followed by all 0s. Segment ids, which look alike, begin with 0.
"""

from collections.abc import Sequence

import numpy as np

from server.tensors import Array, Tensors


def mask_of(singles: Sequence[Tensors]) -> Array | None:
    """Return BOOL ``[samples, positions]``, shorter samples filled up with False; ``None`` without a mask.

    Args:
        singles: One request per sample: masks ``[1, positions]`` or ``[positions]``.
    """
    for name in sorted(singles[0], key=lambda name: "mask" not in name.lower()) if singles else ():
        rows = [np.asarray(single[name]) for single in singles]
        if any(
            row.dtype.kind not in "biu" or row.ndim not in (1, 2) or row.shape[:-1] not in ((), (1,)) for row in rows
        ):
            continue
        rows = [row.reshape(-1) for row in rows]
        if all(_is_mask(row, any_order="mask" in name.lower()) for row in rows):
            positions = max(row.size for row in rows)
            return np.stack([np.pad(row.astype(np.bool_), (0, positions - row.size)) for row in rows])
    return None


def lengths_of(singles: Sequence[Tensors]) -> Array | None:
    """Return the true length of each sample, INT64 ``[samples]``: by its mask, else by the size of an input.

    Returns:
        ``None`` when all samples are of one length.
    """
    mask = mask_of(singles)
    if mask is not None:
        lengths = mask.sum(axis=1)
        if lengths.min() < lengths.max():
            return np.asarray(lengths)
    for name in singles[0] if singles else ():
        sizes = np.array([np.asarray(single[name]).size for single in singles])
        if sizes.min() < sizes.max():
            return sizes
    return None


def hide(outputs: Tensors, mask: Array | None) -> Tensors:
    """Set what an output ``[samples, positions, ...]`` says at masked positions to zero: nobody reads it there.

    Outputs with fewer axes stay as they are: in ``[samples, positions]`` a zero could win over the scores beside it.

    Args:
        outputs: Name -> array, axis 0 = samples; not written to.
        mask: BOOL ``[samples, positions]`` from ``mask_of``, or ``None``.
    """
    if mask is None or mask.all():
        return outputs
    return {name: _hidden(array, mask) for name, array in outputs.items()}


def _hidden(array: Array, mask: Array) -> Array:
    if array.ndim < 3 or array.dtype.kind != "f" or array.shape[:2] != mask.shape:
        return array
    wide = mask.reshape(*mask.shape, *[1] * (array.ndim - 2))
    return np.where(wide, array, np.zeros((), array.dtype))


def _is_mask(row: Array, *, any_order: bool) -> bool:
    if row.size < 2 or not np.all((row == 0) | (row == 1)) or not row.any():
        return False
    return any_order or bool(np.all(row[:-1] >= row[1:]))
