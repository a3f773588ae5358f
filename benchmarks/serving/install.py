"""``python -m benchmarks.serving.install``: install other servers, each into an environment of its own.

A server that cannot be installed is named and left out; the comparison runs without it.
"""

import argparse
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

FOLDER = Path(".cache", "peers")
_LAST_LINES = 2


class Packages(msgspec.Struct, frozen=True):
    """What an environment holds.

    Attributes:
        pinned: Requirements with their versions.
        same: Packages that have our version there too.
    """

    pinned: tuple[str, ...]
    same: tuple[str, ...] = ("onnxruntime", "numpy", "uvloop", "httptools", "orjson")


PEERS = {
    "litserve": Packages(("litserve==0.2.19", "pyzmq==27.1.0")),
    "mlserver": Packages(("mlserver==1.7.1",)),
    "bentoml": Packages(("bentoml==1.4.39",)),
    "ray": Packages(("ray[serve]==2.60.0",)),
    # Its stub reads numpy 2 arrays as empty.
    "triton": Packages(("nvidia-pytriton==0.7.0", "numpy==1.26.4"), same=("onnxruntime",)),
}


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """Return the interpreter of a peer's environment, which may not be there."""
    return folder.absolute() / name / "bin" / "python"


def install(name: str, folder: Path, further: Sequence[str] = ()) -> str:
    """Make the environment of one peer; one that is there is brought up to date.

    Args:
        name: One of ``PEERS``.
        folder: Where environments go.
        further: Arguments of pip, e.g. ``--index-url``.

    Returns:
        Why it could not be installed; empty if it was.
    """
    packages = PEERS[name]
    try:
        venv.create(folder / name, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        return str(exc)
    wanted = [*packages.pinned, *(f"{package}=={version(package)}" for package in packages.same)]
    command = [str(python_of(name, folder)), "-m", "pip", "install", "--quiet", *further, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])


def size_bytes(folder: Path) -> int:
    """Return the size of all files under a folder."""
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the named peers or all; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.install", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"(default: all of {', '.join(PEERS)})")
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="DIR", help="(default: %(default)s)")
    options, further = parser.parse_known_args(arguments)
    unknown = sorted(set(options.names) - set(PEERS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(PEERS)}")
    names, failed = options.names or list(PEERS), 0
    for number, name in enumerate(names, 1):
        print(f"{number} of {len(names)}: {name} ...", flush=True)
        start_s = time.monotonic()
        reason = install(name, options.into, further)
        failed += bool(reason)
        place = options.into / name
        took = f"{time.monotonic() - start_s:.0f} s"
        print(f"  left out: {reason}" if reason else f"  {place}: {size_bytes(place) / 1e6:.0f} MB, {took}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
