"""What a model's outputs hold: class scores, labels, embeddings, probabilities; told from the original's answers."""

import numpy as np

from server.tensors import Array, Tensors

_UNIT_NORM_TOLERANCE = 1e-3
_SUM_TOLERANCE = 1e-2
_BOX = 4
_LEAST_CONSTANT = 16
_UNEQUAL_SCALES = 100.0


def float_names(outputs: Tensors) -> list[str]:
    """Return the names of the floating point outputs."""
    return [name for name, array in outputs.items() if array.dtype.kind == "f"]


def label_names(outputs: Tensors) -> list[str]:
    """Return the names of the outputs with one integer, flag or text per sample."""
    return [name for name, array in outputs.items() if array.dtype.kind != "f" and array.ndim == 1]


def rows_of(array: Array) -> Array:
    """Return the array as ``[samples, elements]``."""
    return array.reshape(len(array), -1)


def scores_name(outputs: Tensors) -> str | None:
    """Return the first output ``[samples, classes]`` with at least two columns of class scores.

    No class scores are rows of unit norm (embeddings), the scores of detected boxes (an output ``[samples, boxes, 4]``
    stands beside them), and columns whose largest one always lies above all others in at least 16 samples: several
    quantities of their own scales, of which top-1 would tell nothing.
    """
    for name in float_names(outputs):
        array = outputs[name]
        if _is_table(array) and not _has_unit_rows(array) and not _has_boxes(outputs, array) and not _is_apart(array):
            return name
    return None


def embedding_name(outputs: Tensors) -> str | None:
    """Return the first output ``[samples, size]`` whose rows have unit norm and are no probabilities."""
    return next((n for n in float_names(outputs) if _is_table(outputs[n]) and _has_unit_rows(outputs[n])), None)


def label_name(outputs: Tensors, scores: str | None) -> str | None:
    """Return the integer output that holds the decided label, ``None`` when there is none.

    Args:
        outputs: The original's outputs.
        scores: Name of the class scores beside it: then every largest column must go with one label.
    """
    for name in label_names(outputs):
        if outputs[name].dtype.kind not in "iu":
            continue
        if scores is None:
            return name
        column = outputs[scores].argmax(axis=-1)
        pairs = np.unique(np.stack([column, outputs[name].astype(np.int64)]), axis=1)
        if pairs.shape[1] == len(np.unique(column)):
            return name
    return None


def are_probabilities(array: Array, axis: int = -1) -> bool:
    """Whether all values are at least 0 and sum to 1 along ``axis``, of at least two elements."""
    if not array.size or array.shape[axis] < 2 or not bool(np.all(array >= 0)):
        return False
    return bool(np.all(np.abs(array.astype(np.float64).sum(axis=axis) - 1) < _SUM_TOLERANCE))


def are_shares(array: Array) -> bool:
    """Whether all values lie between 0 and 1, as those of a sigmoid do."""
    return bool(array.size and np.all((array >= 0) & (array <= 1)))


def have_equal_scales(columns: Array) -> bool:
    """Whether the largest root mean square of a column is at most 100 times the smallest: one kind of quantity."""
    sizes = np.sqrt(np.mean(columns.astype(np.float64) ** 2, axis=0))
    return bool(sizes.max() <= _UNEQUAL_SCALES * sizes.min())


def first_of_rank(outputs: Tensors, *ranks: int) -> str | None:
    """Return the first floating point output with one of these numbers of axes."""
    return next((name for name in float_names(outputs) if outputs[name].ndim in ranks), None)


def _is_table(array: Array) -> bool:
    return bool(array.ndim == 2 and array.shape[1] >= 2 and array.size)


def _has_unit_rows(array: Array) -> bool:
    """Embeddings have unit rows; so have confident probabilities, which are not embeddings: they never go below 0."""
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    return bool(np.all(np.abs(norms - 1) < _UNIT_NORM_TOLERANCE) and array.min() < 0)


def _has_boxes(outputs: Tensors, array: Array) -> bool:
    return any(other.shape == (*array.shape, _BOX) for other in outputs.values())


def _is_apart(array: Array) -> bool:
    if len(array) < _LEAST_CONSTANT or are_probabilities(array):
        return False
    column = int(array[0].argmax())
    others = np.delete(array, column, axis=1)
    return bool(array[:, column].min() > others.max())
