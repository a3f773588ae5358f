"""The golden check: does a pass's result still answer like its input?

Both models run with onnxruntime's own optimizations disabled, so that what is compared is what the file says.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from optimizers.errors import ModelError, PassFailed
from optimizers.graph import check, save_model, signature_of
from optimizers.passes import Effect, PassResult
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Array, Signature, Tensors

# Relative to the element, and to the largest element of its tensor. FP32 carries 1.2e-7; folding a weight rounds once
# more per layer, and cancellation makes small elements of a tensor as inexact as its large ones.
_RELATIVE = {"exact": 1e-5, "tolerance": 1e-3}
_OF_LARGEST = {"exact": 1e-6, "tolerance": 1e-4}
_LEAST_COSINE = 0.9999

PLAIN = SessionOptions(intra_op_threads=0, graph_level="disable")
"""Opens a session that computes exactly what the file says, on all cores."""


def answers(
    model: onnx.ModelProto, batches: Sequence[Tensors], work: Path, options: SessionOptions = PLAIN
) -> list[Tensors]:
    """Run a model on some batches, with the session code that serves.

    Args:
        model: The model.
        batches: Inputs.
        work: An existing folder for the temporary file.
        options: How to open the session.

    Raises:
        SlipstreamError: If the session does not open or does not run.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        session = Session(path, Device("cpu"), options)
        try:
            return [session.run(batch) for batch in batches]
        finally:
            session.close()


def require_equivalent(
    model: onnx.ModelProto, result: PassResult, effect: Effect, batches: Sequence[Tensors], work: Path
) -> None:
    """Require that a result is valid, keeps the signature, opens, and answers as its input does.

    Args:
        model: What the pass was given.
        result: What it made.
        effect: How near the answers must be; after ``lossy`` they must only have the same shapes and be finite.
        batches: Inputs to try.
        work: An existing folder for temporary files.

    Raises:
        PassFailed: If it does not, with the reason.
    """
    try:
        check(result.model)
        _require_signature(signature_of(model), signature_of(result.model))
        expected = answers(model, batches, work)
        options = SessionOptions(intra_op_threads=0, graph_level="disable", config=result.options.config)
        seen = answers(result.model, batches, work, options)
    except (ModelError, SlipstreamError) as exc:
        raise PassFailed(f"the result is not usable: {exc}") from exc
    for reference, candidate in zip(expected, seen, strict=True):
        reason = difference(reference, candidate, effect)
        if reason:
            raise PassFailed(reason)


def difference(reference: Tensors, candidate: Tensors, effect: Effect) -> str:
    """Return how a candidate's outputs differ by more than the effect allows, or nothing when they do not.

    Args:
        reference: Name -> output before the pass.
        candidate: Name -> output after the pass.
        effect: ``exact``: 1e-5 of the element plus 1e-6 of the tensor's largest; ``tolerance``: 1e-3 plus 1e-4, and a
            cosine of at least 0.9999; ``lossy``: shapes, dtypes and finiteness only. Integers and text must be equal
            unless lossy.
    """
    for name, expected in reference.items():
        seen = candidate.get(name)
        if seen is None:
            return f"output '{name}' is missing"
        if (seen.shape, seen.dtype) != (expected.shape, expected.dtype):
            return f"output '{name}' is {seen.dtype}{list(seen.shape)}, was {expected.dtype}{list(expected.shape)}"
        compare = _float_difference if expected.dtype.kind == "f" else _other_difference
        reason = compare(expected, seen, effect)
        if reason:
            return f"output '{name}' {reason}"
    return ""


def _require_signature(before: Signature, after: Signature) -> None:
    old, new = (*before.inputs, *before.outputs), (*after.inputs, *after.outputs)
    if [spec.name for spec in old] != [spec.name for spec in new]:
        raise PassFailed(f"inputs and outputs are {[s.name for s in new]}, were {[s.name for s in old]}")
    for was, is_ in zip(old, new, strict=True):
        if was != is_:
            raise PassFailed(f"'{was.name}' is {is_.datatype}{list(is_.shape)}, was {was.datatype}{list(was.shape)}")


def _float_difference(expected: Array, seen: Array, effect: Effect) -> str:
    finite = np.isfinite(expected)
    if not np.isfinite(seen[finite]).all():
        return "is NaN or infinite where it was finite"
    if effect == "lossy":
        return ""
    if not np.array_equal(finite, np.isfinite(seen)):
        return "is finite where it was NaN or infinite"
    a, b = expected[finite].astype(np.float64), seen[finite].astype(np.float64)
    largest = np.abs(a).max(initial=0.0)
    error = np.abs(a - b)
    excess = error - (_RELATIVE[effect] * np.abs(a) + _OF_LARGEST[effect] * largest)
    if excess.max(initial=0.0) > 0:
        worst = int(np.argmax(excess))
        return f"has an element {b[worst]:.6g} that was {a[worst]:.6g}; {effect} passes may only round"
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a.ravel() @ b.ravel()) / norm if norm else 1.0
    return f"has cosine {cosine:.6f} to before; at least {_LEAST_COSINE} is needed" if cosine < _LEAST_COSINE else ""


def _other_difference(expected: Array, seen: Array, effect: Effect) -> str:
    if effect == "lossy" or np.array_equal(expected, seen):
        return ""
    return f"differs in {int(np.sum(expected != seen))} of {expected.size} elements"
