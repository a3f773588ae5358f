"""Every route but infer, through FastAPI, with a fake repository."""

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from server.app import EXTENSIONS, Application, create_app, server_version
from server.metrics import Metrics
from server.openapi import example_request
from server.settings import Settings
from server.tensors import Signature, TensorSpec
from tests.server.fakes import FakeRepository

METADATA = {
    "name": "m",
    "versions": ["1", "2"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def app(repository: FakeRepository) -> Application:
    return create_app(Settings(server_name="triton"), repository, Metrics())  # type: ignore[arg-type]


@pytest.fixture
async def client(app: Application) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_live_and_ready(client: httpx.AsyncClient) -> None:
    live, ready = await client.get("/v2/health/live"), await client.get("/v2/health/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert (ready.status_code, ready.json()) == (200, {"ready": True})


async def test_ready_tells_why_the_cpu_serves(client: httpx.AsyncClient, repository: FakeRepository) -> None:
    repository.unused_devices = {"cuda:0": "libcublas.so.13 not found"}
    ready = await client.get("/v2/health/ready")
    assert ready.json() == {"ready": True, "unused_devices": {"cuda:0": "libcublas.so.13 not found"}}


async def test_not_ready_while_models_load(client: httpx.AsyncClient, repository: FakeRepository) -> None:
    repository.ready = False
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
    assert ready.json() == {
        "ready": False,
        "error": "models are loading",
        "code": "model_not_ready",
        "models": {},
    }


async def test_one_bad_model_is_named_in_ready(client: httpx.AsyncClient, repository: FakeRepository) -> None:
    repository.ready, repository.failures = False, {("bad", "3"): "its digest differs"}
    ready = await client.get("/v2/health/ready")
    assert ready.status_code == 503
    assert ready.json()["models"] == {"bad/3": "its digest differs"}


async def test_failed_version_is_named_though_ready(client: httpx.AsyncClient, repository: FakeRepository) -> None:
    repository.failures = {("m", "3"): "its digest differs"}
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "models": {"m/3": "its digest differs"}})


async def test_draining_is_not_ready_but_live_and_serving(client: httpx.AsyncClient, app: Application) -> None:
    app.draining = True
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()["code"]) == (503, "draining")
    assert (await client.get("/v2/health/live")).status_code == 200
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    assert (await client.post("/v2/models/m/infer", json={"inputs": [tensor]})).status_code == 200


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_server_metadata_lists_only_what_works(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.json() == {"name": "triton", "version": server_version(), "extensions": list(EXTENSIONS)}


async def test_model_and_version_metadata(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/models/m")).json() == METADATA
    assert (await client.get("/v2/models/m/versions/1")).json() == METADATA


async def test_model_and_version_readiness(client: httpx.AsyncClient, repository: FakeRepository) -> None:
    repository.failures = {("m", "1"): "its digest differs"}
    ready = await client.get("/v2/models/m/ready")
    assert (ready.status_code, ready.json()) == (200, {"name": "m", "ready": True})
    failed = await client.get("/v2/models/m/versions/1/ready")
    assert failed.status_code == 503
    assert failed.json() == {
        "name": "m",
        "ready": False,
        "error": "model 'm' version 1 failed to load",
        "code": "model_not_ready",
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "text"),
    [
        ("GET", "/v2/models/ghost", 404, "unknown_model", "Request for unknown model: 'ghost' is not found"),
        ("GET", "/v2/models/m/versions/9", 404, "unknown_model", "unknown model: 'm' version 9 is not found"),
        ("GET", "/v2/models/ghost/ready", 404, "unknown_model", "unknown model"),
        ("GET", "/v2/nothing", 404, "not_found", "/v2/nothing"),
        ("GET", "/v2/models/m/", 404, "not_found", "no such path"),
        ("POST", "/v2/models/m/infer/", 404, "not_found", "no such path"),
        ("POST", "/v2", 405, "method_not_allowed", "GET"),
        ("DELETE", "/v2/models/m", 405, "method_not_allowed", "GET"),
        ("GET", "/v2/models/m/infer", 405, "method_not_allowed", "POST"),
    ],
)
async def test_every_error_has_one_form(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str, text: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error", "code"}
    assert answer.json()["code"] == code
    assert text in answer.json()["error"]
    assert ("allow" in answer.headers) == (status == 405)


async def test_defect_in_a_route_is_an_internal_error_without_its_text(
    client: httpx.AsyncClient, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(accept: str) -> bytes:
        raise KeyError("a secret")

    monkeypatch.setattr(app.metrics, "render", broken)
    answer = await client.get("/metrics")
    assert answer.status_code == 500
    assert answer.json() == {"error": "internal error; see the server log", "code": "internal"}


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# HELP slipstream_requests_total" in answer.text


async def test_index_points_to_the_docs(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).json()["docs"] == "/docs"
    assert "swagger" in (await client.get("/docs")).text


async def test_openapi_documents_infer_with_a_body_that_works(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        answer = await client.post(path.format(name="m", version="1"), json=examples["m"]["value"])
        assert answer.status_code == 200
    assert "/v2/health/ready" in document["paths"]


async def test_openapi_shows_no_example_of_a_model_that_failed(
    client: httpx.AsyncClient, repository: FakeRepository
) -> None:
    repository.failures = {("m", ""): "its digest differs"}
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]
    assert list(body["content"]["application/json"]["examples"]) == ["generic"]


@pytest.mark.parametrize(
    ("datatype", "shape", "tensor"),
    [
        ("INT64", ("batch", 2), {"shape": [1, 2], "data": [0, 0]}),
        ("FP32", (3,), {"shape": [3], "data": [0.0, 0.0, 0.0]}),
        ("BYTES", (None,), {"shape": [1], "data": [""]}),
        ("BOOL", (), {"shape": [], "data": [False]}),
    ],
)
def test_example_fits_the_signature(datatype: str, shape: tuple[int, ...], tensor: dict[str, object]) -> None:
    request = example_request(Signature((TensorSpec("x", datatype, shape),), ()))
    assert request == {"inputs": [{"name": "x", "datatype": datatype, **tensor}]}


def test_long_example_is_left_out() -> None:
    assert example_request(Signature((TensorSpec("image", "FP32", ("batch", 3, 224, 224)),), ())) is None


async def test_lifespan_opens_in_the_background_and_closes(app: Application, repository: FakeRepository) -> None:
    opened = asyncio.Event()

    async def slow_open() -> None:
        await opened.wait()
        repository.calls.append("open")

    repository.open = slow_open  # type: ignore[method-assign]
    async with app.router.lifespan_context(app):
        assert app.opening is not None
        assert not app.opening.done()
        opened.set()
        await app.opening
    assert repository.calls == ["open", "stop", "drain", "close"]


async def test_lifespan_that_ends_while_opening_gives_up(app: Application, repository: FakeRepository) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    repository.open = never  # type: ignore[method-assign]
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
    assert app.opening is not None
    assert app.opening.cancelled()
    assert repository.calls == ["stop", "drain", "close"]


async def test_route_errors_are_not_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await client.get("/v2/models/ghost")
    assert caplog.records == []
