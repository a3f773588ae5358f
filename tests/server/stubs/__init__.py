"""Libraries of a GPU's driver for tests: small C files that stand for it, compiled where a test needs them."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def build(folder: Path, library: str, source: str = "") -> Path:
    """Compile a C file of this folder, or an empty one, to a shared library; return the library.

    Skips the test where there is no C compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc")
    made = folder / library
    text = (FOLDER / source).read_bytes() if source else b""
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-x", "c", "-o", made, "-"], input=text, check=True)
    return made
