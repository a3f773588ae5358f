"""Where a graph can be cut, what the parts are, and which cuts balance them."""

from itertools import combinations, pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optimizers.cutting import Cutter, choose
from optimizers.graph import load_model
from tests import models

FLOAT = TensorProto.FLOAT


def chain(weights: list[int], width: int = 4) -> onnx.ModelProto:
    """x -> MatMul -> MatMul -> ... -> y; each node with a weight of so many columns."""
    nodes, tensors, name, rows = [], [], "x", width
    for number, columns in enumerate(weights):
        tensors.append(numpy_helper.from_array(np.ones((rows, columns), np.float32), f"w{number}"))
        output = "y" if number == len(weights) - 1 else f"h{number}"
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [output]))
        name, rows = output, columns
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", weights[-1]])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_every_place_between_two_nodes_of_a_chain_with_what_crosses():
    cuts = Cutter(chain([8, 2, 4])).cuts()
    assert [(cut.after, cut.crossing, cut.crossing_bytes) for cut in cuts] == [(1, ("h0",), 32), (2, ("h1",), 8)]
    sizes = [tensor.ByteSize() for tensor in chain([8, 2, 4]).graph.initializer]
    assert [cut.weight_bytes for cut in cuts] == [sizes[0], sizes[0] + sizes[1]]


def test_residual_crosses_as_well(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", FLOAT, ["n", 4])], [value("y", FLOAT, ["n", 4])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert [cut.crossing for cut in Cutter(model).cuts()] == [("a",), ("a", "b")]


def test_of_many_places_the_narrowest_of_each_range_is_kept():
    widths = [64, 64, 8, 64, 64, 64, 8, 64]
    cuts = Cutter(chain(widths, 64)).cuts(most=2)
    assert [cut.crossing for cut in cuts] == [("h2",), ("h6",)]


def test_place_that_a_tensor_of_unknown_type_crosses_is_none():
    model = chain([4, 4, 4])
    model.graph.node[0].domain, model.graph.node[0].op_type = "custom", "Mystery"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    assert [cut.crossing for cut in Cutter(model).cuts()] == []


def test_parts_are_valid_models_with_the_weights_that_they_use(tmp_path):
    model = load_model(models.save_cnn(tmp_path / "cnn.onnx"))
    cutter = Cutter(model)
    cuts = cutter.cuts()
    assert len(cuts) == len(model.graph.node) - 1
    first, second, third = cutter.stages([cuts[1], cuts[3]])
    for part in (first, second, third):
        onnx.checker.check_model(part, full_check=True)
    assert [value.name for value in first.graph.input] == ["image"]
    assert [value.name for value in third.graph.output] == ["logits"]
    assert [value.name for value in second.graph.input] == [value.name for value in first.graph.output]
    assert {tensor.name for tensor in first.graph.initializer} == {"conv", "scale", "shift", "mean", "var"}
    assert not second.graph.initializer
    assert {tensor.name for tensor in third.graph.initializer} == {"fc", "fc_bias"}


def test_input_that_a_later_stage_needs_is_its_input(tmp_path):
    nodes = [helper.make_node("Relu", ["a"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    value = helper.make_tensor_value_info
    inputs = [value("a", FLOAT, ["n", 4]), value("b", FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", FLOAT, ["n", 4])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cutter = Cutter(model)
    first, second = cutter.stages(cutter.cuts())
    assert [item.name for item in first.graph.input] == ["a"]
    assert {item.name for item in second.graph.input} == {"h", "b"}


def test_output_of_an_early_stage_is_kept():
    nodes = [
        helper.make_node("Relu", ["x"], ["early"]),
        helper.make_node("Neg", ["early"], ["h"]),
        helper.make_node("Abs", ["h"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("early", FLOAT, ["n", 4]), value("y", FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", [value("x", FLOAT, ["n", 4])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cutter = Cutter(model)
    first, second = cutter.stages([cutter.cuts()[1]])
    assert [item.name for item in first.graph.output] == ["early", "h"]
    assert [item.name for item in second.graph.output] == ["y"]


def test_tensors_that_a_branch_takes_from_outside_cross_too():
    branch = helper.make_graph(
        [helper.make_node("Add", ["outer", "w"], ["inner"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["outer"]),
        helper.make_node("Abs", ["x"], ["h"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["z", "h"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x", FLOAT, ["n", 4]), value("flag", TensorProto.BOOL, [])]
    weights = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", FLOAT, ["n", 4])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    cutter = Cutter(model)
    cut = next(cut for cut in cutter.cuts() if cut.after == 2)
    assert set(cut.crossing) == {"outer", "h"}
    first, second = cutter.stages([cut])
    assert not first.graph.initializer
    assert [tensor.name for tensor in second.graph.initializer] == ["w"]
    assert {item.name for item in second.graph.input} == {"outer", "h", "flag"}


def test_slowest_stage_is_as_fast_as_can_be():
    assert choose([1.0, 2.0, 6.0, 7.0, 8.0], [0] * 5, 2) == (1,)
    assert choose([4.0, 8.0], [0, 0], 2) == (0,)
    assert choose([1.0, 2.0, 3.0], [0, 0, 0], 3) == (0, 1)
    assert choose([5.0], [0], 1) == ()


def test_noise_that_makes_a_longer_part_faster_does_no_harm():
    assert choose([4.0, 3.5, 8.0], [0, 0, 0], 2) in ((0,), (1,))


def test_memory_of_a_device_counts_before_time():
    seconds, weights = [1.0, 4.0, 8.0], [20, 95, 100]
    assert choose(seconds, weights, 2) == (1,)
    assert choose(seconds, weights, 2, limit_bytes=90) == (0,)
    assert choose(seconds, weights, 2, limit_bytes=75) is None
    assert choose(seconds, weights, 3, limit_bytes=75) == (0, 1)


def test_more_stages_than_parts_cannot_be():
    assert choose([1.0, 2.0], [0, 0], 3) is None


@given(st.lists(st.floats(0.1, 10.0), min_size=3, max_size=8), st.integers(1, 3))
def test_no_other_choice_is_better(steps: list[float], stages: int) -> None:
    until = np.cumsum(steps).tolist()

    def slowest(cuts: tuple[int, ...]) -> float:
        ends = [0.0, *(until[index] for index in cuts), until[-1]]
        return max(stop - start for start, stop in pairwise(ends))

    found = choose(until, [0] * len(until), stages)
    assert found is not None
    assert slowest(found) == pytest.approx(min(map(slowest, combinations(range(len(until) - 1), stages - 1))))
