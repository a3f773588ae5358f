"""One server with a quick model, one of two inputs, and a slow one."""

from collections.abc import Iterator

import pytest

from tests import models
from tests.artifacts import write_plain
from tests.end_to_end.conftest import save_slow
from tests.end_to_end.process import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """mlp, two_inputs and slow, each as it is."""
    files, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("models")
    write_plain(root, "mlp", "1", models.save_mlp(files / "mlp.onnx"))
    write_plain(root, "two_inputs", "1", models.save_two_inputs(files / "two.onnx"))
    write_plain(root, "slow", "1", save_slow(files / "slow.onnx"))
    with Server(root) as running:
        yield running
