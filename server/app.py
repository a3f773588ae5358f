"""The routes and the lifespan of the server as an ASGI application, and its one error form."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server.cache import ResponseCache
from server.control import add_control_routes
from server.errors import Draining, LaneDown, ModelNotReady, RequestError, SlipstreamError, StartupError
from server.http import (
    RETRY_UNAVAILABLE_S,
    Answer,
    answer_of,
    error_answer,
    internal_error,
    method_not_allowed,
    not_found,
)
from server.infer import InferBranch, infer_target
from server.metrics import Metrics
from server.openapi import infer_paths
from server.pages import Console, wants_page
from server.repository import Repository
from server.settings import Settings

logger = logging.getLogger(__name__)

# Only what works: clients act on this list.
EXTENSIONS = ("binary_tensor_data", "model_repository")
PLATFORM = "onnxruntime_onnx"


def create_app(settings: Settings, repository: Repository, metrics: Metrics) -> "Application":
    """Make the application; its lifespan opens the repository in the background and closes it at the end."""
    return Application(settings, repository, metrics)


class Application(FastAPI):
    """FastAPI for everything but the infer paths, which branch off ahead of its router.

    Attributes:
        repository: The models.
        opening: The task that opens the repository; ``None`` before the lifespan starts.
        draining: Set it when the server is about to stop: ``ready`` then answers 503 while requests are still served.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        super().__init__(
            title=settings.server_name,
            version=server_version(),
            description="Open Inference Protocol v2 over HTTP, with JSON and binary tensors.",
            lifespan=self._lifespan,
            redirect_slashes=False,
            redoc_url=None,
        )
        self.settings, self.repository, self.metrics = settings, repository, metrics
        self.opening: asyncio.Task[None] | None = None
        self.draining = False
        self.cache = (
            ResponseCache(settings.cache_bytes, settings.default_timeout_s, metrics) if settings.cache_bytes else None
        )
        if self.cache is not None:
            repository.on_left = self.cache.forget
        self.infer = InferBranch(repository, metrics, settings, self.cache)
        self._console = Console(repository, settings.repository) if settings.console else None
        self._add_routes()
        for kind in (SlipstreamError, HTTPException, RequestValidationError, Exception):
            self.add_exception_handler(kind, _on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope."""
        if scope["type"] == "http" and (target := infer_target(scope["path"])):
            await self.infer(scope, receive, send, *target)
        else:
            await super().__call__(scope, receive, send)

    def listens_on(self, url: str, fail: Callable[[BaseException], None]) -> None:
        """Log where connections are accepted, and then what opening the repository came to.

        Args:
            url: Where.
            fail: Called with the reason if there is nothing to serve.
        """
        logger.info("listening on %s, loading models from %s", url, self.settings.repository)
        if self.opening is not None:
            self.opening.add_done_callback(functools.partial(self._opened, url, fail))

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document: FastAPI's routes, and the infer paths with examples for the models now ready."""
        document = super().openapi()
        return {**document, "paths": {**infer_paths(self.repository), **document["paths"]}}

    def _opened(self, url: str, fail: Callable[[BaseException], None], opening: asyncio.Task[None]) -> None:
        if opening.cancelled():
            return
        served = served_models(self.repository)
        failed = [f"{name}/{version}: {reason}" for (name, version), reason in self.repository.failures.items()]
        if (error := opening.exception()) is not None:
            fail(error)
        elif not served:
            reasons = "; ".join(failed) or "it holds no <name>/<version>/ with a manifest.json or model.onnx"
            fail(StartupError(f"no model of {self.settings.repository} can be served: {reasons}"))
        elif not self.repository.ready:
            logger.warning("not ready, though serving %s on %s; failed: %s", served, url, "; ".join(failed))
        else:
            logger.info("ready: serving %s on %s, API page %s/docs", ", ".join(served), url, url)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.opening = asyncio.create_task(self.repository.open())
        try:
            yield
        finally:
            self.opening.cancel()
            await asyncio.wait({self.opening})
            await self.repository.stop()
            if not self.draining:  # else whoever set it has waited for the requests already
                await self.repository.drain()
            self.repository.close()
            await asyncio.to_thread(self.infer.close)

    def _add_routes(self) -> None:
        for path, endpoint, summary in (
            ("/", self._index, "Where to go from here"),
            ("/v2", self._server_metadata, "Server name, version and protocol extensions"),
            ("/v2/health/live", self._live, "Whether the process answers"),
            ("/v2/health/ready", self._ready, "Whether every model is ready and the server is not stopping"),
            ("/v2/models/{name}", self._model, "Inputs, outputs and versions of a model"),
            ("/v2/models/{name}/versions/{version}", self._model_version, "Inputs and outputs of a version"),
            ("/v2/models/{name}/shapes", self._shapes, "Shapes of the requests that a model got"),
            ("/v2/models/{name}/ready", self._model_ready, "Whether a model is ready"),
            ("/v2/models/{name}/versions/{version}/ready", self._version_ready, "Whether a version is ready"),
            ("/metrics", self._metrics, "Metrics in Prometheus' text format"),
        ):
            self.add_api_route(path, endpoint, summary=summary, response_class=Response)
        add_control_routes(self, self.repository, self.settings.model_control)
        if self._console is not None:
            self._console.add_routes(self)
        self.add_api_route("/v2/", self._server_metadata, response_class=Response, include_in_schema=False)

    async def _index(self, request: Request) -> Response:
        if self._console is not None and wants_page(request):
            return self._console.page(request)
        return _json({"name": self.settings.server_name, "docs": "/docs", "metadata": "/v2", "metrics": "/metrics"})

    async def _server_metadata(self) -> Response:
        return _json({"name": self.settings.server_name, "version": self.version, "extensions": EXTENSIONS})

    async def _live(self) -> Response:
        return _json({"live": True})

    async def _ready(self) -> Response:
        if self.draining:
            return _not_ready({"ready": False, "error": "the server is stopping", "code": Draining.code})
        failures = self.repository.failures
        reasons = {f"{name}/{version}": reason for (name, version), reason in failures.items()}
        down = {f"{name}/{version}": lanes for (name, version), lanes in self.repository.lanes_down.items()}
        unused = self.repository.unused_devices
        failing = {**({"lanes_down": down} if down else {}), **({"unused_devices": unused} if unused else {})}
        if self.repository.ready:
            return _json({"ready": True, **({"models": reasons} if reasons else {}), **failing})
        if down:
            error, code = "the lanes of a model fail", LaneDown.code
        elif failures:
            error, code = f"{len(failures)} of the models failed to load", ModelNotReady.code
        else:
            error, code = "models are loading", ModelNotReady.code
        return _not_ready({"ready": False, "error": error, "code": code, "models": reasons, **failing})

    async def _model(self, name: str) -> Response:
        return self._metadata_of(name, "")

    async def _model_version(self, name: str, version: str) -> Response:
        return self._metadata_of(name, version)

    async def _shapes(self, name: str) -> Response:
        model = self.repository.get(name)
        return _json({"name": name, "version": model.version, "shapes": model.shapes()})

    async def _model_ready(self, name: str) -> Response:
        return self._readiness_of(name, "")

    async def _version_ready(self, name: str, version: str) -> Response:
        return self._readiness_of(name, version)

    async def _metrics(self, request: Request) -> Response:
        text, media_type = self.metrics.render(request.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    def _metadata_of(self, name: str, version: str) -> Response:
        model = self.repository.get(name, version)
        return _json(
            {"name": name, "versions": self.repository.versions(name), "platform": PLATFORM, **model.metadata()}
        )

    def _readiness_of(self, name: str, version: str) -> Response:
        try:
            self.repository.get(name, version)
        except ModelNotReady as exc:
            return _not_ready({"name": name, "ready": False, "error": str(exc), "code": exc.code})
        return _json({"name": name, "ready": True})


def served_models(repository: Repository) -> list[str]:
    """Return the names of the models that take requests now."""
    names = []
    for name in repository.names():
        with contextlib.suppress(SlipstreamError):
            repository.get(name)
            names.append(name)
    return names


def server_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("slipstream-server")
    except PackageNotFoundError:
        return "unknown"


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _not_ready(body: dict[str, Any]) -> Response:
    response = _json(body, 503)
    response.headers["retry-after"] = str(RETRY_UNAVAILABLE_S)
    return response


async def _on_error(request: Request, error: Exception) -> Response:
    answer = _answer_to(request, error)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers}
    return Response(b"".join(answer.parts), answer.status, headers)


def _answer_to(request: Request, error: Exception) -> Answer:
    if isinstance(error, SlipstreamError):
        return answer_of(error)
    if isinstance(error, RequestValidationError):
        return error_answer(RequestError.status, RequestError.code, str(error))
    if not isinstance(error, HTTPException):
        # It is raised again after this answer, and uvicorn logs it.
        return internal_error()
    if error.status_code == 405:
        return method_not_allowed((error.headers or {}).get("Allow", "GET"))
    if error.status_code == 404:
        return not_found(request.url.path)
    return error_answer(error.status_code, RequestError.code, str(error.detail))
