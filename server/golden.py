"""Golden check: does a variant, on this host, still reproduce the original's recorded outputs?

The same file can be right on one machine and wrong on another: INT8 kernels of CPUs without VNNI saturate at 16 bits.
So a variant is checked wherever it is opened, before it serves.
"""

import numpy as np

from server.artifact import Golden, Variant
from server.errors import ArtifactError, InferenceFailed
from server.session import Opened
from server.tensors import Array, Tensors

MOST_DB = 200.0


def require_golden(session: Opened, variant: Variant, golden: Golden) -> float:
    """Run the golden inputs and require the outputs to be as close to the original's as the manifest promises.

    Returns:
        The signal to quantization noise ratio in decibel, -200 to 200.

    Raises:
        ArtifactError: If the run fails or the ratio lies below ``variant.golden_min_sqnr_db``.
    """
    try:
        outputs = session.run(golden.inputs)
    except InferenceFailed as exc:
        raise ArtifactError(f"variant {variant.name} cannot run its golden inputs: {exc}") from exc
    seen = sqnr_db(golden.outputs, outputs)
    if seen < variant.golden_min_sqnr_db:
        raise ArtifactError(
            f"variant {variant.name} on {session.device.name} reproduces the original with {seen:.1f} dB on this host, "
            f"at least {variant.golden_min_sqnr_db:.1f} dB are required; optimize the model again on this host"
        )
    return seen


def sqnr_db(reference: Tensors, candidate: Tensors) -> float:
    """Return ``10 log10(sum(ref^2) / sum((ref - cand)^2))`` over all floating point outputs, in decibel.

    Args:
        reference: Output name -> array of the original. Its own NaN and infinite elements do not count.
        candidate: The same outputs of the variant.

    Returns:
        A value from -200 to 200, where 200 means no difference. -200 if the candidate lacks an output, has another
        shape, or is NaN or infinite where the reference is finite. Outputs that are not floating point do not enter,
        unless there are no others: then 200 if all of their elements are equal, and ``10 log10(elements / changed
        elements)`` otherwise.
    """
    if any(name not in candidate or candidate[name].shape != array.shape for name, array in reference.items()):
        return -MOST_DB
    floats = [name for name, array in reference.items() if array.dtype.kind == "f"]
    if not floats:
        changed = sum(int(np.count_nonzero(array != candidate[name])) for name, array in reference.items())
        total = sum(array.size for array in reference.values())
        return float(10 * np.log10(total / changed)) if changed else MOST_DB
    signal = noise = 0.0
    for name in floats:
        power, error = _powers(reference[name], candidate[name])
        signal, noise = signal + power, noise + error
    if not np.isfinite(noise):
        return -MOST_DB
    if noise == 0:
        return MOST_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -MOST_DB, MOST_DB))


def _powers(reference: Array, candidate: Array) -> tuple[float, float]:
    counts = np.isfinite(reference)
    expected, seen = reference[counts].astype(np.float64), candidate[counts].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sum(expected**2)), float(np.sum((expected - seen) ** 2))
