"""Where the exploration starts: what is offered for which recipe and host, and where repairs go."""

from typing import get_args

import pytest

from optimizers.passes import Pass
from optimizers.passes.catalog import settings_of, step_of
from optimizers.passes.fp16 import Fp16
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.low_rank import LowRank
from optimizers.passes.smoothquant import SmoothQuant
from optimizers.recipe import Compression, Precision
from optimizers.roots import Repair, Root, quantizer_index, roots_for

ALL = roots_for(get_args(Precision), get_args(Compression), ("cpu",))


def names(roots: tuple[Root, ...]) -> list[str]:
    return [root.name for root in roots]


@pytest.mark.parametrize(
    ("precisions", "compressions", "expected"),
    [
        (("fp32",), (), []),
        (("fp16",), (), ["fp16"]),
        (("bf16",), (), ["bf16"]),
        (("int4",), (), ["int4-weights", "int4-weights-block32"]),
        (("fp32",), ("low-rank",), ["low-rank"]),
        (("fp32",), ("prune-channels",), ["prune-channels"]),
        (("fp32",), ("sparsity-2-4",), ["sparsity-2-4"]),
        (
            ("int8",),
            (),
            [
                "int8-dynamic",
                "int8-static",
                "int8-static-percentile",
                "int8-static-mse",
                "int8-static-entropy",
                "int8-weights",
                "int8-weights-block32",
            ],
        ),
    ],
)
def test_recipe_decides_which_roots_there_are(
    precisions: tuple[str, ...], compressions: tuple[str, ...], expected: list[str]
):
    assert names(roots_for(precisions, compressions, ("cpu",))) == expected


def test_names_are_unique_and_members_of_a_family_differ_in_settings_only():
    assert len(set(names(ALL))) == len(ALL)
    for root in ALL:
        first = next(other for other in ALL if other.family == root.family)
        assert [type(step) for step in root.chain] == [type(step) for step in first.chain]
        assert (root.precision, root.repairs, root.mixes) == (first.precision, first.repairs, first.mixes)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [("bf16", "cuda", "no GPU is in use"), ("sparsity-2-4", "tensorrt", "through TensorRT only; none is in use")],
)
def test_form_that_this_host_cannot_profit_from_is_pruned_with_the_reason(name: str, device: str, reason: str):
    def pruned(*devices: str) -> str:
        (root,) = (root for root in roots_for(("bf16",), ("sparsity-2-4",), devices) if root.name == name)
        return root.pruned

    assert pruned("cpu").endswith(reason)
    assert pruned("cpu", device) == ""


def test_nothing_else_is_pruned_on_a_cpu():
    assert {root.name for root in ALL if root.pruned} == {"bf16", "sparsity-2-4"}


def test_every_root_and_repair_can_be_written_into_a_recipe():
    steps: list[Pass] = [step for root in ALL for step in (*root.chain, *(repair.step for repair in root.repairs))]
    assert len(steps) > 20
    for step in steps:
        made = step_of(settings_of(step))
        assert type(made) is type(step)
        assert settings_of(made) == settings_of(step)


def test_only_layers_of_int8_stay_in_float_one_by_one():
    assert {root.family for root in ALL if root.mixes} == {"int8-dynamic", "int8-static"}
    for root in ALL:
        assert bool(root.repairs) == root.mixes


@pytest.mark.parametrize("family", ["int8-dynamic", "int8-static"])
def test_repairs_of_weights_go_before_the_quantizer_and_of_biases_behind_it(family: str):
    root = next(root for root in ALL if root.family == family)
    chain: tuple[Pass, ...] = root.chain
    for repair in root.repairs:
        chain = repair.place(chain)
    order = [step.spec.name for step in chain]
    assert order[-3:] == ["adaround", family, "bias-correction"]
    assert "smoothquant" in order[:-3]
    assert ("equalize" in order) == (family == "int8-static")


def test_place_of_the_quantizer():
    assert quantizer_index(()) == 0
    assert quantizer_index((LowRank(),)) == 1
    assert quantizer_index((LowRank(), Int8Dynamic(), Int8Static())) == 1
    assert quantizer_index((Fp16(),)) == 0


def test_repair_goes_behind_those_before_it():
    chain = Repair(LowRank()).place((SmoothQuant(), Int8Static()))
    assert [step.spec.name for step in chain] == ["smoothquant", "low-rank", "int8-static"]
