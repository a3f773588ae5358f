"""ONNX files: reading, checking, describing and writing them. No other module of the optimizer opens a model file."""

import tempfile
from collections import Counter
from collections.abc import Container, Iterator
from os import SEEK_CUR
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError, Message  # type: ignore[import-untyped]
from onnx import helper

from optimizers.errors import ModelError
from server.errors import UnsupportedModel
from server.tensors import DATATYPE_OF_NUMPY, Dimension, Signature, TensorSpec

OPSET_CEILING = 26
"""Newest opset of the default domain that onnxruntime 1.31 loads; 27 came with 1.32."""

IR_CEILING = 13
"""Newest IR version that onnxruntime 1.31 loads; 14 came with 1.32."""

IR_PORTABLE = 10
"""IR version to write where the opset allows it: TensorRT and converters read nothing newer."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
"""Domains that every runtime implements; others bind a model to one runtime."""

_LEAST_OUTSIDE_BYTES = 1024
_PAGE_BYTES = 4096  # sessions map weights that begin at a page
_LARGEST_FILE_BYTES = 2_000_000_000  # a protocol buffer ends at 2 GiB; weights of larger models go into a second file


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external weights.

    Raises:
        ModelError: If the file, or a file with its weights, is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (DecodeError, onnx.checker.ValidationError, ValueError) as exc:
        raise ModelError(f"{path} is not an ONNX model: {exc}") from exc
    if not model.graph.output or not model.opset_import:
        raise ModelError(f"{path} is not an ONNX model: it has no graph with outputs, or no opset")
    return model


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external weights.

    Raises:
        ModelError: If the file is missing or is not an ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (DecodeError, ValueError) as exc:
        raise ModelError(f"{path} is not an ONNX model: {exc}") from exc


def files_of(path: Path) -> list[Path]:
    """Return a model file and the files of its external weights, without reading the weights.

    Raises:
        ModelError: If the file is missing or is not an ONNX model.
    """
    outside = [tensor for tensor in tensors_of(load_graph(path)) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    names = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    return [path, *(path.parent / name for name in sorted(names))]


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model so that readers see the old file or the new one, never a part.

    Models beyond 2 GB put their weights into ``<name>.data`` beside the file.

    Raises:
        ModelError: If the model cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            if weight_bytes(model) < _LARGEST_FILE_BYTES:
                draft.write_bytes(model.SerializeToString(deterministic=True))
            else:
                data = draft.with_name(f"{path.name}.data")
                draft.write_bytes(_without_weights(model, data).SerializeToString(deterministic=True))
                data.replace(path.parent / data.name)
        except (OSError, ValueError, EncodeError) as exc:
            raise ModelError(f"cannot write {path}: {exc}") from exc
        draft.replace(path)


def check(model: onnx.ModelProto) -> None:
    """Check that a model is valid and that every supported runtime loads it.

    Raises:
        ModelError: If ONNX's checker refuses it, or if its opset or IR version is above the ceiling.
    """
    if model.ir_version > IR_CEILING:
        raise ModelError(f"IR version {model.ir_version} is above {IR_CEILING}; export the model with an older one")
    if opset_of(model) > OPSET_CEILING:
        raise ModelError(f"opset {opset_of(model)} is above {OPSET_CEILING}; export the model with opset 17 to 21")
    if weight_bytes(model) >= _LARGEST_FILE_BYTES:
        return  # the checker takes larger models only as files
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        raise ModelError(f"ONNX's checker refuses the model: {str(exc).splitlines()[0]}") from exc


def signature_of(model: onnx.ModelProto) -> Signature:
    """Return the inputs that a caller must give, and the outputs, as a session of this model declares them.

    Raises:
        UnsupportedModel: If one is not a dense tensor of a served datatype.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    return Signature(
        tuple(_spec(value) for value in model.graph.input if value.name not in weights),
        tuple(_spec(value) for value in model.graph.output),
    )


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Count nodes per operator, subgraphs included, most frequent first; other domains are spelled ``domain:Op``."""
    counts = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}" for node in nodes_of(model)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default domain; 0 when the model does not use it."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def foreign_ops(model: onnx.ModelProto) -> list[str]:
    """Return the operators outside the standard domains, as ``domain:Op``; local functions are not foreign."""
    own = {function.domain for function in model.functions}
    used = {f"{n.domain}:{n.op_type}" for n in nodes_of(model) if n.domain not in STANDARD_DOMAINS | own}
    return sorted(used)


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the main graph and the subgraphs of its control flow, each before those inside it."""
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the main graph and of the subgraphs of its control flow."""
    for graph in graphs_of(model):
        yield from graph.node


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that the file holds: initializers and Constant nodes, also in subgraphs and functions."""
    for graph in graphs_of(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    inside = (node for function in model.functions for node in function.node)
    for node in (*nodes_of(model), *inside):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def free_name(wish: str, taken: Container[str]) -> str:
    """Return this name, or one like it that is not taken."""
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    return name


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the size of all tensors in the file, which is nearly that of the model."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in tensors_of(model))


def copy_fields(source: Message, target: Message, left_out: str) -> None:
    """Copy all fields of a message but one, which may hold gigabytes."""
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if field.is_repeated:
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _without_weights(model: onnx.ModelProto, data: Path) -> onnx.ModelProto:
    """Write the large weights of the main graph into a file; return a copy of the model that refers to it.

    onnx's own way needs a copy of all weights, since it moves them out of the model that it is given.
    """
    light = onnx.ModelProto()
    copy_fields(model, light, "graph")
    copy_fields(model.graph, light.graph, "initializer")
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            content = tensor.raw_data
            if len(content) < _LEAST_OUTSIDE_BYTES:
                light.graph.initializer.append(tensor)
                continue
            file.seek(-file.tell() % _PAGE_BYTES, SEEK_CUR)
            stub = light.graph.initializer.add()
            copy_fields(tensor, stub, "raw_data")
            stub.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": data.name, "offset": file.tell(), "length": file.write(content)}
            for key, value in place.items():
                stub.external_data.add(key=key, value=str(value))
    return light


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        seen = (kind or "value without type").removesuffix("_type")
        raise UnsupportedModel(f"'{value.name}' is a {seen}; only dense tensors are served")
    element = value.type.tensor_type.elem_type
    datatype = DATATYPE_OF_NUMPY.get(np.dtype(helper.tensor_dtype_to_np_dtype(element))) if element else None
    if datatype is None or element == onnx.TensorProto.BFLOAT16:
        name = onnx.TensorProto.DataType.Name(element)
        served = sorted(DATATYPE_OF_NUMPY.values())
        raise UnsupportedModel(f"'{value.name}' has datatype {name}; served types are {served}")
    return TensorSpec(value.name, datatype, tuple(_dimension(dim) for dim in value.type.tensor_type.shape.dim))


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> Dimension:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None
