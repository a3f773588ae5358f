"""What the soak sends: three models, and requests of every kind with the answers that they may get.

All models are homogeneous: inputs that are scaled by ``c`` give outputs scaled by ``c``. So no two requests need to be
alike, and every answer can be checked.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.workloads import Workload, open_workload, save_tiny
from server.tensors import Array

WIDE_FEATURES, WIDE_OUTPUTS, WIDE_ROWS = 16, 4096, 256
SLOW_SIZE, SLOW_DEPTH = 512, 8
FEW_ROWS, PARTED_ROWS = 8, 400
_SMALL_ROWS = 32
_LARGE_BYTES = 64 * 1024
_FLOAT = TensorProto.FLOAT
_BINARY = "Inference-Header-Content-Length: %d\r\n"


class Item(msgspec.Struct, frozen=True):
    """One kind of request with its inputs.

    Attributes:
        share: Of all requests.
        start: Request line, and headers but for ``Content-Length``; ``%d`` in it stands for a number that is never the
            same.
        body: The body, up to the tensor if that is binary.
        tensor: The FP32 input behind it, to be scaled at random; empty for a body that is sent as it is.
        expected: The FP32 output; empty where only the code counts.
        codes: What the answer may be: ``ok`` or the code of an error.
        takes_options: Whether a client's name, a priority, a deadline or a pinned variant may be added.
    """

    share: float
    start: bytes
    body: bytes
    codes: tuple[str, ...]
    tensor: bytes = b""
    expected: bytes = b""
    takes_options: bool = True


def large_ones(items: Sequence[Item]) -> list[Item]:
    """Return the items with large requests or answers, each as often as any other."""
    large = [item for item in items if max(len(item.tensor), len(item.expected)) >= _LARGE_BYTES]
    return [msgspec.structs.replace(item, share=1 / len(large)) for item in large]


def save_models(repository: Path) -> list[Item]:
    """Write the models and return the requests to them."""
    rng = np.random.default_rng(0)
    tiny = save_tiny(repository)
    wide = _open_wide(repository, rng)
    slow = _open_slow(repository, rng)
    few = _stacked(tiny, FEW_ROWS)
    return [
        *_spread(0.30, [_json(tiny, *row) for row in _rows(tiny)]),
        *_spread(0.52, [_binary(tiny, *row) for row in _rows(tiny)]),
        *_spread(0.12, [_binary(tiny, *few), _json(tiny, *few)]),
        *_spread(0.02, [_gzip(tiny, *few)]),
        *_spread(0.01, [_binary(tiny, *_stacked(tiny, PARTED_ROWS))]),
        *_spread(0.0025, [_binary(wide, *_stacked(wide, WIDE_ROWS)), _json(wide, *_stacked(wide, WIDE_ROWS // 8))]),
        *_spread(0.0005, [_binary(slow, *row) for row in _rows(slow)]),
        *_spread(0.024, _faulty(tiny)),
        *_spread(0.003, [_page("/metrics"), _page("/v2/health/ready"), _page("/v2/models/tiny")]),
    ]


def _open_wide(repository: Path, rng: np.random.Generator) -> Workload:
    weights = {"w": rng.standard_normal((WIDE_FEATURES, WIDE_OUTPUTS)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    _save(repository, "wide", nodes, weights, ("batch", WIDE_FEATURES), ("batch", WIDE_OUTPUTS))
    rows = [{"x": rng.standard_normal((1, WIDE_FEATURES)).astype(np.float32)} for _ in range(_SMALL_ROWS)]
    return open_workload(repository, "wide", rows)


def _open_slow(repository: Path, rng: np.random.Generator) -> Workload:
    """Write a model of one row at a time that takes tens of milliseconds: long enough to leave while it waits."""
    shape = (SLOW_SIZE, SLOW_SIZE)
    weights = {
        "grow": rng.standard_normal(shape).astype(np.float32),
        "w": (rng.standard_normal(shape) / np.sqrt(SLOW_SIZE)).astype(np.float32),
        "axes": np.array([0], np.int64),
    }
    nodes = [helper.make_node("Mul", ["x", "grow"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "w"], [f"h{i + 1}"]) for i in range(SLOW_DEPTH)]
    nodes += [helper.make_node("ReduceSum", [f"h{SLOW_DEPTH}", "axes"], ["y"])]
    _save(repository, "slow", nodes, weights, (1, 1), (1, SLOW_SIZE))
    rows = [{"x": np.full((1, 1), value, np.float32)} for value in (0.5, -1.0)]
    return open_workload(repository, "slow", rows)


def _save(
    repository: Path,
    name: str,
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    x: Sequence[int | str],
    y: Sequence[int | str],
) -> None:
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    inputs, outputs = ([helper.make_tensor_value_info(each, _FLOAT, shape)] for each, shape in (("x", x), ("y", y)))
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    path = repository / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _rows(workload: Workload) -> list[tuple[Array, Array]]:
    return [(row["x"], out["y"]) for row, out in zip(workload.rows, workload.expected, strict=True)]


def _stacked(workload: Workload, count: int) -> tuple[Array, Array]:
    rows = _rows(workload)
    chosen = [rows[i % len(rows)] for i in range(count)]
    return np.concatenate([x for x, _ in chosen]), np.concatenate([y for _, y in chosen])


def _spread(share: float, items: list[Item]) -> list[Item]:
    return [msgspec.structs.replace(item, share=share / len(items)) for item in items]


def _start(path: str, headers: str = "", method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}".encode()


def _infer(model: str) -> str:
    return f"/v2/models/{model}/infer"


def _described(x: Array) -> dict[str, object]:
    return {"name": "x", "datatype": "FP32", "shape": list(x.shape)}


def _json(workload: Workload, x: Array, y: Array) -> Item:
    body = json.dumps({"inputs": [{**_described(x), "data": x.ravel().tolist()}]}).encode()
    return Item(0, _start(_infer(workload.name)), body, ("ok", "queue_full"), expected=y.tobytes())


def _gzip(workload: Workload, x: Array, y: Array) -> Item:
    plain = _json(workload, x, y)
    start = _start(_infer(workload.name), "Content-Encoding: gzip\r\n")
    return msgspec.structs.replace(plain, start=start, body=gzip.compress(plain.body, 1))


def _binary(workload: Workload, x: Array, y: Array) -> Item:
    inputs = [{**_described(x), "parameters": {"binary_data_size": x.nbytes}}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    start = _start(_infer(workload.name), _BINARY % len(head))
    return Item(0, start, head, ("ok", "queue_full"), x.tobytes(), y.tobytes())


def _page(path: str) -> Item:
    return Item(0, _start(path, method="GET"), b"", ("ok",), takes_options=False)


def _faulty(workload: Workload) -> list[Item]:
    good = _json(workload, *_rows(workload)[0])
    path, body = _infer(workload.name), good.body
    wrong_shape = json.dumps({"inputs": [{**_described(np.zeros((1, 3))), "data": [0.0, 0.0, 0.0]}]}).encode()
    squeezed = gzip.compress(body, 1)
    cases = [
        (_start(path), body[:-1], "malformed_request"),
        (_start(path), wrong_shape, "signature_mismatch"),
        (_start(path, _BINARY % (len(body) + 1)), body, "malformed_request"),
        (_start(path, "slipstream-priority: 12\r\n"), body, "malformed_request"),
        (_start(path, "slipstream-variant: none-%d\r\n"), body, "unknown_variant"),
        (_start(path, "Content-Encoding: br\r\n"), body, "unsupported_encoding"),
        (_start(path, "Content-Encoding: gzip\r\n"), squeezed[:-9], "malformed_request"),
        (_start(_infer("none-%d")), body, "unknown_model"),
        (_start(_infer("tiny/versions/%d9")), body, "unknown_model"),
        (_start("/none-%d"), body, "not_found"),
        (_start(path, method="PUT"), body, "method_not_allowed"),
    ]
    return [Item(0, start, sent, (code,), takes_options=False) for start, sent, code in cases]
