"""``python -m benchmarks.serving.ablated IDEA serve ...``: the server's own command without one of its ideas.

Only for ideas that have no switch. Each is taken away by replacing one function before the server starts.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response

import server.app
import server.batching
import server.cli
import server.connection
import server.tensor_data
import server.wire
from server.artifact import PLAIN_MODEL, UNOPTIMIZED, Artifact, SessionOptions, Variant
from server.cores import usable_cores
from server.tensors import Array
from slipstream import main as slipstream

Idea = Callable[[], None]


def replace(owner: Any, name: str, value: object) -> None:
    """Replace what must be there.

    Raises:
        AttributeError: If it is not: the server has changed, and nothing would be taken away.
    """
    getattr(owner, name)
    setattr(owner, name, value)


def without_batching() -> None:
    """Run every request alone."""
    plan = server.batching.plan
    replace(server.batching, "plan", lambda queue, now, _, *rest, **options: plan(queue, now, 1, *rest, **options))


def through_fastapi() -> None:
    """Answer infer requests in a route of FastAPI, through ASGI and the router."""
    create_app = server.app.create_app
    replace(server.connection, "infer_target", _no_target)
    replace(server.app, "infer_target", _no_target)

    def with_route(*arguments: Any) -> Any:
        app = create_app(*arguments)

        @app.post("/v2/models/{name}/infer")
        async def infer(name: str, request: Request) -> Response:
            messages: list[Any] = []

            async def keep(message: Any) -> None:
                messages.append(message)

            await app.infer(request.scope, request.receive, keep, name, "")
            body = b"".join(message.get("body", b"") for message in messages)
            response = Response(body, messages[0]["status"])
            response.raw_headers = [*messages[0]["headers"]]
            return response

        return app

    replace(server.cli, "create_app", with_route)


def json_through_lists() -> None:
    """Read JSON with orjson into lists, and these with numpy; no array is cut out of the message first."""

    def numbers(text: bytes, dtype: Any, shape: Sequence[int], count: int) -> Array | None:  # noqa: ARG001
        array = np.array(orjson.loads(text), dtype).ravel()
        return array if len(array) == count else None

    replace(server.wire, "cut_out", lambda _: None)
    replace(server.tensor_data, "_numbers", numbers)


def one_wide_lane() -> None:
    """Serve an unoptimized model on one lane with a thread per core, instead of a lane per core."""

    def variants(_: Artifact) -> tuple[Variant, ...]:
        options = SessionOptions(intra_op_threads=usable_cores())
        return (Variant(UNOPTIMIZED, PLAIN_MODEL, "", 0, "original", "cpu", options),)

    replace(Artifact, "variants", property(variants))


IDEAS: dict[str, Idea] = {
    "batching": without_batching,
    "raw-branch": through_fastapi,
    "json-slices": json_through_lists,
    "lanes": one_wide_lane,
}


def _no_target(path: str) -> None:  # noqa: ARG001  (the interface)
    return None


def main() -> None:
    """Take one idea away, then run the command."""
    IDEAS[sys.argv.pop(1)]()
    slipstream()


if __name__ == "__main__":
    main()
