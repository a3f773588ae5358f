"""The repository extension through FastAPI, with a fake repository."""

import httpx
import pytest

from server.app import create_app
from server.control import MAX_BODY_BYTES
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fakes import FakeRepository

CHANGES = ["load", "unload", "rollback"]


@pytest.fixture
def repository() -> FakeRepository:
    return FakeRepository()


def client_of(
    repository: FakeRepository, allowed: str = "local", address: tuple[str, int] | None = ("127.0.0.1", 1)
) -> httpx.AsyncClient:
    app = create_app(Settings(model_control=allowed), repository, Metrics())  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=address)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_index(repository: FakeRepository) -> None:
    entries = [
        {"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "rolled back"},
        {"name": "m", "version": "2", "state": "READY", "reason": ""},
    ]
    async with client_of(repository, "off", ("10.0.0.9", 1)) as client:
        for body, expected in ((b"", entries), (b"{}", entries), (b'{"ready": true}', entries[1:])):
            answer = await client.post("/v2/repository/index", content=body)
            assert (answer.status_code, answer.json()) == (200, expected)
        for wrong in (b'{"ready": "yes"}', b"[", b"[]"):
            answer = await client.post("/v2/repository/index", content=wrong)
            assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters": {}}'])
@pytest.mark.parametrize("change", ["load", "unload"])
async def test_load_and_unload(repository: FakeRepository, change: str, body: bytes) -> None:
    async with client_of(repository) as client:
        answer = await client.post(f"/v2/repository/models/m/{change}", content=body)
    assert (answer.status_code, answer.content) == (200, b"")
    assert repository.calls == [f"{change} m"]


async def test_rollback_names_the_version(repository: FakeRepository) -> None:
    async with client_of(repository) as client:
        answer = await client.post("/v2/repository/models/m/rollback")
    assert (answer.status_code, answer.json()) == (200, {"name": "m", "version": "1"})


async def test_load_parameters_that_are_not_served_are_refused(repository: FakeRepository) -> None:
    async with client_of(repository) as client:
        answer = await client.post("/v2/repository/models/m/load", json={"parameters": {"config": "{}"}})
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")
        assert "load has the parameters config" in answer.json()["error"]
        unload = {"parameters": {"unload_dependents": False}}
        assert (await client.post("/v2/repository/models/m/unload", json=unload)).status_code == 200


async def test_large_body_is_refused(repository: FakeRepository) -> None:
    async with client_of(repository) as client:
        answer = await client.post("/v2/repository/models/m/load", content=b" " * (MAX_BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("change", CHANGES)
async def test_unknown_model(repository: FakeRepository, change: str) -> None:
    async with client_of(repository) as client:
        answer = await client.post(f"/v2/repository/models/ghost/{change}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("allowed", "address", "status"),
    [
        ("local", ("127.0.0.1", 1), 200),
        ("local", ("127.8.0.1", 1), 200),
        ("local", ("::1", 1), 200),
        ("local", ("::ffff:127.0.0.1", 1), 200),
        ("local", ("10.0.0.9", 1), 403),
        ("local", ("::ffff:10.0.0.9", 1), 403),
        ("local", ("client", 1), 403),
        ("local", None, 403),
        ("on", ("10.0.0.9", 1), 200),
        ("off", ("127.0.0.1", 1), 403),
    ],
)
async def test_who_may_change_what_serves(
    repository: FakeRepository, change: str, allowed: str, address: tuple[str, int] | None, status: int
) -> None:
    async with client_of(repository, allowed, address) as client:
        answer = await client.post(f"/v2/repository/models/m/{change}")
    assert answer.status_code == status
    assert bool(repository.calls) == (status == 200)
    assert status == 200 or answer.json()["code"] == "control_forbidden"


@pytest.mark.parametrize(("origin", "status"), [("http://test", 200), ("https://evil.example", 403), ("null", 403)])
async def test_pages_of_other_origins_change_nothing(repository: FakeRepository, origin: str, status: int) -> None:
    async with client_of(repository, "on") as client:
        answer = await client.post("/v2/repository/models/m/unload", headers={"origin": origin})
    assert answer.status_code == status


async def test_control_takes_post_only(repository: FakeRepository) -> None:
    async with client_of(repository) as client:
        answer = await client.get("/v2/repository/index")
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")
