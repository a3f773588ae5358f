"""MLServer: adaptive batching in one process, whose threads run the sessions. Open Inference Protocol, JSON only.

Worker processes (``parallel_workers``) would pickle every tensor twice, and JSON is read in the main process anyway.
"""

import asyncio
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from mlserver import MLModel
from mlserver.cli import main as mlserver
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.serving.peers.setup import open_session, outputs_of, read_setup


class Tensors(MLModel):
    """Runs a session per thread."""

    async def load(self) -> bool:
        setup = read_setup()
        self._session = open_session(setup.model, setup.threads)
        self._outputs = outputs_of(self._session)
        self._threads = ThreadPoolExecutor(setup.instances)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {entry.name: NumpyCodec.decode_input(entry) for entry in payload.inputs}
        arrays = await asyncio.get_running_loop().run_in_executor(self._threads, self._session.run, None, feed)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def free_port() -> int:
    """Return a TCP port that nothing uses now; the command cannot go without gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def main() -> None:
    """Write the settings that the command reads, and run it."""
    setup = read_setup()
    server = {
        "host": "127.0.0.1",
        "http_port": setup.port,
        "grpc_port": free_port(),
        "debug": False,
        "parallel_workers": 0,
        "metrics_endpoint": None,
        "gzip_enabled": False,
    }
    model = {
        "name": setup.name,
        "implementation": "benchmarks.serving.peers.mlserver_server.Tensors",
        "max_batch_size": setup.max_rows,
        "max_batch_time": setup.window_ms / 1e3,
    }
    (setup.workspace / "settings.json").write_text(json.dumps(server), encoding="utf-8")
    (setup.workspace / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    sys.argv = ["mlserver", "start", setup.folder]
    mlserver()


if __name__ == "__main__":
    main()
