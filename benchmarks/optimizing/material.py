"""The samples: a part that nobody sees before the end, and the rest, which everybody gets."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from optimizers.calibration import LABELS_KEY, Samples, read_samples, split
from optimizers.graph import load_model, signature_of
from optimizers.recipe import Recipe
from server.tensors import Array

UNSEEN_SHARE = 0.3
LEAST_UNSEEN = 100


class Material(msgspec.Struct, frozen=True):
    """One model with its samples.

    Attributes:
        model: The original.
        seen: DATA.npz with what everybody gets.
        seen_labels: LABELS.npz beside it; ``None`` without labels.
        calibration: DATA.npz with those of them that our optimizer takes for ranges: what peers calibrate on.
        unseen: What nobody gets.
        seen_count: Samples in ``seen``.
        repeated: Samples left out of ``unseen`` because an equal one is in ``seen``.
    """

    model: Path
    seen: Path
    seen_labels: Path | None
    calibration: Path
    unseen: Samples
    seen_count: int
    repeated: int


def set_aside(folder: Path, into: Path, recipe: Recipe) -> Material:
    """Set samples aside that neither our optimizer nor a peer sees.

    That is 30 %, at least 100 where that leaves half, drawn by a fixed seed; equal samples are never on both sides.

    Args:
        folder: Holds ``model.onnx``, ``data.npz`` and, where there are labels, ``labels.npz``.
        into: Where the parts go; made if missing.
        recipe: How many samples our optimizer takes for what.

    Raises:
        OptimizerError: If the samples do not fit the model.
    """
    into.mkdir(parents=True, exist_ok=True)
    inputs = _arrays(folder / "data.npz")
    labels = _arrays(folder / "labels.npz")[LABELS_KEY] if (folder / "labels.npz").is_file() else None
    count = min(len(array) for array in inputs.values())
    seen, unseen, repeated = drawn(inputs, count, recipe.seed)
    paths = {name: into / f"{name}.npz" for name in ("seen", "seen-labels", "unseen", "unseen-labels", "calibration")}
    for name, rows in (("seen", seen), ("unseen", unseen)):
        np.savez(paths[name], allow_pickle=False, **{key: array[rows] for key, array in inputs.items()})
        if labels is not None:
            np.savez(paths[f"{name}-labels"], allow_pickle=False, **{LABELS_KEY: labels[rows]})
    signature = signature_of(load_model(folder / "model.onnx"))
    everybody = read_samples(paths["seen"], signature)
    ranges, _, _ = split(
        everybody, recipe.calibration_samples, recipe.search_samples, recipe.holdout_samples, recipe.seed
    )
    chosen = seen[ranges.indices]
    np.savez(paths["calibration"], allow_pickle=False, **{key: array[chosen] for key, array in inputs.items()})
    return Material(
        model=folder / "model.onnx",
        seen=paths["seen"],
        seen_labels=None if labels is None else paths["seen-labels"],
        calibration=paths["calibration"],
        unseen=read_samples(paths["unseen"], signature, None if labels is None else paths["unseen-labels"]),
        seen_count=len(seen),
        repeated=repeated,
    )


def drawn(inputs: dict[str, Array], count: int, seed: int) -> tuple[Array, Array, int]:
    """Draw which samples are seen and which are not.

    Args:
        inputs: Name -> samples, axis 0 = samples.
        count: Samples.
        seed: Seed of the draw.

    Returns:
        Indices of what is seen, of what is not, and how many were left out of the latter as repeated.
    """
    order = np.random.default_rng(seed).permutation(count)
    size = max(round(count * UNSEEN_SHARE), min(LEAST_UNSEEN, count // 2))
    seen, unseen = np.sort(order[size:]), np.sort(order[:size])
    digests = [_digest(inputs, index) for index in range(count)]
    known = {digests[index] for index in seen}
    fresh = np.array([index for index in unseen if digests[index] not in known], np.int64)
    return seen, fresh, size - len(fresh)


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _digest(inputs: dict[str, Array], index: int) -> bytes:
    digest = hashlib.sha256()
    for _, array in sorted(inputs.items()):
        digest.update(np.ascontiguousarray(array[index]).tobytes())
    return digest.digest()
