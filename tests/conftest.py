"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

from tests import models


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """A two-layer model, x FP32 [batch,64] -> y FP32 [batch,10]."""
    return models.save_mlp(tmp_path / "mlp.onnx")
