"""What one writes without an inference server: a FastAPI handler with a pydantic body that calls a session.

Measured beside Slipstream, with the same model file, the same session options and the same uvicorn settings.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model

from server.artifact import SessionOptions
from server.providers import Device, open_ort_session


def create_app(model: Path, options: SessionOptions) -> FastAPI:
    """Return an app with ``POST /predict``: the nested lists of each input in, those of each output out."""
    session = open_ort_session(model, Device("cpu"), options)
    kinds = {"tensor(float)": (np.float32, float), "tensor(int64)": (np.int64, int), "tensor(int32)": (np.int32, int)}
    dtypes = {node.name: kinds[node.type][0] for node in session.get_inputs()}
    fields = {node.name: (nested(kinds[node.type][1], len(node.shape)), ...) for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    body_type: type[BaseModel] = create_model("Body", **fields)  # type: ignore[call-overload]
    app = FastAPI()

    @app.post("/predict")
    def predict(body: body_type) -> dict[str, list[Any]]:  # type: ignore[valid-type]
        feed = {name: np.array(getattr(body, name), dtype) for name, dtype in dtypes.items()}
        return {name: array.tolist() for name, array in zip(outputs, session.run(None, feed), strict=True)}

    return app


def nested(kind: type, depth: int) -> Any:
    """Return the type of lists of lists of a kind, so many deep."""
    return list[nested(kind, depth - 1)] if depth else kind  # type: ignore[misc]


def main() -> None:
    """Serve until killed; arguments: model file, port, session options as JSON."""
    model, port, options = sys.argv[1:]
    app = create_app(Path(model), msgspec.json.decode(options, type=SessionOptions))
    uvicorn.run(app, port=int(port), loop="uvloop", http="httptools", ws="none", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
