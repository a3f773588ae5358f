"""The protocol's model repository extension, and rollback.

These calls change what is served. By default they are answered for clients of this machine only, and never for pages of
other origins in a browser.

Source: Triton's model repository extension; ``rollback`` is ours.
"""

import ipaddress
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response

from server.errors import BodyTooLarge, ControlForbidden, MalformedRequest
from server.repository import Repository

MAX_BODY_BYTES = 64 * 1024
_PREFIX = "/v2/repository"
_Body = TypeVar("_Body", bound=msgspec.Struct)


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _LoadRequest(msgspec.Struct):
    parameters: dict[str, Any] = {}


def add_control_routes(app: FastAPI, repository: Repository, allowed: str) -> None:
    """Add index, load, unload and rollback.

    Args:
        app: Where to add them.
        repository: What they control.
        allowed: Whom, see ``Settings.model_control``; the index is for everyone.
    """
    routes = _Control(repository, allowed)
    for path, endpoint, summary in (
        ("/index", routes.index, "Versions that serve, come, leave or failed"),
        ("/models/{name}/load", routes.load, "Bring the newest version into service, and answer when it serves"),
        ("/models/{name}/unload", routes.unload, "Take a model out of service until it is loaded again"),
        ("/models/{name}/rollback", routes.rollback, "Go back to the version that served before"),
    ):
        app.add_api_route(
            _PREFIX + path, endpoint, methods=["POST"], summary=summary, response_class=Response, tags=["repository"]
        )


class _Control:
    def __init__(self, repository: Repository, allowed: str) -> None:
        self._repository, self._allowed = repository, allowed

    async def index(self, request: Request) -> Response:
        asked = await _body_of(request, _IndexRequest)
        entries = self._repository.index()
        return _json([entry for entry in entries if entry.state == "READY" or not asked.ready])

    async def load(self, name: str, request: Request) -> Response:
        self._require_allowed(request)
        given = (await _body_of(request, _LoadRequest)).parameters
        if given:
            raise MalformedRequest(
                f"load has the parameters {', '.join(given)}; this server takes none, only versions in the repository"
            )
        await self._repository.load(name)
        return Response(status_code=200)

    async def unload(self, name: str, request: Request) -> Response:
        self._require_allowed(request)
        # unload_dependents, which clients always send, means nothing here: no model depends on another.
        await _body_of(request, _LoadRequest)
        await self._repository.unload(name)
        return Response(status_code=200)

    async def rollback(self, name: str, request: Request) -> Response:
        self._require_allowed(request)
        return _json({"name": name, "version": await self._repository.rollback(name)})

    def _require_allowed(self, request: Request) -> None:
        if self._allowed == "off":
            raise ControlForbidden("model control is off (--model-control)")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise ControlForbidden(f"model control is not for pages of another origin, here {origin}")
        if self._allowed == "local" and not _is_local(request):
            raise ControlForbidden(
                "model control is for clients of the server's machine; --model-control on opens it to all"
            )


def _is_local(request: Request) -> bool:
    if request.client is None:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


async def _body_of(request: Request, kind: type[_Body]) -> _Body:
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has {len(chunks)} bytes so far; this path takes {MAX_BODY_BYTES}")
    try:
        return msgspec.json.decode(bytes(chunks) or b"{}", type=kind)
    except msgspec.MsgspecError as exc:
        raise MalformedRequest(f"the body is not what this path takes: {exc}") from exc


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
