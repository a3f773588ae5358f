"""A model and a repository whose behaviour a test writes down, for tests of the HTTP layer alone."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from server.errors import ModelNotReady, UnknownModel
from server.repository import IndexEntry
from server.serving import How
from server.tensors import InferRequest, InferResponse, Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", ("batch", 4)),), (TensorSpec("y", "FP32", ("batch", 4)),))


async def double(request: InferRequest) -> InferResponse:
    """y = 2 x."""
    return InferResponse(
        "m", "2", request.id, {"y": request.inputs["x"] * np.float32(2)}, "fp32", "cpu", 3, 0.001, 0.02
    )


class FakeModel:
    """A model that answers with ``answer``."""

    def __init__(self, version: str = "2", answer: Callable[[InferRequest], Awaitable[InferResponse]] = double) -> None:
        self.name, self.version, self.signature, self.answer = "m", version, SIGNATURE, answer
        self.requests: list[InferRequest] = []

    def begin(self, request: InferRequest) -> "asyncio.Future[InferResponse] | None":
        return asyncio.ensure_future(self.infer(request))

    def finish(self, request: InferRequest, outcome: InferResponse) -> tuple[InferResponse, How]:
        return outcome, "miss"

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        self.signature.check(request.inputs)
        return await self.answer(request)

    def metadata(self) -> dict[str, Any]:
        return {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        }


class FakeRepository:
    """One model ``m`` in versions 1 and 2, and what fails."""

    def __init__(self) -> None:
        self.models = {version: FakeModel(version) for version in ("1", "2")}
        self.failures: dict[tuple[str, str], str] = {}
        self.lanes_down: dict[tuple[str, str], tuple[str, ...]] = {}
        self.unused_devices: dict[str, str] = {}
        self.ready = True
        self.calls: list[str] = []

    def names(self) -> list[str]:
        return ["m"]

    def versions(self, name: str) -> list[str]:
        return list(self.models)

    def find(self, name: str, version: str = "") -> FakeModel | None:
        try:
            return self.get(name, version)
        except (ModelNotReady, UnknownModel):
            return None

    def get(self, name: str, version: str = "") -> FakeModel:
        if (name, version) in self.failures:
            raise ModelNotReady(f"model '{name}' version {version} failed to load")
        if name != "m":
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        if version and version not in self.models:
            raise UnknownModel(f"Request for unknown model: '{name}' version {version} is not found")
        return self.models[version or "2"]

    async def open(self) -> None:
        self.calls.append("open")

    async def stop(self) -> None:
        self.calls.append("stop")

    def index(self) -> list[IndexEntry]:
        return [IndexEntry("m", "1", "UNAVAILABLE", "rolled back"), IndexEntry("m", "2", "READY", "")]

    async def load(self, name: str) -> None:
        self.get(name)
        self.calls.append(f"load {name}")

    async def unload(self, name: str) -> None:
        self.get(name)
        self.calls.append(f"unload {name}")

    async def rollback(self, name: str) -> str:
        self.get(name)
        self.calls.append(f"rollback {name}")
        return "1"

    async def drain(self) -> bool:
        self.calls.append("drain")
        return True

    def close(self) -> None:
        self.calls.append("close")
