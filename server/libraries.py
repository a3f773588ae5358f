"""The NVIDIA driver and the libraries of CUDA and TensorRT: what is there, what is missing, and what to install.

onnxruntime's GPU provider is a library of its own that links to them. When one is missing, onnxruntime prints a line
and gives a session on the CPU. So they are looked for first, by loading them as the dynamic linker would, and what is
missing is named with its cure. Nothing here imports onnxruntime.

Source: the NEEDED entries of onnxruntime-gpu 1.31.1's providers; the extras of its metadata.
"""

import ctypes
import importlib.util
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

Code = Literal["cpu_build", "no_driver", "old_driver", "no_device", "missing_library", "failed"]
"""Why a GPU is not used; ``failed`` is any failure of its provider."""


class Obstacle(msgspec.Struct, frozen=True):
    """Why a GPU, or a way to use it, is not used.

    Attributes:
        code: One word for metrics.
        text: For people, with the cure.
    """

    code: Code
    text: str


# By the major version of CUDA: what the CUDA provider links to, and the first driver branch for it.
_CUDA_LIBRARIES = {
    12: ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libcurand.so.10"),
    13: ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"),
}
_FIRST_DRIVER = {12: 525, 13: 580}
_FIRST_CUDA_13 = (1, 27)  # version of onnxruntime-gpu
_TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvonnxparser.so.10")
_OTHER_TENSORRT = "libnvinfer.so.11"
_DISTRIBUTION = "onnxruntime-gpu"


def count_gpus() -> tuple[int, Obstacle | None]:
    """Ask the driver how many GPUs there are; else say why none can be used.

    The driver is silent; onnxruntime, asked for a GPU that is not there, is not.
    """
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        return 0, Obstacle("no_driver", f"no NVIDIA driver ({exc})")
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return 0, Obstacle("no_device", f"the NVIDIA driver offers no GPU (CUDA error {code})")
    if not count.value:
        return 0, Obstacle("no_device", "the NVIDIA driver offers no GPU")
    return count.value, _too_old(driver)


def uuid_of(index: int) -> str:
    """Return the unique name of a GPU that the driver shows to this process, ``GPU-...``.

    Raises:
        OSError: If the driver cannot tell.
    """
    driver: Any = ctypes.CDLL("libcuda.so.1")
    device, raw = ctypes.c_int(0), (ctypes.c_ubyte * 16)()
    if (code := driver.cuDeviceGet(ctypes.byref(device), index)) or (code := driver.cuDeviceGetUuid(raw, device)):
        raise OSError(f"the NVIDIA driver does not tell the UUID of GPU {index} (CUDA error {code})")
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def missing_cuda() -> Obstacle | None:
    """Say which library of the CUDA provider is missing, if one is."""
    version, cuda = _versions()
    missing = [name for name in _CUDA_LIBRARIES[cuda] if not _loads(name)]
    if not missing:
        return None
    others = [major for major, names in _CUDA_LIBRARIES.items() if major != cuda and _loads(names[0])]
    found = f"; CUDA {others[0]} is installed, which is another version" if others else ""
    return Obstacle(
        "missing_library",
        f"{', '.join(missing)} not found{found}. {_DISTRIBUTION} {version} needs CUDA {cuda}: "
        f"pip install '{_DISTRIBUTION}[cuda,cudnn]=={version}'",
    )


def missing_tensorrt() -> Obstacle | None:
    """Load TensorRT 10, for which onnxruntime's provider is linked, or say why it is not there."""
    folders = _package_folders("tensorrt_libs")
    for library in _TENSORRT_LIBRARIES:
        places = [str(folder / library) for folder in folders if (folder / library).is_file()]
        try:
            ctypes.CDLL(next(iter(places), library), mode=ctypes.RTLD_GLOBAL)
        except OSError as exc:
            is_newer = _loads(_OTHER_TENSORRT) or any((folder / _OTHER_TENSORRT).is_file() for folder in folders)
            found = "; TensorRT 11 is, which onnxruntime's provider does not take" if is_newer else ""
            cure = f"pip install 'tensorrt-cu{_versions()[1]}>=10.13,<11'"
            return Obstacle("missing_library", f"TensorRT 10 is not installed ({exc}){found}: {cure}")
    return None


def _too_old(driver: Any) -> Obstacle | None:
    cuda = _versions()[1]
    seen = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(seen)) or seen.value >= cuda * 1000:
        return None
    return Obstacle(
        "old_driver",
        f"the NVIDIA driver supports CUDA {seen.value // 1000}.{seen.value % 1000 // 10}, {_DISTRIBUTION} needs CUDA "
        f"{cuda}: update the driver to {_FIRST_DRIVER[cuda]} or newer",
    )


def _versions() -> tuple[str, int]:
    """Return the version of onnxruntime-gpu, and the major version of CUDA that it is built for."""
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # a build of somebody's own: taken for a new one
        return "1.31.1", max(_CUDA_LIBRARIES)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return version, 13 if numbers >= _FIRST_CUDA_13 else 12


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _package_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
