"""What the check runs: real models where the quickstart has prepared them, the same architectures anywhere else."""

from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, helper

from deploy.quickstart.encoder import INPUTS, EncoderShape, Head, write_encoder
from deploy.quickstart.graph import GraphWriter
from server.tensors import Array

SAMPLES = 224
VOCABULARY, TOKENS, CLASSES = 30_522, 128, 2
ENCODER = EncoderShape(hidden=384, heads=12, layers=6, epsilon=1e-12)
PIXELS, WIDTHS = 64, (32, 64, 128, 256)


class Subject(msgspec.Struct, frozen=True):
    """One model to check.

    Attributes:
        name: The name that it is served under.
        origin: Where its weights come from, for the report.
        model: The ONNX file, in FP32.
        samples: Input name -> array, axis 0 counts the samples.
    """

    name: str
    origin: str
    model: Path
    samples: dict[str, Array]

    def batch(self, rows: int) -> dict[str, Array]:
        """Return so many rows, from the first sample on and around."""
        count = len(next(iter(self.samples.values())))
        index = np.arange(rows) % count
        return {name: array[index] for name, array in self.samples.items()}


def find_subjects(prepared: Path, folder: Path) -> list[Subject]:
    """Return a transformer and a CNN.

    Args:
        prepared: The quickstart's cache; its MiniLM is taken if it is there.
        folder: Where models with random weights are written.
    """
    files = prepared / "minilm-l6"
    if (files / "model.onnx").is_file() and (files / "data.npz").is_file():
        with np.load(files / "data.npz") as arrays:
            samples = {name: arrays[name] for name in arrays.files}
        transformer = Subject("minilm-l6", "trained", files / "model.onnx", samples)
    else:
        transformer = random_encoder(folder, ENCODER)
    return [transformer, random_cnn(folder)]


def random_encoder(folder: Path, shape: EncoderShape) -> Subject:
    """Write MiniLM-L6's graph with random weights."""
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {}

    def dense(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(shape.hidden, np.float32)
        weights[f"{name}.bias"] = np.zeros(shape.hidden, np.float32)

    for name, rows in (("word", VOCABULARY), ("position", 512), ("token_type", 2)):
        weights[f"embeddings.{name}_embeddings.weight"] = rng.standard_normal((rows, shape.hidden)).astype(np.float32)
    norm("embeddings.LayerNorm")
    for index in range(shape.layers):
        layer = f"encoder.layer.{index}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            dense(f"{layer}.{part}", shape.hidden, shape.hidden)
        dense(f"{layer}.intermediate.dense", 4 * shape.hidden, shape.hidden)
        dense(f"{layer}.output.dense", shape.hidden, 4 * shape.hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    head = Head(rng.standard_normal((CLASSES, shape.hidden)).astype(np.float32), np.zeros(CLASSES, np.float32))
    path = folder / "encoder.onnx"
    write_encoder(weights, shape, path, head)
    ids = rng.integers(1, VOCABULARY, (SAMPLES, TOKENS))
    samples = dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    return Subject("encoder", "random weights, the graph of MiniLM-L6", path, samples)


def random_cnn(folder: Path) -> Subject:
    """Write a residual network of convolutions with random weights: x FP32 [batch, 3, 64, 64] -> logits [batch, 10]."""
    rng, graph = np.random.default_rng(1), GraphWriter()

    def convolution(x: str, given: int, made: int, stride: int) -> str:
        kernel = (rng.standard_normal((made, given, 3, 3)) / np.sqrt(9 * given)).astype(np.float32)
        bias = graph.weight(np.zeros(made, np.float32))
        settings = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
        return graph.op("Conv", x, graph.weight(kernel), bias, **settings)

    x, width = "x", 3
    for wider in WIDTHS:
        x, width = graph.op("Relu", convolution(x, width, wider, 2)), wider
        for _ in range(2):
            inner = graph.op("Relu", convolution(x, width, width, 1))
            x = graph.op("Relu", graph.op("Add", convolution(inner, width, width, 1), x))
    pooled = graph.op("Flatten", graph.op("GlobalAveragePool", x), axis=1)
    weight = graph.weight((rng.standard_normal((10, width)) / np.sqrt(width)).astype(np.float32))
    graph.op("Gemm", pooled, weight, graph.weight(np.zeros(10, np.float32)), output="logits", transB=1)
    path = folder / "cnn.onnx"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, PIXELS, PIXELS])]
    graph.save(path, "cnn", inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])])
    samples = {"x": rng.standard_normal((SAMPLES, 3, PIXELS, PIXELS)).astype(np.float32)}
    return Subject("cnn", "random weights, a residual network", path, samples)
