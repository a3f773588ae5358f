"""Runs a model with inner tensors as further outputs, so that passes see what flows through it.

Memory is bounded by one batch. Tensors that together are large can be observed in groups, one run over the data each.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from optimizers.errors import PassFailed
from optimizers.graph import save_model
from optimizers.passes import copy_of
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import Device
from server.session import Session
from server.tensors import Array, Tensors

_PLAIN = SessionOptions(intra_op_threads=0, graph_level="disable")
_GROUP_BYTES = 256 << 20
_ELEMENT_BYTES = 4


def observed(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Tensors], work: Path
) -> Iterator[dict[str, Array]]:
    """Run a model as its file says, and yield the values of float tensors batch by batch.

    Each dictionary is the caller's: arrays that are taken out of it are freed as soon as the caller drops them.

    Args:
        model: The model, weights inside.
        tensors: Names of FLOAT tensors of its main graph, none of them a weight; names that come twice count once.
        batches: Inputs, taken one by one.
        work: An existing folder for a temporary file.

    Yields:
        Tensor name -> FP32 array.

    Raises:
        PassFailed: If the model does not run on the batches.
    """
    given = {value.name for value in model.graph.input}
    declared = {value.name for value in model.graph.output}
    wanted = tuple(name for name in dict.fromkeys(tensors) if name not in given)
    twin = copy_of(model)
    extra = (name for name in wanted if name not in declared)
    twin.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    with _opened(twin, work) as session:
        for batch in batches:
            values = session.run(batch, wanted) if wanted else {}
            values.update((name, batch[name]) for name in tensors if name in given)
            yield values


def in_groups(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Sequence[Tensors], work: Path
) -> list[list[str]]:
    """Cut tensors into groups that take at most 256 MB each, or hold one tensor; keep their order.

    The model itself counts the elements of the first batch. Shapes in the file do not tell: axes may have names, or no
    size at all.

    Args:
        model: The model, weights inside.
        tensors: As for ``observed``.
        batches: Inputs, at least one.
        work: An existing folder for a temporary file.

    Raises:
        PassFailed: If the model does not run on the first batch.
    """
    groups: list[list[str]] = []
    if not tensors:
        return groups
    twin = copy_of(model)
    del twin.graph.output[:]
    sizes = [f"{name}/elements" for name in tensors]
    twin.graph.node.extend(helper.make_node("Size", [name], [size]) for name, size in zip(tensors, sizes, strict=True))
    twin.graph.output.extend(helper.make_tensor_value_info(size, TensorProto.INT64, []) for size in sizes)
    with _opened(twin, work) as session:
        elements = session.run(batches[0])
    room = 0
    for name, size in zip(tensors, sizes, strict=True):
        needed = _ELEMENT_BYTES * int(elements[size])
        if not groups or needed > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(name)
        room -= needed
    return groups


@contextmanager
def _opened(model: onnx.ModelProto, work: Path) -> Iterator[Session]:
    """Open a model; whatever fails within is a refusal with its reason."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "observed.onnx"
        save_model(model, path)
        try:
            session = Session(path, Device("cpu"), _PLAIN)
            try:
                yield session
            finally:
                session.close()
        except SlipstreamError as exc:
            raise PassFailed(f"the model does not run on the calibration data: {exc}") from exc
