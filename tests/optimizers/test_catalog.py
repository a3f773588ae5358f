"""The catalog: every pass can be sent to a child process, written into a recipe and read back."""

import pickle
from pathlib import Path

import pytest

from optimizers.errors import RecipeError
from optimizers.passes import Pass
from optimizers.passes.catalog import BY_NAME, EXACT, label_of, settings_of, step_of
from optimizers.passes.check import require_equivalent
from optimizers.passes.fp16 import Fp16
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from tests.optimizers.graphs import NODE, context_of, model_of, normal

ALL = [made() for made in BY_NAME.values()]
LOSSY = [Fp16(), Int8Dynamic(), Int8Static(), Int8Static(method="percentile")]


def test_exact_passes_are_no_lossy_ones() -> None:
    assert all(step.spec.effect != "lossy" for step in EXACT)


@pytest.mark.parametrize("step", ALL, ids=lambda step: step.spec.name)
def test_passes_can_be_sent_to_another_process(step: Pass) -> None:
    assert pickle.loads(pickle.dumps(step)).spec == step.spec


@pytest.mark.parametrize("step", [*ALL, Int8Static(method="mse", keep=("a", "b"))], ids=lambda step: step.spec.name)
def test_passes_can_be_written_into_a_recipe(step: Pass) -> None:
    again = step_of(settings_of(step))
    assert type(again) is type(step)
    assert settings_of(again) == settings_of(step)


def test_label_shows_the_settings_that_differ() -> None:
    assert label_of(Int8Static()) == "int8-static"
    assert label_of(Int8Static(method="mse", keep=("a", "b"))) == "int8-static(method=mse, keep=[2])"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pass": "int9"}, "'int9' is no pass; passes are"),
        ({}, "None is no pass"),
        ({"pass": "int8-static", "methods": "mse"}, "pass int8-static has no setting 'methods'; it has method"),
        ({"pass": "int8-static", "method": "best"}, "pass int8-static: Invalid enum value 'best'"),
        ({"pass": "simplify", "level": 2}, "pass simplify has no setting 'level'; it has none"),
    ],
)
def test_unknown_passes_and_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        step_of(settings)


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
    for step in LOSSY:
        require_equivalent(model, step.run(model, context), step.spec.effect, [data], tmp_path)
