"""Send one real request to each model of a Slipstream server, with nothing but the standard library.

probe.py URL [MODEL ...]: without names, every model that is ready. Exit code 1, and a line that says why, when a model
does not answer or answers without an output.
"""

import http.client
import json
import math
import sys
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 30.0


class ProbeError(Exception):
    """The server did not answer as it should."""


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """Get a URL, or post JSON to it, and return the JSON of the answer.

    Raises:
        ProbeError: If the server cannot be reached, answers with an error, or answers with something else than JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310  (the chart names the URL)
            return json.load(answer)
    except urllib.error.HTTPError as exc:
        raise ProbeError(f"{url} answered {exc.code}: {exc.read(500).decode(errors='replace')}") from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise ProbeError(f"{url}: {exc}") from exc


def ready_models(url: str) -> list[str]:
    """Return the names of the models that serve.

    Raises:
        ProbeError: If there is none.
    """
    index = call(f"{url}/v2/repository/index", {"ready": True})
    names = sorted({entry["name"] for entry in index})
    if not names:
        raise ProbeError(f"{url} serves no model")
    return names


def request_for(metadata: dict[str, Any]) -> dict[str, Any]:
    """Make a request of ones (texts: "1") that fits a model's metadata; variable dimensions get size 1."""
    inputs = []
    for tensor in metadata["inputs"]:
        shape = [size if size > 0 else 1 for size in tensor["shape"]]
        element = {"BYTES": "1", "BOOL": True}.get(tensor["datatype"], 1)
        data = [element] * math.prod(shape)
        inputs.append({"name": tensor["name"], "shape": shape, "datatype": tensor["datatype"], "data": data})
    return {"inputs": inputs}


def probe(url: str, name: str) -> str:
    """Send one request to a model and return what came back, in words.

    Raises:
        ProbeError: If the model does not answer, or answers without the outputs of its metadata.
    """
    metadata = call(f"{url}/v2/models/{name}")
    answer = call(f"{url}/v2/models/{name}/infer", request_for(metadata))
    outputs = {tensor["name"]: tensor["shape"] for tensor in answer["outputs"]}
    missing = {tensor["name"] for tensor in metadata["outputs"]} - outputs.keys()
    if missing:
        raise ProbeError(f"{name} answered without {', '.join(sorted(missing))}")
    return f"{name} version {answer['model_version']}: {outputs}"


def main(url: str, *names: str) -> int:
    """Probe the models and return the exit code."""
    url = url.rstrip("/")
    try:
        call(f"{url}/v2")
        for name in names or ready_models(url):
            sys.stdout.write(probe(url, name) + "\n")
    except ProbeError as exc:
        sys.stderr.write(f"probe: {exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: probe.py URL [MODEL ...]")
    sys.exit(main(*sys.argv[1:]))
