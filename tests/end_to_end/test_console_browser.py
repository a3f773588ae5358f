"""The console in a real headless Chromium, on a server that really runs."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from deploy.debian import CHROMIUM, CommandUnavailable, command
from tests import models
from tests.artifacts import write_artifact, write_plain
from tests.end_to_end.conftest import latency
from tests.end_to_end.process import Server

TIMEOUT_MS = 20_000
expect.set_options(timeout=TIMEOUT_MS)


class Seen:
    """What the browser complained about and whom it asked."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.urls: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlp (versions 1 and 2, with evidence), picture (an image in), strings (plain)."""
    files, root = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("models")
    for version in ("1", "2"):
        mlp = models.save_mlp(files / f"mlp{version}.onnx", seed=int(version))
        write_artifact(root, "mlp", version, {"first": mlp, "second": mlp}, latency={"first": latency(1.0)})
    write_plain(root, "picture", "1", models.save_cnn(files / "cnn.onnx"))
    write_plain(root, "strings", "1", models.save_strings(files / "strings.onnx"))
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        path = command(CHROMIUM, "chromium")
    except CommandUnavailable as exc:
        pytest.skip(str(exc))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two front ends"])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[Server]:
    with Server(repository, "--workers", str(request.param)) as server:
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    yield page
    context.close()


@pytest.fixture
def seen(page: Page) -> Seen:
    return Seen(page)


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_a_request_is_built_sent_answered_and_counted(page: Page, server: Server, seen: Seen) -> None:
    page.goto(server.url)
    expect(page.locator("#health")).to_have_text("ready")
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Variant").select_option("second")
    page.get_by_role("button", name="Send").click()
    answer = page.locator("#answer")
    expect(answer).to_contain_text("status 200")
    expect(answer).to_contain_text("second")
    expect(answer).to_contain_text("ms in the browser: queue")
    values = answer.get_by_role("region", name="Outputs").locator("tbody tr").first
    expect(values).to_contain_text("FP32")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    line = page.evaluate("navigator.clipboard.readText()")
    assert line.startswith(f"curl -s {server.url}/v2/models/mlp/versions/2/infer ")
    page.get_by_role("tab", name="Live").click()
    lanes = page.get_by_role("region", name="Lanes")
    expect(lanes).to_contain_text("up")
    expect(page.locator(".figure", has_text="Latency").locator(".value")).not_to_contain_text("–")
    assert seen.errors == []
    assert {
        url.partition("/v2")[0].partition("/console")[0].partition("/metrics")[0].rstrip("/") for url in seen.urls
    } == {server.url}


def test_a_bad_value_is_named_beside_its_field_and_nothing_is_sent(page: Page, server: Server, seen: Seen) -> None:
    page.goto(f"{server.url}/#/mlp/2/playground")
    values = page.locator("textarea").first
    for typed, fault in (("[1, 2", "is not JSON"), ('["a"]', "its shape"), ("[]", "holds 0 values")):
        values.fill(typed)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".fault").first).to_contain_text(fault)
        expect(values).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#answer")).to_contain_text("Nothing was sent yet")
    page.get_by_role("button", name="ones").click()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("status 200")
    expect(page.locator(".fault").first).to_be_hidden()
    assert not seen.errors


def test_an_error_of_the_server_is_shown_with_its_code(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/#/mlp/2/playground")
    page.route("**/infer", lambda route: route.continue_(post_data='{"inputs": []}'))
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("status 400")
    expect(page.locator("#answer [role=alert]")).not_to_be_empty()


def test_text_goes_in_line_by_line(page: Page, server: Server, seen: Seen) -> None:
    page.goto(f"{server.url}/#/strings/1/playground")
    page.locator("textarea").first.fill("Grüße")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("status 200")
    assert not seen.errors


def test_an_image_becomes_a_tensor(page: Page, server: Server, seen: Seen, tmp_path: Path) -> None:
    page.goto(f"{server.url}/#/picture/1/playground")
    picture = tmp_path / "red.png"
    drawn = page.context.new_page()
    drawn.set_content('<body bgcolor="red">')
    drawn.screenshot(path=picture)
    drawn.close()
    page.locator("input[type=file]").set_input_files(picture)
    values = page.locator("textarea").first
    expect(values).to_have_value(re.compile(r"^\[1, 1, 1, .* 0, 0, 0\]$"))
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("status 200")
    assert not seen.errors


def test_the_theme_follows_the_system_and_the_switch_and_is_remembered(page: Page, server: Server) -> None:
    page.goto(server.url)
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert dark != light
    page.get_by_label("Theme").select_option("light")
    assert background(page) == light
    page.reload()
    assert background(page) == light
    page.get_by_label("Theme").select_option("auto")
    assert background(page) == dark


def test_tabs_move_by_keyboard(page: Page, server: Server) -> None:
    page.goto(server.url)
    page.get_by_role("tab", name="Live").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Versions and evidence")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_contain_text("golden outputs")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_phone_shows_it_without_scrolling_sideways(page: Page, server: Server) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    for tab in ("live", "evidence", "playground"):
        page.goto(f"{server.url}/#/mlp/2/{tab}")
        expect(page.get_by_role("tabpanel").locator(".panel").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_an_action_asks_first_and_a_server_that_is_gone_is_told(page: Page, repository: Path) -> None:
    with Server(repository) as server:
        page.goto(f"{server.url}/#/mlp/2/live")
        page.get_by_role("button", name="Unload").click()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".head .badge")).to_have_text("ready")
        page.get_by_role("button", name="Unload").click()
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".head .badge")).to_have_text("unavailable")
        page.get_by_role("button", name="Load", exact=True).click()
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".head .badge")).to_have_text("ready")
    expect(page.get_by_role("alert").first).to_contain_text("The server does not answer")
    expect(page.locator("#health")).to_have_text("no answer")


def test_what_was_typed_stays_when_tabs_and_versions_change(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/#/strings/1/playground")
    page.locator("textarea").first.fill("kept")
    page.get_by_role("tab", name="Live").click()
    page.get_by_role("tab", name="Playground").click()
    expect(page.locator("textarea").first).to_have_value("kept")


def test_an_empty_repository_and_a_refused_question_are_told(page: Page, server: Server) -> None:
    page.route("**/v2/repository/index", lambda route: route.fulfill(json=[]))
    page.goto(server.url)
    expect(page.locator("#view")).to_contain_text("There is no model in the repository")
    page.route("**/metrics", lambda route: route.fulfill(status=500, json={"error": "it broke", "code": "internal"}))
    expect(page.locator("#problem")).to_have_text("it broke")


def test_a_report_opens_without_scripts_or_requests(page: Page, server: Server, repository: Path) -> None:
    report = repository / "mlp" / "2" / "report.html"
    report.write_text("<h1>Proven</h1><style>h1{color:red}</style><script>document.body.textContent='ran'</script>")
    page.goto(f"{server.url}/#/mlp/2/evidence")
    with page.expect_popup() as popup:
        page.get_by_role("link", name="report.html").click()
    expect(popup.value.locator("h1")).to_have_css("color", "rgb(255, 0, 0)")
    expect(popup.value.locator("body")).not_to_contain_text("ran")
    report.unlink()


def test_model_names_and_errors_are_text_and_never_markup(page: Page, server: Server) -> None:
    entry = {"name": "<img src=x>", "version": "1", "state": "UNAVAILABLE", "reason": "<b>bad</b>"}
    page.route("**/v2/repository/index", lambda route: route.fulfill(json=[entry]))
    page.goto(server.url)
    expect(page.locator("h2", has_text="<img src=x>")).to_be_visible()
    expect(page.get_by_role("tabpanel")).to_contain_text("<b>bad</b>")
    assert page.locator("main img").count() == 0


def test_the_command_line_switches_it_off(repository: Path) -> None:
    with Server(repository, "--no-console") as server:
        assert httpx.get(server.url, headers={"accept": "text/html"}).json()["metadata"] == "/v2"
        assert httpx.get(f"{server.url}/console/app.js").status_code == 404
