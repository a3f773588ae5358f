from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import op_counts
from optimizers.passes import PassResult
from optimizers.passes.check import require_equivalent
from optimizers.passes.cpu_build import CpuBuild
from optimizers.passes.fuse_embedding import EMBEDDING_RULES
from tests.optimizers.encoders import HIDDEN, LONGEST, ROWS, embeddings
from tests.optimizers.graphs import NODE, context_of
from tests.optimizers.rewriting import refusals

RULES = EMBEDDING_RULES["EmbedLayerNormalization"]
FORMED = "com.microsoft:EmbedLayerNormalization"


def batches(model: onnx.ModelProto, sizes: tuple = ((1, 1), (2, 5), (3, LONGEST))) -> list[dict]:
    names = {value.name for value in model.graph.input}
    rng = np.random.default_rng(3)
    made = [
        {"ids": rng.integers(0, ROWS, size), "segments": rng.integers(0, 2, size), "more": rng.integers(0, 2, size)}
        for size in sizes
    ]
    return [{name: batch[name] for name in names} for batch in made]


def built(model: onnx.ModelProto, given: list[dict], work: Path) -> PassResult:
    """Apply the rules alone; the result must answer as the model does."""
    step = CpuBuild(fusions=("embedding",), encoder_fusions=False)
    result = step.run(model, context_of(work))
    if result.changed:
        require_equivalent(model, result, step.spec.effect, given, work)
    return result


@pytest.mark.parametrize("positions", ["slice-of-ids", "slice-by-words", "range", "counted", "slice-of-table"])
@pytest.mark.parametrize("segments", [True, False])
def test_every_spelling_becomes_one_operator(tmp_path: Path, positions: str, segments: bool) -> None:
    """``slice-of-ids``: BERT of torch.onnx; ``slice-by-words``: DistilBERT of its older exporter; ``counted``: RoBERTa.

    ``range``: computed positions; ``slice-of-table``: the table itself is cut. Without segments: DistilBERT.
    """
    model = embeddings(positions, segments)
    result = built(model, batches(model), tmp_path)
    assert result.counts == {FORMED: 1}
    left = op_counts(result.model)
    assert not left.keys() & {"LayerNormalization", "Add"}
    assert left.get("Gather", 0) <= 1  # the length
    assert [node.name for node in result.model.graph.node if node.op_type == "EmbedLayerNormalization"] == ["normed"]


def test_constant_positions_of_a_fixed_length(tmp_path: Path) -> None:
    """Constant folding leaves the rows themselves where the length is fixed."""
    model = embeddings("constant")
    assert built(model, batches(model, ((1, 5), (4, 5))), tmp_path).counts == {FORMED: 1}


def test_the_words_are_those_that_the_caller_gives_whatever_the_size_of_the_tables(tmp_path: Path) -> None:
    model = embeddings("slice-of-ids", rows=LONGEST - 4)
    given = [{name: array % (LONGEST - 4) for name, array in batch.items()} for batch in batches(model)]
    for batch in given:
        batch["segments"] %= 2
    assert built(model, given, tmp_path).counts == {FORMED: 1}


def test_indices_that_are_int32_already_are_not_cast(tmp_path: Path) -> None:
    model = embeddings("slice-of-table", segments=False)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    given = [{"ids": batch["ids"].astype(np.int32)} for batch in batches(model)]
    result = built(model, given, tmp_path)
    assert result.counts == {FORMED: 1}
    assert "Cast" not in op_counts(result.model)


def refused(model: onnx.ModelProto, work: Path) -> str:
    assert FORMED not in built(model, [], work).counts
    return refusals(model, RULES)


def test_a_sum_that_is_read_again_is_refused(tmp_path: Path) -> None:
    model = embeddings(extra=(NODE("Relu", ["sum"], ["z"]),))
    assert "the sum is not FLOAT, or has another reader" in refused(model, tmp_path)


def test_a_term_that_is_no_lookup_is_refused(tmp_path: Path) -> None:
    model = embeddings(extra=(NODE("Relu", ["p"], ["z"]),))
    assert "2 of 3 terms of the sum are rows of a constant table" in refused(model, tmp_path)


def test_a_table_that_is_an_input_is_refused(tmp_path: Path) -> None:
    model = embeddings()
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "kinds"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(onnx.helper.make_tensor_value_info("kinds", onnx.TensorProto.FLOAT, [2, HIDDEN]))
    assert "2 of 3 terms of the sum are rows of a constant table" in refused(model, tmp_path)


def test_indices_that_no_caller_gives_are_refused(tmp_path: Path) -> None:
    model = embeddings(segments=False)
    model.graph.node.insert(0, NODE("Abs", ["given"], ["ids"]))
    model.graph.input[0].name = "given"
    assert "no indices are given by the caller as [batch, length]" in refused(model, tmp_path)


def test_a_normalization_over_more_than_the_last_axis_is_refused(tmp_path: Path) -> None:
    model = embeddings("constant")
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.attribute.append(onnx.helper.make_attribute("axis", 1))
    for tensor in model.graph.initializer:
        if tensor.name in ("gamma", "beta"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones((5, HIDDEN), np.float32), tensor.name))
    assert "the normalization is not over the last of three axes" in refused(model, tmp_path)


def test_mean_and_deviation_that_are_asked_for_are_refused(tmp_path: Path) -> None:
    model = embeddings(extra=(NODE("Relu", ["mean"], ["z"]),))
    next(node for node in model.graph.node if node.op_type == "LayerNormalization").output.append("mean")
    assert "other uses" in refused(model, tmp_path)
