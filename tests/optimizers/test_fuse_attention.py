from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import op_counts
from optimizers.passes import PassResult
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.cpu_build import CpuBuild
from optimizers.passes.fuse_attention import ATTENTION_RULES
from tests.optimizers.encoders import HEADS, HIDDEN, LONGEST, attention
from tests.optimizers.graphs import NODE, context_of, normal
from tests.optimizers.rewriting import refusals

SELF, ANY = ATTENTION_RULES["Attention"], ATTENTION_RULES["MultiHeadAttention"]
FORMED, FORMED_ANY = "com.microsoft:Attention", "com.microsoft:MultiHeadAttention"
SIZES = ((1, 1), (2, 7), (3, LONGEST), (1, LONGEST))
MASKS = ("additive", "where", "replaced", "guarded")


def batches(model: onnx.ModelProto, sizes: tuple = SIZES) -> list[dict]:
    """Inputs of these numbers of rows and lengths; masks are ragged, at least one position of each row is seen."""
    rng = np.random.default_rng(7)
    names = {value.name for value in model.graph.input}
    found = []
    for rows, length in sizes:
        batch = {"x": normal(rows, length, HIDDEN, seed=length)}
        seen = np.arange(length)[None] < rng.integers(1, length + 1, (rows, 1))
        batch |= {"mask": seen.astype(np.int64)} if "mask" in names else {}
        batch |= {"z": normal(rows, 3, HIDDEN, seed=4)} if "z" in names else {}
        found.append(batch)
    return found


def built(model: onnx.ModelProto, given: list[dict], work: Path) -> PassResult:
    """Apply the rules alone; the result must answer as the model does."""
    before = model.SerializeToString()
    step = CpuBuild(fusions=("attention",), encoder_fusions=False)
    result = step.run(model, context_of(work))
    assert model.SerializeToString() == before
    if result.changed:
        require_equivalent(model, result, step.spec.effect, given, work)
    return result


@pytest.mark.parametrize("split", ["constant", "computed"])
@pytest.mark.parametrize("turn", ["once", "twice"])
@pytest.mark.parametrize("scale", ["div", "mul", "both", "before"])
@pytest.mark.parametrize("mask", ["none", "additive"])
def test_every_spelling_becomes_one_operator(tmp_path: Path, split: str, turn: str, scale: str, mask: str) -> None:
    """Constant shapes: folded exports. Computed ones, and Div or Mul after the product: torch.onnx's older exporter.

    ``both``: its ``scaled_dot_product_attention``; ``before``: DistilBERT; keys turned twice: torch before 2.0.
    """
    model = attention(split, turn, scale, mask)
    result = built(model, batches(model), tmp_path)
    assert result.counts == {FORMED: 1}
    assert result.note == "by rules: 1 x Attention"
    left = op_counts(result.model)
    assert not left.keys() & {"MatMul", "Softmax", "Transpose", "com.microsoft:FusedMatMul"}
    assert [node.name for node in result.model.graph.node if node.op_type == "Attention"] == ["joined"]


def test_heads_of_a_fixed_length_and_keys_turned_without_heads(tmp_path: Path) -> None:
    """torch.onnx.export(dynamo=True) writes ViT so: batch and heads become one axis while the keys are turned."""
    model = attention("fixed", "collapsed", "both")
    result = built(model, batches(model, ((1, LONGEST), (3, LONGEST))), tmp_path)
    assert result.counts == {FORMED: 1}


@pytest.mark.parametrize("mask", [*MASKS, "full", "heads"])
def test_masks_keep_their_meaning(tmp_path: Path, mask: str) -> None:
    """``additive``: BERT before 2024. ``where``: transformers 5. ``replaced``: DistilBERT before 2025.

    ``guarded``: torch's ``scaled_dot_product_attention``. ``full`` and ``heads``: one number for each pair.
    """
    model = attention(mask=mask)
    given = batches(model)
    for batch in given if mask in ("full", "heads") else []:
        rows, length, _ = batch["x"].shape
        batch["mask"] = normal(rows if mask == "full" else HEADS, length, length, seed=2)
    assert built(model, given, tmp_path).counts == {FORMED: 1}


@pytest.mark.parametrize("mask", MASKS)
def test_a_row_that_sees_nothing_is_what_it_was(tmp_path: Path, mask: str) -> None:
    model = attention(mask=mask)
    given = batches(model, ((2, 5),))
    given[0]["mask"][1] = 0
    result = built(model, given, tmp_path)
    assert result.counts == {FORMED: 1}
    seen = answers(result.model, given, tmp_path)[0]["y"]
    assert (mask == "guarded") == (not seen[1].any())


def test_a_mask_that_is_no_truth_value_is_added_as_it_is(tmp_path: Path) -> None:
    model = attention(mask="additive")
    given = batches(model, ((2, 5),))
    given[0]["mask"][0] = [1, 1, 2, 1, 0]
    assert built(model, given, tmp_path).counts == {FORMED: 1}


def test_products_as_gemm_become_one_operator_too(tmp_path: Path) -> None:
    """Exporters for Keras flatten batch and length for Gemm, and leave the result flat."""
    model = attention(gemm=True)
    result = built(model, batches(model), tmp_path)
    assert result.counts == {FORMED: 1}
    assert op_counts(result.model)["Reshape"] == 1


@pytest.mark.parametrize("sources", [("x", "z", "z"), ("x", "z", "x")])
def test_different_inputs_need_the_operator_without_weights(tmp_path: Path, sources: tuple) -> None:
    """The second attention of a decoder layer, as every exporter writes it."""
    model = attention(sources=sources)
    given = batches(model, ((1, 3), (2, 3)) if sources[2] == "x" else SIZES)
    if sources == ("x", "z", "x"):  # keys and values have different lengths unless the caller sees to it
        assert "not laid out" in refusals(model, ANY)
        return
    assert built(model, given, tmp_path).counts == {FORMED_ANY: 1}
    assert "q, k and v are made of different inputs" in refusals(model, SELF)


def test_two_layers_share_one_expanded_mask(tmp_path: Path) -> None:
    first, second = attention(mask="additive"), attention(mask="additive")
    shared = {"mask", "wide", "float", "hidden", "bias", *(t.name for t in second.graph.initializer)}
    for node in second.graph.node:
        node.input[:] = ["y" if n == "x" else n if n in shared else f"second_{n}" for n in node.input]
        node.output[:] = [n if n in shared else f"second_{n}" for n in node.output]
        node.name = f"second_{node.name}" if node.name else ""
    first.graph.node.extend(node for node in second.graph.node if node.output[0] not in shared)
    first.graph.output[0].name = "second_y"
    result = built(first, batches(first), tmp_path)
    assert result.counts == {FORMED: 2}
    assert op_counts(result.model)["Expand"] == 1


def refused(model: onnx.ModelProto, work: Path) -> str:
    """Return the reasons; neither operator may be formed."""
    assert not {FORMED, FORMED_ANY} & built(model, [], work).counts.keys()
    return refusals(model, [*SELF, *ANY])


@pytest.mark.parametrize("value", ["q_heads", "scores", "scaled", "shares", "context", "turned", "v_split"])
def test_a_value_in_between_with_two_readers_is_refused(tmp_path: Path, value: str) -> None:
    assert f"'{value}' has another reader" in refused(attention(extra=(NODE("Relu", [value], ["out"]),)), tmp_path)


def test_projections_with_another_reader_stay_outside(tmp_path: Path) -> None:
    model = attention(extra=(NODE("Relu", ["k_out"], ["out"]),))
    assert built(model, batches(model), tmp_path).counts == {FORMED_ANY: 1}
    assert "'k_out' has another reader" in refusals(model, SELF)


def test_who_asks_for_a_shape_only_is_no_reader(tmp_path: Path) -> None:
    model = attention(extra=(NODE("Shape", ["q_heads"], ["out"]),))
    assert built(model, batches(model), tmp_path).counts == {FORMED: 1}


def test_scores_replaced_by_a_small_number_are_refused(tmp_path: Path) -> None:
    assert "scores are replaced by -10000.0" in refused(attention(mask="replaced-near"), tmp_path)


def test_a_mask_that_would_make_the_result_larger_is_refused(tmp_path: Path) -> None:
    assert "the mask 'bias' has batch 2, the scores have 1" in refused(attention(mask="pair"), tmp_path)


def test_heads_that_are_joined_otherwise_are_refused(tmp_path: Path) -> None:
    reason = "the heads are not joined to batch, length and hidden size"
    assert reason in refused(attention(join=(0, 1, 2, 3)), tmp_path)


def edited(node_output: str, **changes: object) -> onnx.ModelProto:
    """Return the attention with another operator or attribute at one place."""
    model = attention()
    node = next(node for node in model.graph.node if node.output[0] == node_output)
    for name, value in changes.items():
        if name == "op_type":
            node.op_type = str(value)
            del node.attribute[:]
        else:
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute(name, value))
    return model


def test_a_softmax_over_another_axis_is_refused(tmp_path: Path) -> None:
    assert "nothing is multiplied by a softmax" in refused(edited("shares", axis=2), tmp_path)


def test_queries_laid_out_otherwise_are_refused(tmp_path: Path) -> None:
    """With as many positions as heads the shapes agree, and only the order of the axes tells the difference."""
    model = edited("q_heads", perm=[0, 1, 2, 3])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = HEADS
    assert "not laid out as batch, heads, length and head size" in refused(model, tmp_path)


def test_a_scale_that_is_not_constant_is_refused(tmp_path: Path) -> None:
    model = attention()
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "root"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(onnx.helper.make_tensor_value_info("root", onnx.TensorProto.FLOAT, []))
    assert "not taken of a scaled product and a mask" in refused(model, tmp_path)


def test_weights_that_are_inputs_need_the_operator_without_weights(tmp_path: Path) -> None:
    model = attention()
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "k"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [HIDDEN, HIDDEN]))
    given = [batch | {"k": normal(HIDDEN, HIDDEN)} for batch in batches(model)]
    assert built(model, given, tmp_path).counts == {FORMED_ANY: 1}
    assert "q, k and v are not all products with constant weights" in refusals(model, SELF)


def test_a_split_of_unknown_shape_is_refused(tmp_path: Path) -> None:
    model = attention()
    for node in model.graph.node:
        node.input[:] = ["given" if name == "split" else name for name in node.input]
    model.graph.input.append(onnx.helper.make_tensor_value_info("given", onnx.TensorProto.INT64, [4]))
    assert "how 'q_out' is split into heads is not known" in refused(model, tmp_path)
