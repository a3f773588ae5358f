"""The infer paths in the OpenAPI document: they are served ahead of FastAPI, which therefore does not know them."""

import math
from typing import Any

from server.errors import SlipstreamError
from server.repository import Repository
from server.tensors import Signature, TensorSpec

# A longer example helps nobody.
_EXAMPLE_ELEMENTS = 256
_PATHS = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
_DESCRIPTION = """\
The body is an infer request of the Open Inference Protocol v2. `data` is flat or nested, row by row.

- Tensors may instead follow the JSON part as bytes: give each its `binary_data_size`, and send the length of the JSON
  part in `Inference-Header-Content-Length`. `"binary_data_output": true` asks for such an answer.
- `"parameters": {"timeout": 20000}` sets a deadline in microseconds, `{"variant": "fp32"}` pins a variant,
  `{"priority": 1}` goes first (to 9, last); the headers `slipstream-timeout-ms`, `slipstream-variant` and
  `slipstream-priority` do the same where the body does not. `slipstream-client` names whom the work counts for.
- The answer's headers `slipstream-variant`, `-device`, `-batch-rows`, `-queue-ms`, `-compute-ms`, `server-timing`
  are its account; `slipstream-cache` says `hit` or `shared` where the response cache answered.
"""
_GENERIC = {
    "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.1, 0.2, 0.3, 0.4]}],
}
_ERRORS = {
    400: "not an infer request, or it does not fit the model",
    404: "unknown model or version",
    408: "headers or body took too long to come",
    413: "the body is over the limit",
    415: "unsupported Content-Encoding",
    429: "refused at admission: the queue is full, or the deadline cannot be met; see Retry-After",
    431: "the headers are over the limit",
    500: "the session failed",
    503: "the model is loading or failed, all its lanes fail, or the server is stopping",
    504: "the deadline expired in the queue, or could not be kept any more",
}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "example": "FP32"},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
        "parameters": {"type": "object"},
    },
}
_RESPONSE = {
    "type": "object",
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}, "code": {"type": "string"}}}


def infer_paths(repository: Repository) -> dict[str, Any]:
    """Return the OpenAPI path items of infer, with one example body for each model that is ready."""
    examples = {"generic": {"summary": "any model with one FP32 input", "value": _GENERIC}}
    for name in repository.names():
        body = _example(repository, name)
        if body is not None:
            examples = {name: {"summary": f"model {name}", "value": body}, **examples}
    return {path: {"post": _operation(path, examples)} for path in _PATHS}


def example_request(signature: Signature) -> dict[str, Any] | None:
    """Make a request of one row of zeros that fits the signature; ``None`` if it would be long.

    Variable axes get the size 1.
    """
    inputs = [_tensor(spec) for spec in signature.inputs]
    if sum(len(tensor["data"]) for tensor in inputs) > _EXAMPLE_ELEMENTS:
        return None
    return {"inputs": inputs}


def _example(repository: Repository, name: str) -> dict[str, Any] | None:
    try:
        return example_request(repository.get(name).signature)
    except SlipstreamError:
        return None


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if size >= 0 else 1 for size in spec.protocol_shape]
    zero: Any = {"BYTES": "", "BOOL": False}.get(spec.datatype, 0.0 if spec.datatype.startswith("FP") else 0)
    count = min(math.prod(shape), _EXAMPLE_ELEMENTS + 1)
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": [zero] * count}


def _operation(path: str, examples: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in ("name", "version") if f"{{{name}}}" in path]
    return {
        "summary": "Infer",
        "description": _DESCRIPTION,
        "operationId": "infer" + "_version" * (len(names) - 1),
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _REQUEST, "examples": examples}}},
        "responses": {
            "200": {"description": "The outputs", "content": {"application/json": {"schema": _RESPONSE}}},
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": _ERROR}}}
                for status, text in _ERRORS.items()
            },
        },
    }
