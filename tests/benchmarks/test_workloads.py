"""Requests and the check of the answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generator import SeenAnswer
from benchmarks.raw import batches_of
from benchmarks.workloads import (
    Workload,
    binary_request,
    check_answers,
    json_request,
    plain_request,
    read_answer,
    read_rows,
    save_tiny,
    save_wide,
)
from server.tensors import InferResponse
from server.wire import decode, encode


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return save_tiny(tmp_path_factory.mktemp("models"))


def split(request: bytes) -> tuple[dict[str, str], bytes]:
    head, body = request.split(b"\r\n\r\n", 1)
    return dict(line.split(": ") for line in head.decode().split("\r\n")[1:]), body


def test_all_kinds_of_requests_carry_the_same_row(workload: Workload) -> None:
    row = workload.rows[3]
    for request in (json_request(workload, row), binary_request(workload, row)):
        headers, body = split(request)
        assert int(headers["Content-Length"]) == len(body)
        length = headers.get("Inference-Header-Content-Length")
        decoded = decode(body, int(length) if length else None, None)
        np.testing.assert_array_equal(decoded.request.inputs["x"], row["x"])
        assert decoded.reply.binary == (length is not None)
    _, body = split(plain_request(row))
    np.testing.assert_array_equal(np.array(json.loads(body)["x"], np.float32), row["x"])


def seen(workload: Workload, row: int, kind: str, *, request: int | None = None, status: int = 200) -> SeenAnswer:
    """What a server would answer with the expected outputs of one row."""
    outputs = workload.expected[row]
    index = row if request is None else request
    if kind == "plain":
        body = json.dumps({name: array.tolist() for name, array in outputs.items()}).encode()
        return SeenAnswer(index, status, None, body, 5)
    make = json_request if kind == "json" else binary_request
    headers, body = split(make(workload, workload.rows[row]))
    length = headers.get("Inference-Header-Content-Length")
    reply = decode(body, int(length) if length else None, None).reply
    encoded = encode(InferResponse("tiny", "1", "", outputs, "v", "cpu", 1, 0.0, 0.0), reply)
    return SeenAnswer(index, status, encoded.json_length, b"".join(encoded.parts), 5)


@pytest.mark.parametrize("kind", ["json", "binary", "plain"])
def test_answers_of_every_kind_are_read(workload: Workload, kind: str) -> None:
    found = read_answer(seen(workload, 2, kind))
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], workload.expected[2]["y"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["json", "binary", "plain"])
def test_answer_of_another_row_is_wrong(workload: Workload, kind: str) -> None:
    answers = [seen(workload, 2, kind), seen(workload, 3, kind, request=4)]
    check = check_answers(answers, workload.expected)
    assert (check.failed, check.wrong) == (0, 5)
    assert check.worst_error > 0.1


def test_right_answers_are_right(workload: Workload) -> None:
    check = check_answers([seen(workload, i, "json") for i in range(5)], workload.expected)
    assert (check.failed, check.wrong) == (0, 0)
    assert check.worst_error < 1e-6


def test_errors_are_counted_and_not_read(workload: Workload) -> None:
    check = check_answers([SeenAnswer(0, 429, None, b"no JSON", 7)], workload.expected)
    assert (check.failed, check.wrong, check.worst_error) == (7, 0, 0.0)


def test_rows_are_read_from_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", a=np.arange(20).reshape(10, 2), b=np.arange(10.0))
    rows = read_rows(tmp_path / "data.npz", 3)
    assert len(rows) == 3
    assert rows[2]["a"].tolist() == [[4, 5]]
    assert rows[2]["b"].tolist() == [2.0]


def test_wide_model_takes_a_picture_of_numbers(tmp_path: Path) -> None:
    workload = save_wide(tmp_path)
    (row,) = {row["x"].shape for row in workload.rows}
    assert row == (1, 12_288)
    means = workload.rows[0]["x"].reshape(16, 768).mean(axis=1)
    np.testing.assert_allclose(workload.expected[0]["y"][0], means, rtol=1e-4, atol=1e-6)


def test_batches_are_full_and_hold_every_row() -> None:
    batches = batches_of([{"x": np.array([[i]])} for i in range(5)], 4)
    assert [batch["x"].ravel().tolist() for batch in batches] == [[0, 1, 2, 3], [4, 0, 1, 2]]
