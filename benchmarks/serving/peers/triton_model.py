"""The model of ``triton_server``, run by Triton's Python backend; it is copied into Triton's repository, alone."""

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Runs one session; Triton has made the batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        told = {key: entry["string_value"] for key, entry in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(told["threads"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(told["model"], options, providers=["CPUExecutionProvider"])
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        rows = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        batch = {name: np.concatenate([row[name] for row in rows]) for name in self._inputs}
        arrays = self._session.run(None, batch)
        answers, start = [], 0
        for row in rows:
            stop = start + len(row[self._inputs[0]])
            tensors = [
                triton.Tensor(name, array[start:stop]) for name, array in zip(self._outputs, arrays, strict=True)
            ]
            answers.append(triton.InferenceResponse(tensors))
            start = stop
        return answers
