import pickle
from pathlib import Path

import pytest

from optimizers.passes import Pass
from optimizers.passes.catalog import EXACT, lossy
from optimizers.passes.check import require_equivalent
from tests.optimizers.graphs import NODE, context_of, model_of, normal

LOSSY = lossy(("fp32", "fp16", "int8"))


def test_precisions_choose_the_lossy_passes() -> None:
    assert list(LOSSY) == ["fp16", "int8-dynamic", "int8-static", "int8-static-percentile"]
    assert lossy(("fp32",)) == {}
    assert list(lossy(("fp16",))) == ["fp16"]
    assert all(step.spec.effect == "lossy" for step in LOSSY.values())
    assert all(step.spec.effect != "lossy" for step in EXACT)


@pytest.mark.parametrize("step", [*EXACT, *LOSSY.values()], ids=lambda step: step.spec.name)
def test_passes_can_be_sent_to_another_process(step: Pass) -> None:
    assert pickle.loads(pickle.dumps(step)).spec == step.spec


@pytest.mark.parametrize("rows", [None, "batch"])
def test_every_pass_in_its_order_keeps_names_of_axes_and_their_absence(tmp_path: Path, rows: str | None) -> None:
    nodes = [
        NODE("MatMul", ["x", "w"], ["m"]),
        NODE("Add", ["m", "b"], ["a"]),
        NODE("Identity", ["a"], ["i"]),
        NODE("Relu", ["i"], ["y"]),
    ]
    weights = {"w": normal(8, 6), "b": normal(1, 6)}
    model = model_of(nodes, {"x": [rows, 8]}, {"y": [rows, 6]}, weights, opset=11, ir_version=6)
    data = {"x": normal(16, 8)}
    context = context_of(tmp_path, [data])
    for step in EXACT:
        result = step.run(model, context)
        require_equivalent(model, result, step.spec.effect, [data], tmp_path)
        model = result.model
    for step in LOSSY.values():
        require_equivalent(model, step.run(model, context), step.spec.effect, [data], tmp_path)
