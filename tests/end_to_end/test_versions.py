"""New versions of a model in a running server: swapped under load, controlled by clients, refused, rolled back."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests import models
from tests.artifacts import write_artifact
from tests.end_to_end.process import TIMEOUT_S, Server
from tests.end_to_end.test_shutdown import MLP


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add(tmp_path / "models", "1")
    return tmp_path / "models"


def add(folder: Path, version: str, **fields: object) -> None:
    """Write a version elsewhere, then move it into place, as the optimizer does."""
    model = models.save_mlp(folder.parent / f"{version}.onnx", seed=int(version))
    written = write_artifact(folder.parent / "new", "mlp", version, {"fp32": model}, **fields)
    (folder / "mlp").mkdir(parents=True, exist_ok=True)
    written.rename(folder / "mlp" / version)


@pytest.fixture
def client(folder: Path) -> Iterator[triton.InferenceServerClient]:
    """Triton's client of a server that looks for new versions only when it is told to."""
    with Server(folder, "--watch-interval-s", "0") as server:
        client = triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=TIMEOUT_S)
        yield client
        client.close()


class Sender(threading.Thread):
    """A client that posts one request after the other until it is told to stop.

    Attributes:
        answered: Set with the first answer.
        stopping: Set it to end after the next answer.
        lost: What was answered to requests that did not get 200.
        versions: The versions that answered.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.answered, self.stopping = threading.Event(), threading.Event()
        self.lost, self.versions = list[str](), set[str]()
        self._url = url

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            while not self.stopping.is_set():
                try:
                    answer = client.post("/v2/models/mlp/infer", content=MLP)
                except httpx.HTTPError as exc:
                    self.lost.append(repr(exc))
                    return
                if answer.status_code == 200:
                    self.versions.add(answer.json()["model_version"])
                    self.answered.set()
                else:
                    self.lost.append(answer.text)

    def stop(self) -> None:
        """End it."""
        self.stopping.set()
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "a client hangs"


def test_swaps_under_load_fail_no_request(folder: Path) -> None:
    with Server(folder, "--watch-interval-s", "0.05", "--shutdown-grace-s", "0") as server:
        senders = [Sender(server.url) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            assert sender.answered.wait(TIMEOUT_S)
        for version in ("2", "3", "4"):
            add(folder, version)
            server.wait_for(f"mlp: version {version} serves in place of")
        shutil.rmtree(folder / "mlp/4")
        server.wait_for("mlp/4: drained and closed")
        for sender in senders:
            sender.stop()
        assert [sender.lost for sender in senders if sender.lost] == []
        assert set.union(*(sender.versions for sender in senders)) >= {"1", "3"}
        assert server.metric("slipstream_model_swaps_total", model="mlp", result="swapped") == 3
        server.terminate()
        assert server.wait() == 0
        assert "ERROR" not in server.text


def states(client: triton.InferenceServerClient) -> list[tuple[str, str, str]]:
    return [(entry["name"], entry["version"], entry["state"]) for entry in client.get_model_repository_index()]


def test_triton_client_loads_and_unloads(client: triton.InferenceServerClient, folder: Path) -> None:
    assert "model_repository" in client.get_server_metadata()["extensions"]
    assert states(client) == [("mlp", "1", "READY")]
    add(folder, "2")
    client.load_model("mlp")
    assert client.get_model_metadata("mlp")["versions"] == ["2"]
    assert states(client)[-1] == ("mlp", "2", "READY")
    client.unload_model("mlp")
    assert not client.is_model_ready("mlp")
    assert client.is_server_ready()
    with pytest.raises(InferenceServerException, match="model 'mlp' is not ready") as caught:
        client.get_model_metadata("mlp")
    assert caught.value.status() == "503"
    client.load_model("mlp")
    assert client.is_model_ready("mlp")


def test_triton_client_is_told_why_a_version_does_not_load(client: triton.InferenceServerClient, folder: Path) -> None:
    add(folder, "2", min_sqnr_db=500.0)
    with pytest.raises(
        InferenceServerException, match="failed to load 'mlp': version 2: no variant of mlp/2"
    ) as caught:
        client.load_model("mlp")
    assert caught.value.status() == "500"
    assert ("mlp", "2", "UNAVAILABLE") in states(client)
    assert client.get_model_metadata("mlp")["versions"] == ["1"]
    assert client.is_server_ready()
    with pytest.raises(InferenceServerException, match="this server takes none"):
        client.load_model("mlp", config="{}")
    with pytest.raises(InferenceServerException, match="unknown model: 'ghost'"):
        client.load_model("ghost")


def test_rollback_over_http(folder: Path) -> None:
    add(folder, "2")
    with Server(folder, "--watch-interval-s", "0.05") as server, httpx.Client(base_url=server.url) as client:
        path = "/v2/repository/models/mlp/rollback"
        assert client.post(path).json() == {"name": "mlp", "version": "1"}
        assert client.post("/v2/models/mlp/infer", content=MLP).json()["model_version"] == "1"
        again = client.post(path)
        assert (again.status_code, again.json()["code"]) == (409, "nothing_to_roll_back")
        add(folder, "3")
        server.wait_for("mlp: version 3 serves in place of 1")
        assert client.post("/v2/models/mlp/infer", content=MLP).json()["model_version"] == "3"


def test_version_that_disagrees_is_refused(folder: Path) -> None:
    options = ("--watch-interval-s", "0.05", "--shadow-share", "1", "--shadow-s", "1")
    with Server(folder, *options, "--shadow-max-disagreement", "0.02") as server:
        sender = Sender(server.url)
        sender.start()
        add(folder, "2")
        assert "requests compared" in server.wait_for("mlp/2 refused after the comparison on live requests")
        sender.stop()
        assert sender.lost == []
        assert sender.versions == {"1"}
        assert server.metric("slipstream_shadow_requests_total", model="mlp", version="2", result="differs") > 0
        ready = httpx.get(f"{server.url}/v2/health/ready")
        assert ready.status_code == 200
        assert "refused after the comparison" in ready.json()["models"]["mlp/2"]


def test_sigterm_during_a_comparison_ends_cleanly(folder: Path) -> None:
    options = ("--watch-interval-s", "0.05", "--shadow-share", "1", "--shadow-s", "600", "--shutdown-grace-s", "0")
    with Server(folder, *options) as server:
        add(folder, "2")
        server.wait_for("mlp: comparing version 2")
        server.terminate()
        assert server.wait() == 0
        assert "ERROR" not in server.text
        assert "Traceback" not in server.text
