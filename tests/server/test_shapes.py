"""Shapes of requests, counted."""

import numpy as np
import pytest

from server import shapes as module
from server.shapes import Shapes
from server.tensors import Signature, TensorSpec


def signature(*specs: tuple[str, tuple[int | str, ...]]) -> Signature:
    return Signature(tuple(TensorSpec(name, "FP32", shape) for name, shape in specs), ())


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_variable_axes_are_counted_without_the_batch():
    counted = Shapes(signature(("x", ("batch", "length")), ("side", ("batch", 3))), batchable=True)
    assert counted.vary
    assert counted.table() == []
    for rows, length in ((1, 8), (4, 8), (2, 16)):
        counted.count(zeros(x=(rows, length), side=(rows, 3)))
    assert counted.table() == [
        {"requests": 2, "inputs": {"x": [-1, 8], "side": [-1, 3]}},
        {"requests": 1, "inputs": {"x": [-1, 16], "side": [-1, 3]}},
    ]


def test_axis_0_counts_where_it_is_no_batch():
    counted = Shapes(signature(("x", ("length", 2))), batchable=False)
    counted.count(zeros(x=(7, 2)))
    assert counted.table() == [{"requests": 1, "inputs": {"x": [7, 2]}}]


def test_fixed_shapes_are_known_without_counting():
    counted = Shapes(signature(("x", ("batch", 2))), batchable=True)
    assert not counted.vary
    assert counted.table() == [{"requests": 0, "inputs": {"x": [-1, 2]}}]


def test_the_rarer_half_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_SHAPES", 8)
    counted = Shapes(signature(("x", ("length",))), batchable=False)
    for length in range(1, 9):
        for _ in range(length):
            counted.count(zeros(x=(length,)))
    counted.count(zeros(x=(99,)))
    assert [entry["inputs"]["x"] for entry in counted.table()] == [[8], [7], [6], [5]]
