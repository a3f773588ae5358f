"""The console: a page for browsers at ``/``, its scripts and styles, and the evidence beside the models.

Everything comes from this server: the content security policy lets the page ask nobody else. What the page shows, it
asks of the routes that every client has; only the evidence has a route of its own.
"""

import hashlib
import mimetypes
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from server.errors import UnknownModel
from server.repository import Repository

FOLDER: Final = Path(__file__).parent / "console"
PAGE: Final = "index.html"
# The files of a version folder that may be read over HTTP: what was proven, never the weights.
EVIDENCE: Final = frozenset({"manifest.json", "report.html", "report.json"})

_COMMON: Final = {
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report is one file with its styles and plots inside. It may run no script and is of no origin.
EVIDENCE_POLICY: Final = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def wants_page(request: Request) -> bool:
    """Whether the client is a browser that opens a page, and not one that reads JSON."""
    return "text/html" in request.headers.get("accept", "")


class Console:
    """The files of the console, read once, and the evidence of a repository.

    Args:
        repository: The models.
        folder: The folder that the repository was read from.
    """

    def __init__(self, repository: Repository, folder: Path) -> None:
        self._repository, self._folder = repository, folder
        self._files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.is_file()}

    def add_routes(self, app: FastAPI) -> None:
        """Add a route for each file, and one for the evidence."""
        for name in self._files:
            app.add_api_route(f"/console/{name}", self._file, response_class=Response, include_in_schema=False)
        app.add_api_route(
            "/console/evidence/{name}/{version}/{file}",
            self._evidence,
            response_class=Response,
            include_in_schema=False,
        )

    def page(self, request: Request) -> Response:
        """Answer with the page itself."""
        return self._answer(request, PAGE)

    async def _file(self, request: Request) -> Response:
        return self._answer(request, request.url.path.rpartition("/")[2])

    async def _evidence(self, name: str, version: str, file: str) -> Response:
        known = any((entry.name, entry.version) == (name, version) for entry in self._repository.index())
        folder = (self._folder / name / version).resolve()
        path = (folder / file).resolve() if known and file in EVIDENCE else None
        # A link may not lead out of the version's folder either.
        if path is None or not path.is_relative_to(folder) or not path.is_file():
            raise UnknownModel(f"there is no {file} of version {version} of the model '{name}'")
        return FileResponse(path, headers={**_COMMON, "content-security-policy": EVIDENCE_POLICY})

    def _answer(self, request: Request, name: str) -> Response:
        content = self._files[name]
        headers = {**_COMMON, "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "vary": "accept"}
        headers["content-security-policy"] = PAGE_POLICY
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=mimetypes.guess_type(name)[0], headers=headers)
