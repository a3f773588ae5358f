"""Mixed precision: the layers that stay in float, and when an earlier search for them counts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import numpy_helper

from optimizers import mixing
from optimizers.budget import Budget
from optimizers.building import Chain
from optimizers.errors import PassFailed
from optimizers.mixing import Accept, Lab, Mixed, mix
from optimizers.passes import Pass
from optimizers.passes.adaround import AdaRound
from optimizers.passes.bias_correction import BiasCorrection
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.smoothquant import SmoothQuant
from optimizers.search import Gate
from optimizers.sensitivity import FloatSet
from tests.models import save_mlp
from tests.optimizers.test_building import Bench, Light, without_processes
from tests.optimizers.test_isolation import Rename

GATE = Gate(0.95)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A model whose first layer sees an input channel 500 times as large as the others."""
    without_processes(monkeypatch)
    model = onnx.load(save_mlp(tmp_path / "mlp.onnx"))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "w1")
    scale = np.ones((64, 1), np.float32)
    scale[0] = 500
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / scale, "w1"))
    onnx.save(model, tmp_path / "outlier.onnx")
    inputs = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32) * scale.T
    made = Bench(tmp_path / "outlier.onnx", tmp_path, inputs)
    yield made
    made.close()


def mixed_of(bench: Bench, *chain: Pass, gate: Gate = GATE, base: Chain = (), budget: Budget | None = None) -> Mixed:
    return mix(bench.line, base, chain, Lab(bench.context, bench.exam, Accept(gate), budget or Budget()))


@pytest.mark.parametrize("step", [Int8Static(), Int8Dynamic()], ids=["static", "dynamic"])
def test_layer_that_cannot_bear_int8_stays_in_float(step: Int8Static | Int8Dynamic, bench: Bench):
    found = mixed_of(bench, step)
    assert found.keep == (found.ranking[0].node,)
    assert [layer.op_type for layer in found.ranking] == ["MatMul", "MatMul"]
    assert found.ranking[0].macs == 64 * 64
    assert found.reason.startswith("1 of 2 layers stay in float, 14% of the products in INT8; simulated agreement ")


def test_chain_is_quantized_without_the_layers_that_stay(bench: Bench):
    keep = ("a", "b")
    chain = (SmoothQuant(), AdaRound(), Int8Static(method="mse"), BiasCorrection())
    applied = Mixed((), keep, "").applied_to(chain)
    assert applied == (SmoothQuant(), AdaRound(keep=keep), Int8Static(method="mse", keep=keep), BiasCorrection())
    assert Mixed((), None, "").applied_to(chain) == chain


def test_repairs_before_the_quantizer_count(bench: Bench):
    found = mixed_of(bench, SmoothQuant(insert=True), Int8Static())
    assert found.keep == ()
    assert found.reason.startswith("0 of 2 layers stay in float, 100% of the products in INT8")


def test_search_is_not_repeated(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    first = mixed_of(bench, Int8Static())
    monkeypatch.setattr(mixing, "Switchboard", None)  # calling it would fail
    assert mixed_of(bench, Int8Static()) == first


@pytest.mark.parametrize("change", ["gate", "settings", "samples", "base"])
def test_another_search_does_not_count(change: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    mixed_of(bench, Int8Static())
    monkeypatch.setattr(mixing, "Switchboard", None)
    if change == "samples":
        bench.exam = replace(bench.exam, digest="other")
    step = Int8Static(method="mse") if change == "settings" else Int8Static()
    gate = Gate(0.5) if change == "gate" else GATE
    with pytest.raises(TypeError):
        mixed_of(bench, step, gate=gate, base=(Rename(),) if change == "base" else ())


def test_gate_that_nothing_passes_finds_no_set(bench: Bench):
    labels = (bench.samples.reference["y"].argmax(axis=1) + 1) % 10
    samples = replace(bench.samples, labels=labels)
    bench.exam = replace(bench.exam, samples=samples)
    found = mixed_of(bench, Int8Static(), gate=Gate(0.95, -0.1))
    assert found.keep is None
    assert found.reason == "no set of float layers is faithful on 128 search samples"
    assert len(found.ranking) == 2


def test_chain_without_an_int8_pass_is_refused(bench: Bench):
    with pytest.raises(PassFailed, match="light quantizes no layers one by one"):
        mixed_of(bench, Light())


class Steps:
    """A clock on which every look takes a second more."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def limited(left_s: float, clock: Callable[[], float]) -> Budget:
    budget = Budget(left_s, clock)
    budget.begin()
    return budget


def test_search_that_cannot_end_in_time_is_given_up_after_the_first_layer(bench: Bench):
    with pytest.raises(PassFailed, match=r"would not finish within the time budget \(needs about \d+ s\)"):
        mixed_of(bench, Int8Static(), budget=limited(8.0, Steps()))
    with pytest.raises(PassFailed, match="the time budget is spent"):
        mixed_of(bench, Int8Static(), budget=limited(0.0, lambda: 0.0))


def test_search_that_was_cut_short_says_so_and_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    budget = limited(1000.0, lambda: 0.0)
    search = mixing.smallest_float_set

    def late(*arguments: Any, **options: Any) -> FloatSet | None:
        budget.reserve("others", 1000.0)
        return search(*arguments, **options)

    monkeypatch.setattr(mixing, "smallest_float_set", late)
    cut = mixed_of(bench, Int8Static(), budget=budget)
    assert cut.keep is not None
    assert len(cut.keep) == 2, "the first set that was accepted: all layers"
    assert cut.reason.endswith("; cut short: the time budget is spent")
    monkeypatch.undo()
    whole = mixed_of(bench, Int8Static())
    assert len(whole.keep or ()) == 1
    assert "cut short" not in whole.reason
