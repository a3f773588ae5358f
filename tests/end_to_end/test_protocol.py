"""The protocol as raw bytes over HTTP: what works, what is refused, and in what words."""

import gzip
import http.client
import json
import socket
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest

from tests.end_to_end.process import Server

X = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)


def tensor(array: np.ndarray = X, name: str = "x", **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist(), **fields}


def binary_message(array: np.ndarray = X, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a binary request for a binary answer."""
    entry = {"name": "x", "shape": list(array.shape), "datatype": "FP32"}
    head = {
        "inputs": [{**entry, "parameters": {"binary_data_size": array.nbytes}}],
        "parameters": {"binary_data_output": True},
        **fields,
    }
    text = json.dumps(head).encode()
    return text + array.tobytes(), {"Inference-Header-Content-Length": str(len(text))}


def expected(repository: Path, version: str = "2", array: np.ndarray = X) -> np.ndarray:
    file = repository / "mlp" / version / "first" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": array})[0])


def assert_error(answer: httpx.Response, status: int, code: str, *texts: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error", "code"}
    assert body["code"] == code, body
    for text in texts:
        assert text in body["error"], body


def test_json_request_gets_a_json_answer(client: httpx.Client, repository: Path) -> None:
    answer = client.post("/v2/models/mlp/infer", json={"id": "a-1", "inputs": [tensor()]})
    body = answer.json()
    assert answer.status_code == 200
    assert (body["model_name"], body["model_version"], body["id"]) == ("mlp", "2", "a-1")
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", [3, 10])
    assert "parameters" not in output
    np.testing.assert_allclose(np.array(output["data"]).reshape(3, 10), expected(repository), rtol=1e-5, atol=1e-6)


def test_answer_headers_are_its_account(client: httpx.Client) -> None:
    answer = client.post("/v2/models/mlp/infer", json={"inputs": [tensor()]})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "content-encoding" not in answer.headers
    assert "date" in answer.headers
    assert answer.headers["slipstream-variant"] in ("first", "second")
    assert answer.headers["slipstream-device"] == "cpu"
    assert answer.headers["slipstream-batch-rows"] == "3"
    assert float(answer.headers["slipstream-queue-ms"]) >= 0
    assert float(answer.headers["slipstream-compute-ms"]) > 0


def test_binary_request_gets_a_binary_answer(client: httpx.Client, repository: Path) -> None:
    body, headers = binary_message()
    answer = client.post("/v2/models/mlp/infer", content=body, headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    head = json.loads(answer.content[:length])
    assert head["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [3, 10], "parameters": {"binary_data_size": 120}}
    ]
    outputs = np.frombuffer(answer.content[length:], np.float32).reshape(3, 10)
    np.testing.assert_allclose(outputs, expected(repository), rtol=1e-5, atol=1e-6)


def test_raw_request_is_only_the_tensor(client: httpx.Client, repository: Path) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    answer = client.post("/v2/models/mlp/infer", content=X.tobytes(), headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    outputs = np.frombuffer(answer.content[length:], np.float32).reshape(3, 10)
    np.testing.assert_allclose(outputs, expected(repository), rtol=1e-5, atol=1e-6)


def test_large_request_off_the_loop_gives_the_same_answer(client: httpx.Client, repository: Path) -> None:
    many = np.tile(X, (100, 1))
    answer = client.post("/v2/models/mlp/infer", json={"inputs": [tensor(many)]})
    outputs = np.array(answer.json()["outputs"][0]["data"]).reshape(300, 10)
    np.testing.assert_allclose(outputs, expected(repository, array=many), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_request_gets_a_plain_answer(client: httpx.Client, encoding: str, compress: Any) -> None:
    body, headers = binary_message()
    answer = client.post(
        "/v2/models/mlp/infer", content=compress(body), headers={**headers, "Content-Encoding": encoding}
    )
    assert answer.status_code == 200
    assert "content-encoding" not in answer.headers


def test_version_in_the_path_is_the_one_that_answers(client: httpx.Client, repository: Path) -> None:
    for version in ("1", "2"):
        answer = client.post(f"/v2/models/mlp/versions/{version}/infer", json={"inputs": [tensor()]})
        body = answer.json()
        assert body["model_version"] == version
        outputs = np.array(body["outputs"][0]["data"]).reshape(3, 10)
        np.testing.assert_allclose(outputs, expected(repository, version), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["first", "second"])
def test_pinned_variant_answers(client: httpx.Client, variant: str) -> None:
    request = {"inputs": [tensor()]}
    by_header = client.post("/v2/models/mlp/infer", json=request, headers={"slipstream-variant": variant})
    by_body = client.post("/v2/models/mlp/infer", json={**request, "parameters": {"variant": variant}})
    assert by_header.headers["slipstream-variant"] == by_body.headers["slipstream-variant"] == variant


def test_generous_deadline_is_met(client: httpx.Client) -> None:
    answer = client.post("/v2/models/mlp/infer", json={"inputs": [tensor()], "parameters": {"timeout": 30_000_000}})
    assert answer.status_code == 200


def test_text_goes_in_and_out(client: httpx.Client) -> None:
    text = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["one", "zwei ß"]}
    answer = client.post("/v2/models/strings/infer", json={"inputs": [text]})
    assert answer.json()["outputs"][0]["data"] == ["one", "zwei ß"]


def test_only_wanted_outputs_come_back(client: httpx.Client) -> None:
    array = np.ones((1, 4), np.float32)
    request = {"inputs": [tensor(array, "a"), tensor(array, "b")], "outputs": [{"name": "diff"}]}
    outputs = client.post("/v2/models/two_inputs/infer", json=request).json()["outputs"]
    assert [(output["name"], output["data"]) for output in outputs] == [("diff", [0, 0, 0, 0])]


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (b"", "malformed_request", ""),
        (b"garbage", "malformed_request", "not valid JSON"),
        (b"[1, 2]", "malformed_request", ""),
        (b"{}", "malformed_request", "inputs"),
        (b'{"inputs": [' + b"[" * 10_000, "malformed_request", ""),
        (json.dumps({"inputs": [tensor()]}).encode()[:-5], "malformed_request", ""),
        (json.dumps({"inputs": []}).encode(), "signature_mismatch", "missing input 'x'"),
        (json.dumps({"inputs": [tensor(name="z")]}).encode(), "signature_mismatch", "missing input 'x'"),
        (json.dumps({"inputs": [tensor(), tensor(name="z")]}).encode(), "signature_mismatch", "'z'"),
        (json.dumps({"inputs": [tensor(datatype="INT32", data=[1] * 192)]}).encode(), "signature_mismatch", "FP32"),
        (json.dumps({"inputs": [tensor(datatype="FLOAT")]}).encode(), "malformed_request", "FLOAT"),
        (json.dumps({"inputs": [tensor(data=["a"] * 192)]}).encode(), "malformed_request", "x"),
        (json.dumps({"inputs": [tensor(X[:, :63])]}).encode(), "signature_mismatch", "unexpected shape for input 'x'"),
        (json.dumps({"inputs": [tensor(X[0])]}).encode(), "signature_mismatch", "unexpected shape"),
        (json.dumps({"inputs": [tensor(shape=[3, 65])]}).encode(), "malformed_request", "x"),
        (json.dumps({"inputs": [tensor(shape=[-3, -64])]}).encode(), "malformed_request", "x"),
        (json.dumps({"inputs": [tensor()], "outputs": [{"name": "z"}]}).encode(), "signature_mismatch", "'z'"),
        (json.dumps({"inputs": [tensor()], "parameters": {"variant": "z"}}).encode(), "unknown_variant", "first"),
        (json.dumps({"inputs": [tensor()], "parameters": {"timeout": -1}}).encode(), "malformed_request", "timeout"),
    ],
)
def test_bad_body_is_a_client_error_that_says_what_is_wrong(
    client: httpx.Client, body: bytes, code: str, text: str
) -> None:
    assert_error(client.post("/v2/models/mlp/infer", content=body), 400, code, text)


@pytest.mark.parametrize("length", ["x", "-1", "100000000", "1.5", "12"])
def test_bad_header_length_is_malformed(client: httpx.Client, length: str) -> None:
    body, _ = binary_message()
    answer = client.post("/v2/models/mlp/infer", content=body, headers={"Inference-Header-Content-Length": length})
    assert_error(answer, 400, "malformed_request")


@pytest.mark.parametrize("change", [-4, +4])
def test_binary_body_must_be_exact_to_the_byte(client: httpx.Client, change: int) -> None:
    body, headers = binary_message()
    body = body[:change] if change < 0 else body + b"\0" * change
    assert_error(client.post("/v2/models/mlp/infer", content=body, headers=headers), 400, "malformed_request")


def test_unknown_model_and_version_are_not_found(client: httpx.Client) -> None:
    for path, text in (
        ("ghost/infer", "Request for unknown model: 'ghost' is not found"),
        ("mlp/versions/9/infer", "Request for unknown model: 'mlp' version 9 is not found"),
        ("mlp/versions/x/infer", "Request for unknown model: 'mlp' version x is not found"),
    ):
        assert_error(client.post(f"/v2/models/{path}", json={"inputs": [tensor()]}), 404, "unknown_model", text)


def test_wrong_method_says_which_is_right(client: httpx.Client) -> None:
    answer = client.get("/v2/models/mlp/infer")
    assert_error(answer, 405, "method_not_allowed", "POST")
    assert answer.headers["allow"] == "POST"


def test_unknown_encoding_is_refused(client: httpx.Client) -> None:
    answer = client.post("/v2/models/mlp/infer", content=b"{}", headers={"Content-Encoding": "br"})
    assert_error(answer, 415, "unsupported_encoding", "gzip")


def test_body_over_the_limit_is_refused_and_the_connection_lives_on(client: httpx.Client) -> None:
    large = b"x" * 1_000_001
    assert_error(client.post("/v2/models/mlp/infer", content=large), 413, "body_too_large", "1000000")
    assert client.post("/v2/models/mlp/infer", json={"inputs": [tensor()]}).status_code == 200


def test_chunked_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    chunks = (b"x" * 100_000 for _ in range(11))
    assert_error(client.post("/v2/models/mlp/infer", content=chunks), 413, "body_too_large")


def test_zip_bomb_is_refused(client: httpx.Client) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    answer = client.post("/v2/models/mlp/infer", content=bomb, headers={"Content-Encoding": "gzip"})
    assert_error(answer, 413, "body_too_large", "decompresses")


def test_large_body_is_refused_before_it_is_sent(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\nExpect: 100-continue\r\n\r\n"
        )
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
        assert response.getheader("connection") == "close"
        assert json.loads(response.read())["code"] == "body_too_large"
        response.close()


def test_client_that_waits_for_leave_to_send_gets_it(server: Server) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
            % len(body)
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        response.close()


def test_body_in_chunks_is_one_body(client: httpx.Client) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    answer = client.post("/v2/models/mlp/infer", content=(body[i : i + 100] for i in range(0, len(body), 100)))
    assert answer.status_code == 200


def test_what_is_not_http_gets_the_one_error_form(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS, for example\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.getheader("content-type")) == (400, "application/json")
        assert json.loads(response.read())["code"] == "malformed_request"
        response.close()


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    requests = b""
    for number in range(5):
        body = json.dumps({"id": str(number), "inputs": [tensor()]}).encode()
        requests += b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(requests)
        ids: list[str] = []
        with connection.makefile("rb") as stream:
            while len(ids) < 5:
                line = stream.readline()
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
                if line == b"\r\n":
                    ids.append(json.loads(stream.read(length))["id"])
    assert ids == ["0", "1", "2", "3", "4"]


def test_results_are_counted_by_code(server: Server, client: httpx.Client) -> None:
    before = {code: server.metric("slipstream_requests_total", model="mlp", code=code) for code in CODES}
    client.post("/v2/models/mlp/infer", json={"inputs": [tensor()]})
    client.post("/v2/models/mlp/infer", json={"inputs": []})
    client.post("/v2/models/mlp/infer", content=b"garbage")
    for code in CODES:
        assert server.metric("slipstream_requests_total", model="mlp", code=code) == before[code] + 1
    assert server.metric("slipstream_request_seconds_count", model="mlp", version="2") >= 3
    assert server.metric("slipstream_batch_rows_count", model="mlp") >= 1
    assert server.metric("slipstream_model_ready", model="mlp", version="2") == 1


CODES = ("ok", "signature_mismatch", "malformed_request")


def test_docs_show_examples_that_work(client: httpx.Client) -> None:
    assert "swagger" in client.get("/docs").text
    post = client.get("/openapi.json").json()["paths"]["/v2/models/{name}/infer"]["post"]
    examples = post["requestBody"]["content"]["application/json"]["examples"]
    for name in ("mlp", "two_inputs", "strings"):
        assert client.post(f"/v2/models/{name}/infer", json=examples[name]["value"]).status_code == 200


def test_answers_other_than_infer_are_never_compressed(client: httpx.Client) -> None:
    for path in ("/v2", "/v2/models/mlp", "/metrics", "/openapi.json"):
        answer = client.get(path, headers={"Accept-Encoding": "gzip, deflate"})
        assert "content-encoding" not in answer.headers
