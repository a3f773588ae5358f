"""Bodies for infer requests, made from a model's own metadata, and the check of the answers.

Knows the protocol on its own, without the server's code: the check is independent, and a load generator needs nothing
but this folder, numpy and Locust. Imports no Locust, so that it can be tested without gevent's patches.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LENGTH_HEADER = "Inference-Header-Content-Length"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}


class PayloadError(Exception):
    """No body can be made for this model with these options, or an answer is no answer."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A request that is sent again and again.

    Attributes:
        body: The whole body.
        headers: HTTP headers that belong to it.
    """

    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Filling:
    """What the tensors of a body hold.

    Attributes:
        rows: Size of a variable first axis.
        variable_size: Size of every other variable axis, e.g. a sequence length.
        max_integer: Integers are drawn from 0 to this; small, because they are often indices. Inputs with ``mask`` in
            their name hold ones.
        seed: Equal seeds give equal bodies.
    """

    rows: int = 1
    variable_size: int = 16
    max_integer: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Encoder:
    binary: bool
    inputs: list[dict[str, Any]] = field(default_factory=list)
    tail: list[bytes] = field(default_factory=list)

    def add(self, name: str, datatype: str, array: np.ndarray) -> None:
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if self.binary:
            self.tail.append(_to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(self.tail[-1])}
        else:
            elements = array.ravel().tolist()
            tensor["data"] = [item.decode() for item in elements] if datatype == "BYTES" else elements
        self.inputs.append(tensor)


def build_payload(
    metadata: Mapping[str, Any], filling: Filling, *, binary: bool, parameters: Mapping[str, Any] | None = None
) -> Payload:
    """Make a body that fits a model.

    Args:
        metadata: The model's metadata as ``GET /v2/models/<name>`` gives it.
        filling: Sizes and values.
        binary: Whether inputs and outputs travel as binary data; as JSON otherwise.
        parameters: Of the request, such as ``priority``, and ``timeout`` in microseconds.

    Raises:
        PayloadError: If the metadata names no inputs, if an input has a datatype that this generator or this form does
            not know, or a fixed first axis while more than one row is wanted.
    """
    if not metadata.get("inputs"):
        raise PayloadError(
            f"the server names no inputs of model '{metadata.get('name', '')}', so nothing can be made up"
        )
    rng = np.random.default_rng(filling.seed)
    encoder = _Encoder(binary)
    for spec in metadata["inputs"]:
        if spec["datatype"] == "FP16" and not binary:
            raise PayloadError(f"input '{spec['name']}' is FP16, which JSON cannot carry; use --wire binary")
        encoder.add(spec["name"], spec["datatype"], _random_array(spec, filling, rng))
    head = json.dumps(
        {"inputs": encoder.inputs, "parameters": {"binary_data_output": binary, **(parameters or {})}}
    ).encode()
    if not binary:
        return Payload(head, {"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(head))}
    return Payload(b"".join((head, *encoder.tail)), headers)


def read_outputs(body: bytes, json_length: str | None) -> dict[str, np.ndarray]:
    """Read an infer response.

    Args:
        body: The whole body.
        json_length: The header ``Inference-Header-Content-Length`` of the response, if it has one.

    Returns:
        Name -> array; BYTES are arrays of ``object`` that hold ``bytes``.

    Raises:
        PayloadError: If the body is not such a response.
    """
    try:
        position = len(body) if json_length is None else int(json_length)
        outputs = {}
        for output in json.loads(body[:position])["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                array = _from_json(output["datatype"], output["data"])
            else:
                array = _from_bytes(output["datatype"], body[position : position + size])
                position += size
            outputs[output["name"]] = array.reshape(output["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise PayloadError(f"not an infer response: {type(exc).__name__}: {exc}") from exc
    if position != len(body):
        raise PayloadError("not an infer response: its parts do not add up to the body")
    return outputs


def difference(expected: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray], tolerance: float) -> str:
    """Say how an answer differs from the expected one.

    Args:
        expected: The outputs of the same body, answered before.
        seen: The outputs to check.
        tolerance: Largest deviation of a float, as a share of the expected output's largest magnitude. Rows of a batch,
            and even more the variants of a model, round differently. Everything else must be equal.

    Returns:
        An empty text when nothing differs; never a number, so that equal failures are counted together.
    """
    if expected.keys() != seen.keys():
        return f"answered with outputs {sorted(seen)} instead of {sorted(expected)}"
    for name, wanted in expected.items():
        array = seen[name]
        if array.dtype != wanted.dtype or array.shape != wanted.shape:
            return f"output '{name}' has another datatype or shape than before"
        if wanted.dtype.kind != "f":
            if not np.array_equal(array, wanted):
                return f"output '{name}' is not what it was before"
        elif not np.allclose(array, wanted, rtol=0, atol=tolerance * _magnitude(wanted), equal_nan=True):
            return f"output '{name}' is farther than the tolerance from what it was before"
    return ""


def _random_array(spec: Mapping[str, Any], filling: Filling, rng: np.random.Generator) -> np.ndarray:
    shape = [filling.variable_size if size == -1 else size for size in spec["shape"]]
    if spec["shape"] and spec["shape"][0] == -1:
        shape[0] = filling.rows
    elif filling.rows != 1:
        raise PayloadError(f"input '{spec['name']}' has the fixed shape {spec['shape']}; use --rows 1")
    if spec["datatype"] == "BYTES":
        words = [b"word %d" % number for number in rng.integers(0, 1000, int(np.prod(shape)))]
        return np.array(words, np.object_).reshape(shape)
    dtype = _DTYPES.get(spec["datatype"])
    if dtype is None:
        raise PayloadError(f"input '{spec['name']}' is {spec['datatype']}; known are {', '.join(_DTYPES)} and BYTES")
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in spec["name"]:
        return np.ones(shape, dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else filling.max_integer + 1, shape).astype(dtype)


def _magnitude(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max()) if finite.size else 0.0


def _to_bytes(array: np.ndarray) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(len(element).to_bytes(4, "little") + element for element in array.ravel())


def _from_bytes(datatype: str, part: bytes) -> np.ndarray:
    if datatype != "BYTES":
        return np.frombuffer(part, _DTYPES[datatype])
    elements = []
    position = 0
    while position < len(part):
        start = position + 4
        position = start + int.from_bytes(part[position:start], "little")
        elements.append(part[start:position])
    if position != len(part):
        raise ValueError("an element of BYTES ends behind its tensor")
    return np.array(elements, np.object_)


def _from_json(datatype: str, data: list[Any]) -> np.ndarray:
    if datatype == "BYTES":
        return np.array([element.encode() for element in data], np.object_)
    return np.array(data, _DTYPES[datatype])
