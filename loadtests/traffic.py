"""What a load test sends: kinds of requests with their shares, and their bodies with the answers that they must get."""

import http.client
import json
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
import numpy as np

from loadtests.payloads import LENGTH_HEADER, Filling, Payload, PayloadError, build_payload, read_outputs

_SETUP_TIMEOUT_S = 30.0

Outputs = dict[str, np.ndarray]


_Positive = Annotated[int, msgspec.Meta(ge=1)]


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of request.

    Attributes:
        model: Name of the served model.
        version: Its version; the server's default when empty.
        name: In tables; made of the rest when empty.
        weight: How often it is sent, against the weights of the others.
        wire: Form of the tensors, both ways: ``binary`` or ``json``.
        rows: Size of a variable first axis.
        variable_size: Size of other variable axes, such as a sequence length.
        max_integer: Integer inputs are drawn from 0 to this.
        priority: 1 (first) to 9 (last); 0 leaves it out.
        timeout_ms: The request's deadline; 0 leaves it out.
        client: Whom the work counts for; left out when empty.
        variant: Which must answer; the router chooses when empty.
    """

    model: str
    version: str = ""
    name: str = ""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    wire: Literal["binary", "json"] = "binary"
    rows: _Positive = 1
    variable_size: _Positive = 16
    max_integer: Annotated[int, msgspec.Meta(ge=0)] = 1
    priority: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0
    timeout_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    client: str = ""
    variant: str = ""

    @property
    def title(self) -> str:
        """Its name, or what tells it from others."""
        extras = [
            f"version {self.version}" if self.version else "",
            f"{self.rows} row{'s' * (self.rows > 1)}",
            self.wire,
            f"priority {self.priority}" if self.priority else "",
            f"{self.timeout_ms:g} ms" if self.timeout_ms else "",
            self.client,
            self.variant,
        ]
        return self.name or f"{self.model}: {', '.join(filter(None, extras))}"

    @property
    def path(self) -> str:
        """Of the model's metadata."""
        version = f"/versions/{quote(self.version)}" if self.version else ""
        return f"/v2/models/{quote(self.model)}{version}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request, and what the server answered to it before the test."""

    payload: Payload
    expected: Outputs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kind of request with its bodies."""

    kind: Kind
    exchanges: list[Exchange]


def read_kinds(text: str, defaults: Mapping[str, Any]) -> list[Kind]:
    """Read a mix in TOML: one ``[[request]]`` with the attributes of ``Kind`` for each kind of request.

    Args:
        text: The TOML.
        defaults: Attributes of what it leaves out.

    Raises:
        PayloadError: If it is no TOML, has an unknown key, or a value that is none of its attribute.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise PayloadError(f"the mix is not TOML: {exc}") from exc
    if tables.keys() != {"request"} or not isinstance(tables["request"], list):
        raise PayloadError("the mix holds [[request]] tables and nothing else")
    return [make_kind({**defaults, **table}) for table in tables["request"]]


def make_kind(values: Mapping[str, Any]) -> Kind:
    """Make a kind of request from its attributes.

    Raises:
        PayloadError: If a key is unknown, or a value is none of its attribute.
    """
    if not values.get("model"):
        raise PayloadError("a request needs a model: give the name of a served one with --model")
    try:
        return msgspec.convert(values, Kind)
    except msgspec.ValidationError as exc:
        raise PayloadError(f"a kind of request: {exc}") from exc


def prepare(host: str, kinds: list[Kind], bodies: int, seed: int) -> list[Prepared]:
    """Read the models' metadata, build the bodies, and record one answer to each.

    Args:
        host: The server's address, such as http://127.0.0.1:8000.
        kinds: Of the requests.
        bodies: Different ones of each kind.
        seed: Of the first; the next ones count up.

    Raises:
        PayloadError: If no body can be made, if the server cannot be reached, or if it answers with an error or with no
            infer response.
    """
    host = host.rstrip("/")
    prepared = []
    for kind in kinds:
        metadata = json.loads(fetch(host + kind.path)[0])
        numbers = range(seed, seed + bodies)
        prepared.append(Prepared(kind, [_exchange(host, kind, metadata, number) for number in numbers]))
    return prepared


def _exchange(host: str, kind: Kind, metadata: Mapping[str, Any], seed: int) -> Exchange:
    filling = Filling(kind.rows, kind.variable_size, kind.max_integer, seed)
    binary = kind.wire == "binary"
    named = {"priority": kind.priority, "timeout": round(kind.timeout_ms * 1e3)}
    payload = build_payload(
        metadata, filling, binary=binary, parameters={name: value for name, value in named.items() if value}
    )
    # Without its deadline, which a server that was idle until now may miss.
    plain = build_payload(metadata, filling, binary=binary)
    headers = {"slipstream-variant": kind.variant, "slipstream-client": kind.client, "Accept-Encoding": "identity"}
    for each in (payload, plain):
        each.headers.update({name: value for name, value in headers.items() if value})
    return Exchange(payload, read_outputs(*fetch(f"{host}{kind.path}/infer", plain)))


def ready_models(host: str) -> list[str]:
    """Return the names of the models that a server can be asked for.

    Raises:
        PayloadError: If the server cannot be reached, answers with an error, or has no index of its models.
    """
    asked = Payload(b'{"ready": true}', {"Content-Type": "application/json"})
    answer = fetch(f"{host.rstrip('/')}/v2/repository/index", asked)[0]
    try:
        return sorted({entry["name"] for entry in json.loads(answer)})
    except (ValueError, KeyError, TypeError) as exc:
        raise PayloadError(f"{host} has no index of its models; name one with --model") from exc


def fetch(url: str, payload: Payload | None = None) -> tuple[bytes, str | None]:
    """Send one request before the test.

    Args:
        url: Whom to ask.
        payload: What to post; a GET without it.

    Returns:
        The body of the answer, and the length of its JSON part if it says so.

    Raises:
        PayloadError: If the answer is an error, or the server cannot be reached.
    """
    request = urllib.request.Request(url, payload.body if payload else None, payload.headers if payload else {})
    try:
        with urllib.request.urlopen(request, timeout=_SETUP_TIMEOUT_S) as response:
            return response.read(), response.headers.get(LENGTH_HEADER)
    except urllib.error.HTTPError as exc:
        text = exc.read()[:300].decode("utf-8", "replace")
        raise PayloadError(f"{url} answers with {exc.code}: {text}") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise PayloadError(f"{url} cannot be reached: {getattr(exc, 'reason', exc)}") from exc
