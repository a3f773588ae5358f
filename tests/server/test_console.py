"""The page at ``/``: its files, what its policy allows, and the evidence of versions, through FastAPI."""

import re
import tomllib
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.metrics import Metrics
from server.pages import EVIDENCE, FOLDER
from server.settings import Settings, read_settings
from tests.server.fakes import FakeRepository

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FILES = sorted(path.name for path in FOLDER.iterdir())
MANIFEST = b'{"variants": []}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of model m, whose version 2 has evidence and weights."""
    version = tmp_path / "models" / "m" / "2"
    (version / "fp32").mkdir(parents=True)
    (version / "manifest.json").write_bytes(MANIFEST)
    (version / "report.html").write_text("<p>proven</p>")
    (version / "fp32" / "model.onnx").write_bytes(b"weights")
    (tmp_path / "manifest.json").write_text("outside")
    (tmp_path / "models" / "manifest.json").write_text("outside")
    return tmp_path / "models"


def client_of(folder: Path, *, console: bool = True) -> httpx.AsyncClient:
    app = create_app(Settings(repository=folder, console=console), FakeRepository(), Metrics())  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
def client(folder: Path) -> httpx.AsyncClient:
    return client_of(folder)


async def test_browsers_get_the_page_and_others_the_index(client: httpx.AsyncClient) -> None:
    page, index = await client.get("/", headers=BROWSER), await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>Slipstream</title>" in page.text
    assert index.json()["metadata"] == "/v2"


async def test_the_policy_allows_this_server_alone_and_nothing_inline(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BROWSER)
    policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page.text)


async def test_every_file_that_the_page_asks_for_is_there(client: httpx.AsyncClient) -> None:
    kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for name in FILES:
        answer = await client.get(f"/console/{name}")
        assert (answer.status_code, answer.content) == (200, (FOLDER / name).read_bytes())
        assert kinds[Path(name).suffix] in answer.headers["content-type"]
    text = "".join((FOLDER / name).read_text() for name in FILES)
    asked = set(re.findall(r'(?:src|href)="/console/([\w.-]+)"', text)) | set(re.findall(r'from "\./([\w.-]+)"', text))
    assert asked == set(FILES) - {"index.html"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name: str) -> None:
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|wss?:|@import|\burl\(|[\"'(]//\w", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_no_script_parses_text_as_html_or_code(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


async def test_an_unchanged_file_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/console/app.js")
    again = await client.get("/console/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_evidence_is_served_and_may_run_nothing(client: httpx.AsyncClient) -> None:
    manifest = await client.get("/console/evidence/m/2/manifest.json")
    report = await client.get("/console/evidence/m/2/report.html")
    assert (manifest.content, manifest.headers["content-type"]) == (MANIFEST, "application/json")
    assert report.text == "<p>proven</p>"
    policy = report.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "script-src" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "m/2/golden.npz",
        "m/2/model.onnx",
        "m/2/fp32%2Fmodel.onnx",
        "m/2/..%2F..%2Fmanifest.json",
        "m/2/%2e%2e/%2e%2e/manifest.json",
        "m/2/..%5c..%5cmanifest.json",
        "m/../manifest.json",
        "m/%2e%2e/manifest.json",
        "%2e%2e/%2e%2e/manifest.json",
        "..%2f/./manifest.json",
        "m/1/manifest.json",
        "m/3/manifest.json",
        "other/1/manifest.json",
        "m/2/report.json",
        "m/2/manifest.json%00",
    ],
)
async def test_nothing_else_can_be_read(folder: Path, path: str) -> None:
    # Sent as it is, not normalized as httpx does with a plain path.
    async with client_of(folder) as client:
        request = client.build_request("GET", "/")
        request.url = request.url.copy_with(raw_path=f"/console/evidence/{path}".encode())
        answer = await client.send(request)
    assert answer.status_code == 404
    assert answer.json()["code"]


async def test_a_link_leads_nowhere_out_of_the_version(folder: Path, client: httpx.AsyncClient) -> None:
    (folder / "m" / "2" / "report.json").symlink_to(folder / "manifest.json")
    answer = await client.get("/console/evidence/m/2/report.json")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


async def test_switched_off_there_is_neither_page_nor_evidence(folder: Path) -> None:
    async with client_of(folder, console=False) as client:
        assert (await client.get("/", headers=BROWSER)).json()["metadata"] == "/v2"
        for path in ("/console/app.js", "/console/index.html", "/console/evidence/m/2/manifest.json"):
            assert (await client.get(path)).status_code == 404


async def test_the_page_changes_nothing_of_the_interface_description(client: httpx.AsyncClient) -> None:
    assert not [path for path in (await client.get("/openapi.json")).json()["paths"] if "console" in path]


def test_the_files_are_part_of_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "console/*" in project["tool"]["setuptools"]["package-data"]["server"]


def test_no_weights_count_as_evidence() -> None:
    assert {Path(name).suffix for name in EVIDENCE} == {".json", ".html"}


def test_it_is_on_unless_the_environment_or_the_command_line_says_no() -> None:
    assert read_settings({}, {}).console
    assert not read_settings({}, {"SLIPSTREAM_CONSOLE": "false"}).console
    assert read_settings({"console": True}, {"SLIPSTREAM_CONSOLE": "false"}).console
