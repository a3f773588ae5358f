"""The least that HTTP costs: an ASGI application on uvicorn that reads the body and answers fixed bytes.

``answer.json`` and ``answer.binary`` in its folder are what it answers; the latter where the request says that it
carries binary tensors.
"""

from typing import Any

import uvicorn

from benchmarks.serving.peers.setup import read_setup


def create_app(answers: dict[str, bytes]) -> Any:
    """Return the application.

    Args:
        answers: ``json`` and ``binary`` -> body.
    """
    starts = {
        kind: {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        }
        for kind, body in answers.items()
    }
    bodies = {kind: {"type": "http.response.body", "body": body} for kind, body in answers.items()}

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        pieces = []
        while True:
            message = await receive()
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        b"".join(pieces)
        kind = "binary" if any(name == b"inference-header-content-length" for name, _ in scope["headers"]) else "json"
        await send(starts[kind])
        await send(bodies[kind])

    return app


def main() -> None:
    """Serve until killed."""
    setup = read_setup()
    answers = {kind: (setup.workspace / f"answer.{kind}").read_bytes() for kind in ("json", "binary")}
    app = create_app(answers)
    options: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "ws": "none", "lifespan": "off"}
    uvicorn.run(app, port=setup.port, access_log=False, log_level="warning", **options)


if __name__ == "__main__":
    main()
