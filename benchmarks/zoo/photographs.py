"""Photographs that scikit-image and scikit-learn carry, and random pictures cut out of them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from deploy.quickstart.graph import Array
from deploy.quickstart.packages import Package, unpack

PICTURES = Package(
    name="scikit-image",
    version="0.25.2",
    sha256="24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
    megabytes=15,
    platform="manylinux_2_17_x86_64",
)
"""A wheel for CPython 3.11; only its pictures are taken."""

_FOLDER = "skimage/data"
_NAMES = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_SMALLEST_CROP = 0.35


def photographs(scratch: Path) -> list[Image.Image]:
    """Return 16 photographs in colour; textures and stars among them, which are hard for classifiers.

    Raises:
        QuickstartError: If scikit-image cannot be downloaded.
    """
    paths = unpack(PICTURES, [f"{_FOLDER}/{name}" for name in _NAMES], scratch).values()
    own = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [*(read_picture(path) for path in paths), *own]


def faces(scratch: Path) -> Array:
    """Return 100 portraits from Labeled Faces in the Wild, FP64 [100,25,25] between 0 and 1.

    Raises:
        QuickstartError: If scikit-image cannot be downloaded.
    """
    (path,) = unpack(PICTURES, [f"{_FOLDER}/lfw_subset.npy"], scratch).values()
    portraits: Array = np.load(path)[:100]  # as documented there: 100 faces, then 100 pictures without one
    return portraits


def read_picture(path: Path) -> Image.Image:
    """Read a picture in colour."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def random_crops(pictures: Sequence[Image.Image], count: int, size: int, rng: np.random.Generator) -> Iterator[Array]:
    """Yield squares cut out at random, from all pictures in turn: UINT8 [size,size,3].

    Each has 35 to 100 % of the shorter side, is mirrored or not, and has 80 to 120 % of the brightness.

    Args:
        pictures: At least one.
        count: How many.
        size: Pixels along a side.
        rng: Decides.
    """
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(min(picture.size) * rng.uniform(_SMALLEST_CROP, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        cut = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        pixels = np.asarray(cut)[:, :: rng.choice((-1, 1))].astype(np.float32)
        yield np.clip(np.rint(pixels * rng.uniform(0.8, 1.2)), 0, 255).astype(np.uint8)


def to_input(pixels: Iterable[Array], count: int, offset: float, scale: float) -> Array:
    """Stack UINT8 [size,size,3] pictures to FP32 [count,3,size,size], ``(pixel - offset) / scale``; one in memory."""
    stacked: Array = np.empty(0)
    for index, picture in enumerate(pixels):
        if index == 0:
            stacked = np.empty((count, 3, *picture.shape[:2]), np.float32)
        stacked[index] = (picture.transpose(2, 0, 1).astype(np.float32) - offset) / scale
    return stacked
