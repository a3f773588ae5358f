"""One repository and one server process for the tests that leave both as they are."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from server.artifact import LatencyTable
from tests import models
from tests.artifacts import write_artifact, write_plain
from tests.end_to_end.process import Server

FLOAT = TensorProto.FLOAT
SIZE, DEPTH = 512, 10


def save_slow(path: Path) -> Path:
    """x FP32 [batch,1] -> y FP32 [batch,1] through ten products of 512 x 512 matrices: tens of milliseconds a row."""
    rng = np.random.default_rng(0)
    weights = {
        "grow": rng.standard_normal((SIZE, SIZE)).astype(np.float32),
        "w": (rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)).astype(np.float32),
        "column": np.array([-1, 1, 1], np.int64),
        "row": np.array([-1, 1], np.int64),
    }
    nodes = [helper.make_node("Reshape", ["x", "column"], ["x3"]), helper.make_node("Mul", ["x3", "grow"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "w"], [f"h{i + 1}"]) for i in range(DEPTH)]
    nodes += [
        helper.make_node("ReduceMean", [f"h{DEPTH}"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Reshape", ["mean", "row"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", 1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def latency(milliseconds: float) -> LatencyTable:
    """A table with one entry."""
    return LatencyTable((1,), *[(milliseconds,)] * 4)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlp (versions 1 and 2, each in two variants), two_inputs (plain), strings (plain)."""
    files, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("models")
    for version in ("1", "2"):
        mlp = models.save_mlp(files / f"mlp{version}.onnx", seed=int(version))
        write_artifact(root, "mlp", version, {"first": mlp, "second": mlp})
    write_plain(root, "two_inputs", "1", models.save_two_inputs(files / "two.onnx"))
    write_plain(root, "strings", "1", models.save_strings(files / "strings.onnx"))
    return root


@pytest.fixture(scope="session")
def slow_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """slow (its latency table says 20 ms) and hasty (the same model, whose table says 1 ms), one row at a time."""
    files, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("slow")
    slow = save_slow(files / "slow.onnx")
    for name, milliseconds in (("slow", 20.0), ("hasty", 1.0)):
        write_artifact(
            root, name, "1", {"fp32": slow}, latency={"fp32": latency(milliseconds)}, batchable=False, golden_rows=1
        )
    return root


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    """A server that tests share; its body limit is 1 MB, and it serves two versions of a model."""
    with Server(repository, "--max-body-bytes", "1000000", "--keep-versions", "2") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
