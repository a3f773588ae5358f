"""Two classifiers of scikit-learn's handwritten digits, trained here in seconds, without any download."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from deploy.quickstart.graph import Array, GraphWriter

SAMPLES = 700
"""Pictures that no classifier is trained on; the other 1097 are for training."""
FILTERS = 32
_WINDOWS = 8000
_LEAST_CONTRAST = 0.2
_FILTER_BIAS = -0.1


def prepare_cnn(folder: Path, scratch: Path) -> None:  # noqa: ARG001  (the interface)
    """Make a network with one convolution: ``input`` FP32 [batch,1,8,8] -> ``logits`` FP32 [batch,10].

    The filters are the centres of clusters of 3x3 windows, the classifier behind them is a logistic regression.
    """
    images, held_out, labels, held_out_labels = _split()
    filters = _filters(images)
    head = LogisticRegression(C=10, max_iter=2000).fit(_features(images, filters), labels)
    graph = GraphWriter()
    weight = graph.weight(filters[:, None], "conv.weight")
    bias = graph.weight(np.full(FILTERS, _FILTER_BIAS, np.float32), "conv.bias")
    maps = graph.op("Relu", graph.op("Conv", "input", weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    pooled = graph.op("Flatten", graph.op("AveragePool", maps, kernel_shape=[2, 2], strides=[2, 2]), axis=1)
    matrix = graph.weight(head.coef_.astype(np.float32), "fc.weight")
    graph.op(
        "Gemm", pooled, matrix, graph.weight(head.intercept_.astype(np.float32), "fc.bias"), output="logits", transB=1
    )
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])]
    graph.save(folder / "model.onnx", "digits_cnn", inputs, outputs)
    np.savez(folder / "data.npz", input=held_out[:, None])
    np.savez(folder / "labels.npz", labels=held_out_labels)


def prepare_mlp(folder: Path, scratch: Path) -> None:  # noqa: ARG001  (the interface)
    """Make a dense network: ``X`` FP32 [N,64] -> ``label`` INT64 [N], ``probabilities`` FP32 [N,10]."""
    images, held_out, labels, held_out_labels = _split()
    flat = images.reshape(len(images), -1)
    trained = MLPClassifier((256, 128), max_iter=200, tol=1e-3, random_state=0).fit(flat, labels)
    model: Any = to_onnx(trained, flat[:1], options={"zipmap": False}, target_opset=17)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "data.npz", X=held_out.reshape(len(held_out), -1))
    np.savez(folder / "labels.npz", labels=held_out_labels)


def _split() -> tuple[Array, Array, Array, Array]:
    """Return images FP32 [n,8,8] between 0 and 1 for training and for testing, then their labels INT64 [n]."""
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    train, test, y_train, y_test = train_test_split(images, labels, test_size=SAMPLES, random_state=0, stratify=labels)
    return train, test, y_train, y_test


def _filters(images: Array) -> Array:
    """Return the centres of clusters of windows with contrast, FP32 [filters,3,3], each of length 1."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2)).reshape(-1, 9)
    windows = windows[np.random.default_rng(0).choice(len(windows), _WINDOWS, replace=False)]
    windows = windows - windows.mean(axis=1, keepdims=True)
    varied = windows[np.linalg.norm(windows, axis=1) > _LEAST_CONTRAST]
    centres = KMeans(FILTERS, n_init=1, random_state=0).fit(varied).cluster_centers_
    return (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32).reshape(FILTERS, 3, 3)


def _features(images: Array, filters: Array) -> Array:
    """Compute what the graph computes before its last layer, FP32 [n, filters x 4 x 4]."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    maps = np.maximum(np.einsum("nhwij,kij->nkhw", windows, filters) + _FILTER_BIAS, 0)
    pooled: Array = maps.reshape(len(images), FILTERS, 4, 2, 4, 2).mean(axis=(3, 5))
    return pooled.reshape(len(images), -1)
