"""What each server is asked with, and how its answers are read."""

import json

import numpy as np
import pytest

from benchmarks.generator import SeenAnswer
from benchmarks.serving.dialects import (
    PROTOCOL_BINARY,
    PROTOCOL_JSON,
    bytes_request,
    read_bytes,
    read_stacked,
    stacked_request,
    with_deadline,
)
from benchmarks.workloads import Workload, check_answers, save_tiny
from server.wire import decode

ROW = {"a": np.array([[1, 2]], np.int64), "b": np.array([[3, 4]], np.int64)}
EXPECTED = {"y": np.array([[0.5, 1.5]], np.float32), "z": np.array([[[2.5], [3.5]]], np.float32)}


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return save_tiny(tmp_path_factory.mktemp("models"))


def body_of(request: bytes) -> tuple[bytes, bytes]:
    head, body = request.split(b"\r\n\r\n", 1)
    assert b"Content-Length: %d" % len(body) in head
    return head, body


def test_stacked_inputs_lie_side_by_side(workload: Workload) -> None:
    _, body = body_of(stacked_request(workload, ROW))
    assert json.loads(body) == {"rows": [[[1, 2], [3, 4]]]}
    answer = SeenAnswer(0, 200, None, b"[[0.5, 1.5, 2.5, 3.5]]", 1)
    assert read_stacked(answer, EXPECTED).tolist() == [0.5, 1.5, 2.5, 3.5]


def test_bytes_follow_each_other(workload: Workload) -> None:
    head, body = body_of(bytes_request(workload, ROW))
    assert b"Content-Type: application/octet-stream" in head
    assert np.frombuffer(body, np.int64).tolist() == [1, 2, 3, 4]
    answered = b"".join(array.tobytes() for array in EXPECTED.values())
    assert read_bytes(SeenAnswer(0, 200, None, answered, 1), EXPECTED).tolist() == [0.5, 1.5, 2.5, 3.5]


def test_too_many_bytes_are_no_answer() -> None:
    with pytest.raises(ValueError, match="17 bytes were answered"):
        read_bytes(SeenAnswer(0, 200, None, bytes(17), 1), EXPECTED)


def test_answers_are_compared_whatever_their_form(workload: Workload) -> None:
    bodies = [workload.expected[row]["y"].tobytes() for row in (0, 2)]
    answers = [SeenAnswer(request, 200, None, body, 3) for request, body in enumerate(bodies)]
    check = check_answers(answers, workload.expected, read_bytes)
    assert (check.failed, check.wrong) == (0, 3)


def test_deadline_goes_into_the_header(workload: Workload) -> None:
    request = with_deadline(PROTOCOL_BINARY.request, "header", 50.0)(workload, workload.rows[0])
    head, _ = body_of(request)
    assert b"slipstream-timeout-ms: 50" in head.split(b"\r\n")


@pytest.mark.parametrize("dialect", [PROTOCOL_JSON, PROTOCOL_BINARY], ids=["json", "binary"])
def test_deadline_goes_into_the_parameter_in_microseconds(workload: Workload, dialect) -> None:
    row = workload.rows[1]
    head, body = body_of(with_deadline(dialect.request, "parameter", 50.0)(workload, row))
    length = [line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"Inference-Header")]
    request = decode(body, int(length[0]) if length else None).request
    assert request.timeout_s == pytest.approx(0.05)
    np.testing.assert_array_equal(request.inputs["x"], row["x"])


def test_servers_without_deadlines_get_the_same_requests(workload: Workload) -> None:
    row = workload.rows[0]
    assert with_deadline(PROTOCOL_JSON.request, "setup", 50.0)(workload, row) == PROTOCOL_JSON.request(workload, row)
