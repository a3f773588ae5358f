"""What is measured: models, their inputs as requests of every kind, and the check of the answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.generator import SeenAnswer
from server.artifact import SessionOptions, read_artifact
from server.cores import usable_cores
from server.providers import Device, open_ort_session
from server.tensors import DATATYPE_OF_NUMPY, NUMPY_DTYPE, Array

Row = dict[str, Array]
TINY_FEATURES, TINY_CLASSES = 64, 10
WIDE_FEATURES, WIDE_GROUPS = 12_288, 16
REQUESTS = 32


class Workload(msgspec.Struct, frozen=True):
    """One model with its requests.

    Attributes:
        name: The name that it is served under.
        repository: Folder for ``slipstream serve``.
        variant: Name of the variant that the server prefers.
        model: File of that variant.
        options: How the server opens it.
        lanes: How many runs of it the server makes at a time.
        rows: Different inputs, each with batch axis 0 of size 1.
        expected: The session's own answer to each row, run alone.
    """

    name: str
    repository: Path
    variant: str
    model: Path
    options: SessionOptions
    lanes: int
    rows: list[Row]
    expected: list[Row]


def open_workload(repository: Path, name: str, rows: list[Row]) -> Workload:
    """Read the newest version of a model in a repository and compute the expected answers."""
    newest = max((path for path in (repository / name).iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
    variant = next(variant for variant in read_artifact(newest).variants if variant.provider == "cpu")
    path = newest / variant.file
    session = open_ort_session(path, Device("cpu"), variant.options)
    outputs = [node.name for node in session.get_outputs()]
    expected = [dict(zip(outputs, session.run(None, row), strict=True)) for row in rows]
    lanes = max(1, usable_cores() // (variant.options.intra_op_threads or usable_cores()))
    return Workload(name, repository, variant.name, path, variant.options, lanes, rows, expected)


def save_tiny(repository: Path) -> Workload:
    """Write a net of two layers with 64 inputs and 10 outputs, small enough that HTTP is what it costs."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((TINY_FEATURES, TINY_FEATURES)).astype(np.float32) / 8
    second = rng.standard_normal((TINY_FEATURES, TINY_CLASSES)).astype(np.float32) / 8
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "second"], ["y"]),
    ]
    weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", TINY_FEATURES])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", TINY_CLASSES])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    save_plain(repository, graph)
    rows = [{"x": rng.standard_normal((1, TINY_FEATURES)).astype(np.float32)} for _ in range(REQUESTS)]
    return open_workload(repository, "tiny", rows)


def save_wide(repository: Path) -> Workload:
    """Write a net that adds up 12,288 inputs in 16 groups: a picture's numbers, whose reading is what it costs."""
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [3], [0, WIDE_GROUPS, -1])
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["grouped"]),
        helper.make_node("ReduceMean", ["grouped", "axis"], ["y"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDE_FEATURES])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDE_GROUPS])]
    save_plain(repository, helper.make_graph(nodes, "wide", inputs, outputs, [sizes, axis]))
    rng = np.random.default_rng(0)
    rows = [{"x": rng.standard_normal((1, WIDE_FEATURES)).astype(np.float32)} for _ in range(REQUESTS)]
    return open_workload(repository, "wide", rows)


def save_plain(repository: Path, graph: onnx.GraphProto) -> None:
    """Write a graph as version 1 of the model of its name."""
    path = repository / graph.name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def read_rows(samples: Path, count: int = REQUESTS) -> list[Row]:
    """Read the first samples of a calibration file as rows."""
    with np.load(samples) as arrays:
        inputs = {name: arrays[name][:count] for name in arrays.files}
    return [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(count)]


def json_request(workload: Workload, row: Row, **parameters: object) -> bytes:
    """Return a complete request of the Open Inference Protocol with all tensors in JSON."""
    inputs = [{**_described(name, array), "data": array.ravel().tolist()} for name, array in row.items()]
    body = {"inputs": inputs, **({"parameters": parameters} if parameters else {})}
    return post(_infer_path(workload), json.dumps(body).encode())


def binary_request(workload: Workload, row: Row, **parameters: object) -> bytes:
    """Return the same request with binary tensors, asking for binary answers."""
    inputs = [
        {**_described(name, array), "parameters": {"binary_data_size": array.nbytes}} for name, array in row.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True, **parameters}}).encode()
    body = b"".join([head, *(array.tobytes() for array in row.values())])
    return post(_infer_path(workload), body, f"Inference-Header-Content-Length: {len(head)}\r\n")


def with_header(request: bytes, line: str) -> bytes:
    """Return a complete request with one more header line."""
    head, end, body = request.partition(b"\r\n\r\n")
    return head + b"\r\n" + line.encode("ascii") + end + body


def plain_request(row: Row) -> bytes:
    """Return the same row as ``benchmarks.plain_fastapi`` takes it."""
    return post("/predict", json.dumps({name: array.tolist() for name, array in row.items()}).encode())


def read_answer(answer: SeenAnswer) -> Row:
    """Decode an answer of any of the three kinds."""
    body = json.loads(answer.body[: answer.json_length])
    if "outputs" not in body:
        return {name: np.array(values) for name, values in body.items()}
    outputs, offset = {}, answer.json_length or 0
    for entry in body["outputs"]:
        dtype = NUMPY_DTYPE[entry["datatype"]]
        if "data" in entry:
            flat = np.array(entry["data"], dtype)
        else:
            size_bytes = entry["parameters"]["binary_data_size"]
            flat = np.frombuffer(answer.body[offset : offset + size_bytes], dtype)
            offset += size_bytes
        outputs[entry["name"]] = flat.reshape(entry["shape"])
    return outputs


class AnswerCheck(msgspec.Struct, frozen=True):
    """How the answers of one run compare with the session's own.

    Attributes:
        failed: Answers with a status other than 200.
        wrong: Answers that lie nearer to another row's expected answer than to their own row's.
        worst_error: Largest distance from the expected answer, relative to that answer's length.
    """

    failed: int
    wrong: int
    worst_error: float


def flat_answer(answer: SeenAnswer, expected: Mapping[str, Array]) -> Array:
    """Return the numbers of an answer that names its outputs, in the order of the expected ones."""
    return flat(read_answer(answer), expected)


def check_answers(
    answers: Sequence[SeenAnswer],
    expected: Sequence[Mapping[str, Array]],
    read: Callable[[SeenAnswer, Mapping[str, Array]], Array] = flat_answer,
) -> AnswerCheck:
    """Compare answers with what the session gives for each row alone.

    An INT8 session's answer moves a little with its batch; a mix-up of rows moves it to another row's answer.

    Args:
        answers: What came.
        expected: The session's outputs for each row.
        read: Takes an answer and the expected outputs; returns all its numbers in their order.
    """
    table = np.stack([flat(row, row) for row in expected])
    failed = wrong = 0
    worst = 0.0
    for answer in answers:
        if answer.status != 200:
            failed += answer.count
            continue
        distances = np.linalg.norm(table - read(answer, expected[answer.request]), axis=1)
        if int(distances.argmin()) != answer.request:
            wrong += answer.count
        worst = max(worst, float(distances[answer.request] / np.linalg.norm(table[answer.request])))
    return AnswerCheck(failed, wrong, worst)


def flat(outputs: Mapping[str, Array], order: Mapping[str, Array]) -> Array:
    """Return all numbers of some outputs, one output after another in the given order."""
    return np.concatenate([np.asarray(outputs[name], np.float64).ravel() for name in order])


def _described(name: str, array: Array) -> dict[str, object]:
    return {"name": name, "datatype": DATATYPE_OF_NUMPY[array.dtype], "shape": list(array.shape)}


def _infer_path(workload: Workload) -> str:
    return f"/v2/models/{workload.name}/infer"


def post(path: str, body: bytes, header: str = "", content_type: str = "application/json") -> bytes:
    """Return a complete request.

    Args:
        path: Where it goes.
        body: Its body.
        header: Further header lines, each with its line end.
        content_type: Of the body.
    """
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
    return f"{head}{header}Content-Length: {len(body)}\r\n\r\n".encode() + body
