"""What a peer is told, and how it opens the model. Needs only numpy and onnxruntime."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

VARIABLE = "PEER_SETUP"
"""Environment variable with a ``Setup`` as JSON: the only thing that reaches every process of every peer."""

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


@dataclass(frozen=True)
class Setup:
    """What to serve, and how.

    Attributes:
        model: The ONNX file.
        name: Under which it is served.
        port: TCP port on 127.0.0.1.
        folder: An empty folder for what the server writes.
        instances: Sessions, in workers, replicas or threads.
        threads: Threads of each session.
        window_ms: How long a batch may wait to be filled.
        max_rows: Most rows of a batch.
        deadline_ms: What answers are worth waiting for, for a server that is told so; 0 if nothing is to be refused.
    """

    model: str
    name: str
    port: int
    folder: str
    instances: int
    threads: int
    window_ms: float
    max_rows: int
    deadline_ms: float

    @property
    def workspace(self) -> Path:
        """``folder`` as a path."""
        return Path(self.folder)


def read_setup() -> Setup:
    """Read the setup of this process."""
    return Setup(**json.loads(os.environ[VARIABLE]))


def open_session(model: str, threads: int) -> onnxruntime.InferenceSession:
    """Open a session whose threads do not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs_of(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return input -> numpy's type, in the model's order."""
    return {node.name: DTYPES[node.type] for node in session.get_inputs()}


def outputs_of(session: onnxruntime.InferenceSession) -> list[str]:
    """Return the names of the outputs, in the model's order."""
    return [node.name for node in session.get_outputs()]
