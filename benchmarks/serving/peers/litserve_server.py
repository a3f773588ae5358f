"""LitServe: one worker process per core, batches, ZeroMQ between the processes. JSON is all that it takes."""

from typing import Any

import litserve
import numpy as np

from benchmarks.serving.peers.setup import Setup, inputs_of, open_session, outputs_of, read_setup

DEFAULT_TIMEOUT_S = 30.0
Arrays = dict[str, Any]


class Tensors(litserve.LitAPI):
    """Lists in, lists out, each with a batch axis."""

    def __init__(self, told: Setup) -> None:
        super().__init__(max_batch_size=told.max_rows, batch_timeout=told.window_ms / 1e3)
        self._told = told

    def setup(self, device: str) -> None:  # noqa: ARG002  (the interface)
        self._session = open_session(self._told.model, self._told.threads)
        self._inputs, self._outputs = inputs_of(self._session), outputs_of(self._session)

    def decode_request(self, request: dict[str, Any]) -> Arrays:
        return {name: np.asarray(request[name], dtype) for name, dtype in self._inputs.items()}

    def batch(self, inputs: list[Arrays]) -> Arrays:
        return {name: np.concatenate([row[name] for row in inputs]) for name in self._inputs}

    def predict(self, batch: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(None, batch), strict=True))

    def unbatch(self, output: Arrays) -> list[Arrays]:
        rows = len(output[self._outputs[0]])
        return [{name: array[i : i + 1] for name, array in output.items()} for i in range(rows)]

    def encode_response(self, output: Arrays) -> dict[str, Any]:
        return {name: array.tolist() for name, array in output.items()}


def main() -> None:
    """Serve until killed."""
    setup = read_setup()
    server = litserve.LitServer(
        Tensors(setup),
        accelerator="cpu",
        devices=1,
        workers_per_device=setup.instances,
        timeout=setup.deadline_ms / 1e3 or DEFAULT_TIMEOUT_S,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=setup.port, log_level="warning", access_log=False, generate_client_file=False)


if __name__ == "__main__":
    main()
