"""Ray Serve: a replica per core, batches. It hands over the body as it came, so tensors may come as bytes."""

import signal
from typing import Any

import numpy as np
import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.serving.peers.setup import inputs_of, open_session, outputs_of, read_setup

BATCHES_IN_FLIGHT = 2
OBJECT_STORE_BYTES = 256 * 1024 * 1024
QUEUE_BATCHES = 8
"""What waits at most where answers have a deadline; more is refused with 503."""

Arrays = dict[str, Any]
SETUP = read_setup()


@serve.deployment(
    num_replicas=SETUP.instances,
    max_ongoing_requests=SETUP.max_rows * BATCHES_IN_FLIGHT,
    max_queued_requests=SETUP.max_rows * QUEUE_BATCHES if SETUP.deadline_ms else -1,
    ray_actor_options={"num_cpus": 1},
)
class Tensors:
    """JSON as lists by input, or the inputs' bytes one after another; the answer is of the same kind."""

    def __init__(self) -> None:
        self._session = open_session(SETUP.model, SETUP.threads)
        self._inputs, self._outputs = inputs_of(self._session), outputs_of(self._session)
        self._shapes = {node.name: node.shape[1:] for node in self._session.get_inputs()}

    @serve.batch(max_batch_size=SETUP.max_rows, batch_wait_timeout_s=SETUP.window_ms / 1e3)
    async def run(self, rows: list[Arrays]) -> list[list[Any]]:
        batch = {name: np.concatenate([row[name] for row in rows]) for name in self._inputs}
        arrays = self._session.run(None, batch)
        return [[array[i : i + 1] for array in arrays] for i in range(len(rows))]

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        if request.headers["content-type"] != "application/octet-stream":
            lists = orjson.loads(body)
            row = {name: np.asarray(lists[name], dtype) for name, dtype in self._inputs.items()}
            answer = dict(zip(self._outputs, await self.run(row), strict=True))
            return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
        arrays = await self.run(self._row_of(body))
        return Response(b"".join(array.tobytes() for array in arrays), media_type="application/octet-stream")

    def _row_of(self, body: bytes) -> Arrays:
        """Part a body; an open axis of the model is as long as its share of the body."""
        row, offset = {}, 0
        share = len(body) // len(self._inputs)
        for name, dtype in self._inputs.items():
            known = [size if isinstance(size, int) else -1 for size in self._shapes[name]]
            row[name] = np.frombuffer(body[offset : offset + share], dtype).reshape(1, *known)
            offset += share
        return row


def main() -> None:
    """Serve until killed."""
    ray.init(
        num_cpus=SETUP.instances + 1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        _temp_dir=SETUP.folder,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": SETUP.port})
    serve.run(Tensors.bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()


if __name__ == "__main__":
    main()
