"""What the driver says about the GPU, asked of a driver of a few lines of C."""

import shutil
import subprocess
from pathlib import Path

import pytest

from optimizers.gpu import GpuFacts, read_gpu

STUB = """
#include <string.h>
int cuInit(unsigned flags) { return %(status)d; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA L4", length); return device != 40; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return device != 40;
}
"""


def driver(folder: Path, status: int) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the stand-in for the driver needs a C compiler")
    source, library = folder / "cuda.c", folder / f"libcuda-{status}.so"
    source.write_text(STUB % {"status": status})
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def test_facts_are_those_of_the_first_device(tmp_path: Path):
    (tmp_path / "version").write_text("580.65.06\n")
    library = driver(tmp_path, 0)
    assert read_gpu(library, tmp_path / "version") == GpuFacts("NVIDIA L4", "8.9", 13000, "580.65.06")
    assert read_gpu(library, tmp_path / "missing") == GpuFacts("NVIDIA L4", "8.9", 13000, "")


def test_driver_without_a_gpu_has_no_facts(tmp_path: Path):
    assert read_gpu(driver(tmp_path, 100)) is None


def test_machine_without_a_driver_has_no_facts(tmp_path: Path):
    assert read_gpu(str(tmp_path / "libcuda.so.1")) is None
