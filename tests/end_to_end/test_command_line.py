"""``slipstream serve``: what it logs, and how it fails."""

import json
import re
import socket
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.artifacts import write_artifact, write_plain
from tests.end_to_end.process import Server

BODY = {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}]}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A repository whose only model has a damaged file."""
    mlp = models.save_mlp(tmp_path / "mlp.onnx")
    folder = write_artifact(tmp_path / "models", "damaged", "1", {"fp32": mlp})
    with (folder / "fp32" / "model.onnx").open("ab") as file:
        file.write(b"!")
    return tmp_path / "models"


def test_start_is_told_in_one_line_for_each_event(server: Server) -> None:
    messages = [json.loads(line)["message"] for line in server.log]
    for pattern in ("settings: ", "listening on http", "loaded mlp/1: ", "loaded mlp/2: ", "ready: serving mlp, strin"):
        assert len([message for message in messages if pattern in message]) == 1, pattern
    assert all(json.loads(line)["level"] == "INFO" for line in server.log)
    assert not re.search("uvicorn", server.text)


def test_one_bad_model_is_visible_and_the_others_serve(damaged: Path) -> None:
    write_plain(damaged, "good", "1", damaged.parent / "mlp.onnx")
    with Server(damaged) as server:
        ready = httpx.get(f"{server.url}/v2/health/ready")
        assert ready.status_code == 503
        assert ready.json()["code"] == "model_not_ready"
        assert "SHA-256" in ready.json()["models"]["damaged/1"]
        assert httpx.post(f"{server.url}/v2/models/good/infer", json=BODY).status_code == 200
        bad = httpx.post(f"{server.url}/v2/models/damaged/infer", json=BODY)
        assert (bad.status_code, bad.json()["code"]) == (503, "model_not_ready")
        assert int(bad.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/v2/models/damaged/ready").status_code == 503


def assert_fails(server: Server, code: int, text: str) -> None:
    assert server.wait() == code, server.text
    assert "Traceback" not in server.text
    (line,) = [line for line in server.log if line.startswith("Error: ")]
    assert text in line


def test_repository_where_no_model_loads_ends_with_the_reasons(damaged: Path) -> None:
    with Server(damaged, wait=False) as server:
        assert_fails(server, 1, "SHA-256")


def test_repository_without_models_ends_with_what_to_do(tmp_path: Path) -> None:
    with Server(tmp_path, wait=False) as server:
        assert_fails(server, 1, "slipstream optimize")


def test_taken_port_is_one_clear_line(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Server(repository, "--port", port, wait=False) as server:
            assert_fails(server, 1, f"port {port}")


def test_debug_shows_the_traceback(damaged: Path) -> None:
    with Server(damaged, "--debug", wait=False) as server:
        assert server.wait() == 1
        assert "Traceback" in server.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--port", "http"), "'http' is not a valid int"),
        (("--port", "70000"), "70000"),
        (("--gpu", "maybe"), "prefer"),
        (("--colour", "red"), "--colour"),
        (("--max-queue-rows", "0"), "max_queue_rows is 0; allowed: 1 or more"),
    ],
)
def test_wrong_usage_exits_with_2(repository: Path, options: tuple[str, ...], text: str) -> None:
    with Server(repository, *options, wait=False) as server:
        assert server.wait() == 2
        assert text in server.text
        assert "Traceback" not in server.text


def test_missing_repository_is_wrong_usage(tmp_path: Path) -> None:
    with Server(tmp_path / "nowhere", wait=False) as server:
        assert server.wait() == 2
        assert "nowhere is not a folder" in server.text


def test_model_file_is_optimized_once_and_served(tmp_path: Path) -> None:
    model = models.save_mlp(tmp_path / "my model.onnx")
    for _ in range(2):
        with Server(model, folder=tmp_path) as server:
            answer = httpx.post(f"{server.url}/v2/models/my-model/infer", json=BODY)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model_version"] == "1"
            server.terminate()
            assert server.wait() == 0
    (manifest,) = tmp_path.glob(".slipstream/models/*/my-model/*/manifest.json")
    assert manifest.parent.name == "1"  # the second start found the first one's version
