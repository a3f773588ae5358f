"""What the HTTP layer needs of what it serves, be that in the same process or behind a channel in another one."""

import asyncio
from typing import Any, Literal, Protocol, TypeVar

from server.tensors import InferRequest, InferResponse, Signature

How = Literal["hit", "shared", "miss"]
"""Where a response came from: kept before, a run that an identical request had begun, a run of its own."""


class Model(Protocol):
    """One model version; ``server.model.Model`` or a model of the engine process."""

    @property
    def name(self) -> str:
        """Name under which it is served."""

    @property
    def version(self) -> str:
        """Its version, a number in decimal."""

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""

    def begin(self, request: InferRequest) -> "asyncio.Future[Any] | None":
        """Run one request; cancelling the future drops it if it has not begun to run.

        Returns:
            What ``finish`` makes a response of; ``None`` if it cannot be begun without waiting: then call ``infer``.

        Raises:
            SlipstreamError: If it is refused.
        """

    def finish(self, request: InferRequest, outcome: Any) -> tuple[InferResponse, How]:
        """Make the response to a request of what its future gave, and say where it came from."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one request; cancelling the call drops it if it has not begun to run."""


ModelT_co = TypeVar("ModelT_co", bound=Model, covariant=True)
ModelT_contra = TypeVar("ModelT_contra", bound=Model, contravariant=True)


class Models(Protocol[ModelT_co]):
    """Models by name and version."""

    def find(self, name: str, version: str = "") -> ModelT_co | None:
        """Return a model that takes requests, if it is at hand; without a version, the default one."""

    def get(self, name: str, version: str = "") -> ModelT_co:
        """Return a model that takes requests; without a version, the default one.

        Raises:
            UnknownModel: If there is no such name or version.
            ModelNotReady: If it takes no requests now.
        """


class Cache(Protocol[ModelT_contra]):
    """Answers for models, with what it has kept if it can."""

    async def infer(self, model: ModelT_contra, request: InferRequest) -> tuple[InferResponse, How]:
        """Answer one request, and say where the answer came from."""


class RequestCounter(Protocol):
    """Counts the requests of one model version."""

    def request_finished(self, code: str, seconds: float, trace_id: str = "") -> None:
        """Count one answer: ``ok`` or an error's code, its time since arrival, and its trace if it has one."""


class RequestCounters(Protocol):
    """Makes the counters of models."""

    def of_model(self, name: str, version: str) -> RequestCounter:
        """Return a counter for a model version."""
