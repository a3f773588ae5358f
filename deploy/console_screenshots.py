"""Screenshots of the console for the docs: the models of a folder, served and under some load.

Usage: python -m deploy.console_screenshots [--repository models] [--destination docs/images]

``make run`` makes the models. Chromium is found or installed as ``deploy.debian`` says.
"""

import argparse
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from deploy.debian import CHROMIUM, command

ROOT = Path(__file__).resolve().parent.parent
LOAD_S = 60
SIZE = {"width": 1280, "height": 800}


@contextmanager
def served(repository: Path) -> Iterator[str]:
    """Serve a folder on a free port and yield the URL once it is ready."""
    command = [sys.executable, ROOT / "slipstream.py", "serve", repository, "--port", "0", "--gpu", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = ""
            while "ready: serving" not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit(f"the server ended with code {process.wait()}")
                if "listening on " in line:
                    url = line.split("listening on ")[1].split(",")[0]
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield url
        finally:
            process.terminate()


def request_of(url: str, name: str) -> dict[str, Any]:
    """Make a request of one row of ones for a model, with 16 along other variable axes."""
    inputs = httpx.get(f"{url}/v2/models/{name}").json()["inputs"]
    for tensor in inputs:
        tensor["shape"] = [size if size >= 0 else 16 if axis else 1 for axis, size in enumerate(tensor["shape"])]
        tensor["data"] = [1] * math.prod(tensor["shape"])
    return {"inputs": inputs}


def send(url: str, name: str, body: dict[str, Any], stop: threading.Event) -> None:
    """Send one request after another, faster and slower in turn, until stopped."""
    sent = 0
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.wait(0.02 if sent // 150 % 2 else 0.06):
            client.post(f"/v2/models/{name}/infer", json=body).raise_for_status()
            sent += 1


def take(browser: Browser, url: str, name: str, destination: Path) -> None:
    """Take the pictures: live figures light and dark, evidence, playground, and a phone."""
    pages: dict[str, Page] = {}
    for theme in ("light", "dark"):
        pages[theme] = browser.new_page(viewport=SIZE, color_scheme=theme)
        pages[theme].goto(f"{url}/#/{name}/1/live")
    pages["light"].wait_for_timeout(LOAD_S * 1000)
    for theme, page in pages.items():
        page.screenshot(path=destination / f"console-{theme}.png")
    page = pages["light"]
    page.goto(f"{url}/#/{name}/1/evidence")
    expect(page.get_by_role("tabpanel")).to_contain_text("held-out samples")
    page.screenshot(path=destination / "console-evidence.png", full_page=True)
    page.goto(f"{url}/#/{name}/1/playground")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("status 200")
    page.screenshot(path=destination / "console-playground.png", full_page=True)
    phone = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    phone.goto(f"{url}/#/{name}/1/live")
    phone.wait_for_timeout(7000)
    phone.screenshot(path=destination / "console-phone.png")


def main() -> None:
    """Serve, load and take the pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "models")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--destination", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    options.destination.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with served(options.repository) as url, sync_playwright() as playwright:
        body = request_of(url, options.model)
        senders = [threading.Thread(target=send, args=(url, options.model, body, stop)) for _ in range(3)]
        for sender in senders:
            sender.start()
        try:
            browser = playwright.chromium.launch(executable_path=command(CHROMIUM, "chromium"), args=["--no-sandbox"])
            take(browser, url, options.model, options.destination)
            browser.close()
        finally:
            stop.set()
            for sender in senders:
                sender.join()


if __name__ == "__main__":
    main()
