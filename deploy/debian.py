"""Commands that checks need and Debian has: found on the path, or installed where that is allowed."""

import os
import shutil
import subprocess
from collections.abc import Sequence

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 600


class CommandUnavailable(Exception):
    """A command is not there, and could not be installed."""


def command(names: Sequence[str], package: str) -> str:
    """Return the path of a command; as root on Debian and Ubuntu its package is installed if it is not there.

    Args:
        names: Of the command, in order of preference.
        package: Debian's package that has it.

    Raises:
        CommandUnavailable: If it is not there, and apt is missing, not permitted or failed.
    """
    return _found(names) or _install(names, package)


def _found(names: Sequence[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _install(names: Sequence[str], package: str) -> str:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise CommandUnavailable(
            f"none of {', '.join(names)} is here, and only root can install it: apt-get install {package}"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        try:
            outcome = subprocess.run(
                ["apt-get", "-qq", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as exc:
            raise CommandUnavailable(f"apt-get {arguments[0]} took longer than {TIMEOUT_S} s") from exc
        if outcome.returncode != 0:
            raise CommandUnavailable(f"apt-get {arguments[0]} failed: {outcome.stderr.strip()}")
    path = _found(names)
    if path is None:
        raise CommandUnavailable(f"apt-get installed {package}, but {names[0]} is not on the path")
    return path
