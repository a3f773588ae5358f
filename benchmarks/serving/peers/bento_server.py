"""BentoML: a worker process per session, batches. JSON; a batched method takes one array, so inputs are stacked.

``max_latency_ms`` is no window but a bound: predicted to be later, requests are refused with 503.
"""

import sys
from typing import Any

import bentoml
import numpy as np
from bentoml_cli.cli import cli

from benchmarks.serving.peers.setup import inputs_of, open_session, read_setup

SETUP = read_setup()
PATIENT_MS = 60_000


@bentoml.service(
    workers=SETUP.instances,
    threads=1,
    traffic={"timeout": 60},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Tensors:
    """``{"rows": [rows, inputs, ...]}`` in, the outputs of each row side by side out."""

    def __init__(self) -> None:
        self._session = open_session(SETUP.model, SETUP.threads)
        self._inputs = inputs_of(self._session)

    @bentoml.api(
        route="/predict",
        batchable=True,
        max_batch_size=SETUP.max_rows,
        max_latency_ms=int(SETUP.deadline_ms) or PATIENT_MS,
    )
    def predict(self, rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        feed: dict[str, Any] = {
            name: np.ascontiguousarray(rows[:, i], dtype) for i, (name, dtype) in enumerate(self._inputs.items())
        }
        return np.concatenate([array.reshape(len(rows), -1) for array in self._session.run(None, feed)], axis=1)


def main() -> None:
    """Run the command that serves this module."""
    sys.argv = ["bentoml", "serve", f"{__spec__.name}:Tensors", "--port", str(SETUP.port), "--host", "127.0.0.1"]
    cli()


if __name__ == "__main__":
    main()
