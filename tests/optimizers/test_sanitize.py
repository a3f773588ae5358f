from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import graphs_of, op_counts, opset_of, signature_of
from optimizers.passes import Pass
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.fold import Fold
from optimizers.passes.fusion import Fuse, OrtBasic
from optimizers.passes.opset import RaiseOpset
from optimizers.passes.sanitize import Sanitize
from optimizers.passes.simplify import Simplify
from tests.models import save_cnn, save_mlp, save_sequence, save_strings
from tests.optimizers.graphs import NODE, context_of, model_of, normal


def untidy(opset: int = 17, ir_version: int = 3, rows: object = None) -> onnx.ModelProto:
    """A weight in a Constant node, another one among the inputs, nodes without names, a node that nobody reads."""
    nodes = [
        NODE("Constant", [], ["w"], value=numpy_helper.from_array(normal(4, 4), "value")),
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("Relu", ["h"], ["unused"]),
        NODE("Add", ["h", "b"], ["y"]),
    ]
    inputs = {"x": [rows, 4], "b": [4]}
    return model_of(nodes, inputs, {"y": [rows, 4]}, {"b": normal(4, seed=1)}, opset, ir_version)


def test_weights_become_initializers_and_nodes_get_names(tmp_path: Path) -> None:
    model = untidy()
    result = Sanitize().run(model, context_of(tmp_path))
    assert op_counts(result.model) == {"Add": 1, "MatMul": 1}
    assert {tensor.name for tensor in result.model.graph.initializer} == {"w", "b"}
    assert [value.name for value in result.model.graph.input] == ["x"]
    names = [node.name for node in result.model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert result.counts == {
        "constants_lifted": 1,
        "initializers_removed_from_inputs": 1,
        "nodes_named": 4,
        "unused_nodes_removed": 1,
        "shapes_inferred": 1,
    }
    require_equivalent(model, result, "exact", [{"x": normal(3, 4, seed=2)}], tmp_path)


def test_the_input_model_stays_as_it_is(tmp_path: Path) -> None:
    model = untidy()
    before = model.SerializeToString()
    Sanitize().run(model, context_of(tmp_path))
    assert model.SerializeToString() == before


@pytest.mark.parametrize("rows", [None, "rows", 2])
def test_axes_keep_their_names_or_have_none(tmp_path: Path, rows: object) -> None:
    model = untidy(rows=rows)
    assert signature_of(Sanitize().run(model, context_of(tmp_path)).model) == signature_of(model)


@pytest.mark.parametrize(("ir_version", "opset", "written"), [(3, 17, 8), (9, 17, 9), (13, 21, 10), (13, 26, 13)])
def test_ir_version_is_as_portable_as_the_opset_allows(
    tmp_path: Path, ir_version: int, opset: int, written: int
) -> None:
    result = Sanitize().run(untidy(opset, ir_version), context_of(tmp_path))
    assert result.model.ir_version == written
    onnx.checker.check_model(result.model)


def test_an_opset_above_the_ceiling_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="opset 27 is above 26; export"):
        Sanitize().run(untidy(27, 13), context_of(tmp_path))


@pytest.mark.parametrize("save", [save_mlp, save_cnn, save_sequence])
def test_tidy_models_stay_valid_and_equal(tmp_path: Path, save: object) -> None:
    model = onnx.load(save(tmp_path / "model.onnx"))
    result = Sanitize().run(model, context_of(tmp_path))
    batch = {
        spec.name: np.ones([3 if size == "batch" else 5 if isinstance(size, str) else size for size in spec.shape])
        for spec in signature_of(model).inputs
    }
    dtype = np.int64 if "ids" in batch else np.float32
    require_equivalent(model, result, "exact", [{name: a.astype(dtype) for name, a in batch.items()}], tmp_path)


def test_text_models_pass_through(tmp_path: Path) -> None:
    model = onnx.load(save_strings(tmp_path / "model.onnx"))
    result = Sanitize().run(model, context_of(tmp_path))
    require_equivalent(model, result, "exact", [{"text": np.array([b"a", b"b"], object)}], tmp_path)


def old_model() -> onnx.ModelProto:
    """Opset 11, where ReduceSum and Squeeze have their axes as attributes."""
    nodes = [
        NODE("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        NODE("ReduceSum", ["c"], ["s"], axes=[2], keepdims=1),
        NODE("Squeeze", ["s"], ["q"], axes=[2]),
        NODE("Softmax", ["q"], ["y"], axis=2),
    ]
    return model_of(nodes, {"x": ["batch", 2, 6, 6]}, {"y": ["batch", 3, 4]}, {"w": normal(3, 2, 3, 3)}, 11, 6)


def test_an_old_opset_is_raised_with_equal_answers(tmp_path: Path) -> None:
    model = old_model()
    result = RaiseOpset().run(model, context_of(tmp_path))
    assert opset_of(result.model) == 17
    require_equivalent(model, result, "exact", [{"x": normal(2, 2, 6, 6, seed=1)}], tmp_path)
    tidy = Sanitize().run(result.model, context_of(tmp_path))
    require_equivalent(model, tidy, "exact", [{"x": normal(2, 2, 6, 6, seed=1)}], tmp_path)


@pytest.mark.parametrize("opset", [13, 17, 26])
def test_newer_opsets_are_kept(tmp_path: Path, opset: int) -> None:
    model = untidy(opset, 8 if opset < 26 else 13)
    result = RaiseOpset().run(model, context_of(tmp_path))
    assert not result.changed
    assert result.model is model


def test_an_operator_that_cannot_be_raised_is_a_refusal(tmp_path: Path) -> None:
    model = model_of([NODE("NoSuchOperator", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}, {}, 9, 4)
    with pytest.raises(PassFailed, match=r"opset 9 cannot be converted to 17: .*NoSuchOperator"):
        RaiseOpset().run(model, context_of(tmp_path))


def test_a_newer_opset_is_chosen_where_it_is_asked_for(tmp_path: Path) -> None:
    nodes = [NODE("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1), NODE("Sub", ["x", "m"], ["y"])]
    model = model_of(nodes, {"x": ["rows", 4]}, {"y": ["rows", 4]}, opset=17)
    step = RaiseOpset(oldest=20, target=20)
    result = step.run(model, context_of(tmp_path))
    assert opset_of(result.model) == 20
    assert signature_of(result.model) == signature_of(model)
    assert result.counts == {"opset_from": 17, "opset_to": 20}
    assert result.model.ir_version == 9
    assert (step.spec.name, RaiseOpset().spec.name) == ("opset-20", "opset")
    require_equivalent(model, result, "exact", [{"x": normal(2, 4)}], tmp_path)


def test_models_without_standard_operators_have_no_opset_to_raise(tmp_path: Path) -> None:
    model = untidy()
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    assert not RaiseOpset().run(model, context_of(tmp_path)).changed


def test_answers_come_from_the_file_as_it_is_written(tmp_path: Path) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    x = normal(2, 64)
    seen = answers(model, [{"x": x}], tmp_path)[0]["y"]
    w = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_allclose(seen, np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"], rtol=1e-4, atol=1e-5)


def with_branches() -> onnx.ModelProto:
    """An If whose branches have constants of the same name, and a Loop that adds a constant three times."""
    value = numpy_helper.from_array(normal(4, seed=3), "value")
    branches = [
        helper.make_graph(
            [NODE("Constant", [], ["k"], value=value), NODE(op_type, ["h", "k"], [f"of_{op_type}"])],
            op_type,
            [],
            [helper.make_tensor_value_info(f"of_{op_type}", onnx.TensorProto.FLOAT, [None, 4])],
        )
        for op_type in ("Add", "Mul")
    ]
    body = helper.make_graph(
        [
            NODE("Constant", [], ["k"], value=value),
            NODE("Add", ["carried", "k"], ["next"]),
            NODE("Identity", ["going"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", onnx.TensorProto.FLOAT, [None, 4]),
        ],
        [
            helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, [None, 4]),
        ],
    )
    nodes = [
        NODE("Constant", [], ["w"], value=numpy_helper.from_array(normal(4, 4), "w")),
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("ReduceSum", ["x"], ["sum"], keepdims=0),
        NODE("Greater", ["sum", "zero"], ["positive"]),
        NODE("If", ["positive"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        NODE("Loop", ["three", "", "chosen"], ["y"], body=body),
    ]
    weights = {"zero": np.array(0, np.float32), "three": np.array(3)}
    return model_of(nodes, {"x": ["rows", 4]}, {"y": ["rows", 4]}, weights)


@pytest.mark.parametrize("step", [Sanitize(), Fold(), Simplify(), Fuse(), OrtBasic()], ids=lambda step: step.spec.name)
def test_models_with_subgraphs_keep_their_answers(tmp_path: Path, step: Pass) -> None:
    model = with_branches()
    before = model.SerializeToString()
    result = step.run(model, context_of(tmp_path))
    assert model.SerializeToString() == before
    x = np.abs(normal(2, 4, seed=1))
    require_equivalent(model, result, "tolerance", [{"x": x}, {"x": -x}], tmp_path)


def test_constants_in_subgraphs_are_lifted_and_no_name_hides_another(tmp_path: Path) -> None:
    model = with_branches()
    for part in list(graphs_of(model))[1:]:
        next(node for node in part.node if node.op_type in ("Add", "Mul")).output[0] = "h2"
        part.output[-1].name = "h2"
    result = Sanitize().run(model, context_of(tmp_path))
    main, *inner = graphs_of(result.model)
    for part in inner:
        assert not names_made_in(main) & names_made_in(part)
        assert [node.op_type for node in part.node if node.op_type == "Constant"] == []
        assert len(part.initializer) == 1
    for part in (main, *inner):
        assert all(node.name for node in part.node)
        assert len({node.name for node in part.node}) == len(part.node)
    assert result.counts["constants_lifted"] == 4


def names_made_in(graph: onnx.GraphProto) -> set[str]:
    names = [*(tensor.name for tensor in graph.initializer), *(name for node in graph.node for name in node.output)]
    assert len(set(names)) == len(names)
    return set(names)


def test_nodes_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    nodes = [NODE("Relu", ["x"], ["h"], name="same"), NODE("Relu", ["h"], ["y"], name="same")]
    result = Sanitize().run(model_of(nodes, {"x": [2]}, {"y": [2]}), context_of(tmp_path))
    names = [node.name for node in result.model.graph.node]
    assert len(set(names)) == 2
    assert names[0] == "same"


def with_function() -> onnx.ModelProto:
    """A local function with a constant inside, called twice."""
    opsets = [helper.make_opsetid("", 17)]
    inside = [
        NODE("Constant", [], ["k"], value=numpy_helper.from_array(normal(4, seed=1), "k")),
        NODE("Mul", ["a", "k"], ["m"]),
        NODE("Add", ["m", "k"], ["b"]),
    ]
    nodes = [NODE("Affine", ["x"], ["h"], domain="own"), NODE("Affine", ["h"], ["y"], domain="own")]
    model = model_of(nodes, {"x": ["rows", 4]}, {"y": ["rows", 4]})
    model.functions.append(helper.make_function("own", "Affine", ["a"], ["b"], inside, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = with_function()
    result = Sanitize().run(model, context_of(tmp_path))
    assert op_counts(result.model) == {"Add": 2, "Mul": 2}
    assert not result.model.functions
    assert [entry.domain for entry in result.model.opset_import] == [""]
    assert result.counts["functions_inlined"] == 1
    require_equivalent(model, result, "exact", [{"x": normal(3, 4, seed=2)}], tmp_path)


def quantized() -> onnx.ModelProto:
    """A model that already is INT8: weights and activations pass through QuantizeLinear and DequantizeLinear."""
    nodes = [
        NODE("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        NODE("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        NODE("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
        NODE("MatMul", ["xd", "wd"], ["m"]),
        NODE("Add", ["m", "b"], ["y"]),
    ]
    integers = np.random.default_rng(0).integers(-127, 128, (8, 6)).astype(np.int8)
    weights = {"s": np.float32(0.02), "z": np.int8(0), "wq": integers, "b": normal(6)}
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    return model_of(nodes, {"x": ["rows", 8]}, {"y": ["rows", 6]}, arrays)


@pytest.mark.parametrize("step", [Sanitize(), Fold(), Simplify(), Fuse()], ids=lambda step: step.spec.name)
def test_models_that_already_are_quantized_stay_so(tmp_path: Path, step: Pass) -> None:
    model = quantized()
    result = step.run(model, context_of(tmp_path))
    counts = op_counts(result.model)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"], counts["MatMul"]) == (1, 2, 1)
    require_equivalent(model, result, "tolerance", [{"x": normal(3, 8)}], tmp_path)
