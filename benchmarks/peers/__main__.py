"""``python -m benchmarks.peers``: install Olive into an environment of its own, for ``benchmarks.optimizing``."""

import argparse
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(".cache", "peers", "olive")
TORCH = ("torch==2.13.0+cpu", "torch")
"""The build without CUDA where pip finds it (the other one brings gigabytes of CUDA), or else what there is."""
OLIVE = ("olive-ai==0.13.0", "requests", "psutil")
"""Olive imports the last two and does not declare them."""
SAME = ("onnxruntime", "onnx", "numpy")
"""What has our version there too: it must be the recipe that makes the difference, not the tools below it."""


def install(folder: Path, indexes: Sequence[str] = ()) -> None:
    """Make the environment; one that is there is brought up to date.

    Args:
        folder: Where it goes.
        indexes: Further arguments of pip, e.g. ``--extra-index-url`` of torch's builds for CPUs.

    Raises:
        subprocess.CalledProcessError: If pip cannot install it.
    """
    venv.create(folder, with_pip=True)
    wanted = [*OLIVE, *(f"{name}=={version(name)}" for name in SAME)]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *indexes]
    for last, torch in enumerate(TORCH, 1):
        if subprocess.run([*pip, torch, *wanted], check=last == len(TORCH)).returncode == 0:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, and say how long it took and how much it takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="DIR", help="(default: %(default)s)")
    options, further = parser.parse_known_args(arguments)
    start_s = time.monotonic()
    try:
        install(options.into, further)
    except subprocess.CalledProcessError as exc:
        print(f"Olive could not be installed: pip ended with {exc.returncode}", file=sys.stderr)
        return 1
    size = sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(options.into) for name in names)
    print(f"Olive is in {options.into}: {size / 1e9:.1f} GB, {time.monotonic() - start_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
