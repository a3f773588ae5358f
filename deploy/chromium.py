"""Find Chromium, or install Debian's where that is allowed, for the browser test and the screenshots."""

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 600


class ChromiumUnavailable(Exception):
    """There is no Chromium, and it could not be installed."""


def chromium() -> str:
    """Return the path of a Chromium; as root on Debian and Ubuntu it is installed if there is none.

    Raises:
        ChromiumUnavailable: If there is none, and apt is missing, not permitted or failed.
    """
    return _found() or _install()


def _found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def _install() -> str:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise ChromiumUnavailable(
            f"none of {', '.join(NAMES)} is here, and only root can install it: apt-get install chromium"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        try:
            outcome = subprocess.run(
                ["apt-get", "-qq", *command],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as exc:
            raise ChromiumUnavailable(f"apt-get {command[0]} took longer than {TIMEOUT_S} s") from exc
        if outcome.returncode != 0:
            raise ChromiumUnavailable(f"apt-get {command[0]} failed: {outcome.stderr.strip()}")
    path = _found()
    if path is None:
        raise ChromiumUnavailable("apt-get installed chromium, but the command is not on the path")
    return path
