import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import check, foreign_ops, op_counts, signature_of
from optimizers.passes import cpu_build, fusion
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.cpu_build import BUILT_FOR, CpuBuild
from optimizers.passes.fusion import OrtBasic
from server.artifact import SessionOptions
from tests.models import save_cnn, save_mlp
from tests.optimizers.encoders import attention, embeddings
from tests.optimizers.graphs import NODE, WITH_DOT, context_of, model_of, normal

SIZE, HEADS, LONG = 32, 4, 6
IMAGE = {"image": normal(3, 3, 16, 16)}
TOKENS = {"x": normal(2, LONG, SIZE, seed=3)}


def encoder() -> onnx.ModelProto:
    """One layer of a transformer encoder: attention, a network of two products with GELU, both with a residual."""
    weights = {name: normal(SIZE, SIZE, seed=index, scale=0.2) for index, name in enumerate("qkvop")}
    weights |= {f"{name}_bias": normal(SIZE, seed=index + 9) for index, name in enumerate("qkvop")}
    weights |= {"gamma": normal(SIZE, seed=20) + 1, "beta": normal(SIZE, seed=21), "root": np.sqrt(np.float32(8))}
    weights |= {"root2": np.sqrt(np.float32(2)), "one": np.float32(1), "half": np.float32(0.5)}
    weights |= {"split": np.array([0, 0, HEADS, SIZE // HEADS]), "join": np.array([0, 0, SIZE])}
    nodes = [NODE("LayerNormalization", ["x", "gamma", "beta"], ["n"])]
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += linear("n", name)
        nodes += [NODE("Reshape", [f"{name}_out", "split"], [f"{name}_split"])]
        nodes += [NODE("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=perm)]
    nodes += [NODE("MatMul", ["q_heads", "k_heads"], ["scores"]), NODE("Div", ["scores", "root"], ["scaled"])]
    nodes += [NODE("Softmax", ["scaled"], ["shares"], axis=-1), NODE("MatMul", ["shares", "v_heads"], ["mixed"])]
    nodes += [NODE("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]), NODE("Reshape", ["turned", "join"], ["all"])]
    nodes += [*linear("all", "o"), NODE("Add", ["o_out", "n"], ["residual"])]
    nodes += [NODE("LayerNormalization", ["residual", "gamma", "beta"], ["m"]), *linear("m", "p")]
    nodes += [NODE("Div", ["p_out", "root2"], ["d"]), NODE("Erf", ["d"], ["e"]), NODE("Add", ["e", "one"], ["f"])]
    nodes += [NODE("Mul", ["p_out", "f"], ["g"]), NODE("Mul", ["g", "half"], ["y"])]
    shape = ["batch", LONG, SIZE]
    return model_of(nodes, {"x": shape}, {"y": shape}, {name: np.asarray(a) for name, a in weights.items()})


def linear(source: str, name: str) -> list[onnx.NodeProto]:
    product = NODE("MatMul", [source, name], [f"{name}_product"])
    return [product, NODE("Add", [f"{name}_product", f"{name}_bias"], [f"{name}_out"])]


def ops_when_opened(model: onnx.ModelProto, level: str, work: Path) -> dict[str, int]:
    """Return the operators that a session of the model runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    options.optimized_model_filepath = str(work / "opened.onnx")
    options.log_severity_level = 3
    onnx.save(model, work / "given.onnx")
    onnxruntime.InferenceSession(work / "given.onnx", options, providers=["CPUExecutionProvider"])
    return op_counts(onnx.load(work / "opened.onnx"))


def test_convolutions_get_the_layout_of_this_cpu(tmp_path: Path) -> None:
    model = onnx.load(save_cnn(tmp_path / "model.onnx"))
    before = model.SerializeToString()
    result = CpuBuild().run(model, context_of(tmp_path))
    assert model.SerializeToString() == before
    assert result.counts["com.microsoft.nchwc:Conv"] == 1
    assert signature_of(result.model) == signature_of(model)
    assert {entry.key: entry.value for entry in result.model.metadata_props}[BUILT_FOR] == WITH_DOT.fingerprint
    require_equivalent(model, result, CpuBuild().spec.effect, [IMAGE], tmp_path)


def test_the_result_is_valid_and_imports_only_domains_that_it_uses(tmp_path: Path) -> None:
    result = CpuBuild().run(onnx.load(save_cnn(tmp_path / "model.onnx")), context_of(tmp_path))
    check(result.model)
    used = {node.domain for node in result.model.graph.node} | {""}
    assert {entry.domain for entry in result.model.opset_import} == used


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_ALL"])
def test_the_result_is_opened_without_being_transformed_again(tmp_path: Path, level: str) -> None:
    for model in (onnx.load(save_cnn(tmp_path / "model.onnx")), encoder()):
        result = CpuBuild().run(model, context_of(tmp_path))
        assert result.options.graph_level == "disable"
        assert ops_when_opened(result.model, level, tmp_path) == op_counts(result.model)


def test_a_transformer_encoder_gets_fused_operators(tmp_path: Path) -> None:
    model = encoder()
    result = CpuBuild().run(model, context_of(tmp_path))
    assert result.counts["com.microsoft:Attention"] == 1
    assert result.counts["com.microsoft:BiasGelu"] == 1
    assert result.counts["com.microsoft:SkipLayerNormalization"] == 1
    assert result.note == "by rules: 1 x Attention; with onnxruntime's encoder rules"
    assert signature_of(result.model) == signature_of(model)
    require_equivalent(model, result, CpuBuild().spec.effect, [TOKENS], tmp_path)


def test_a_fusion_that_does_not_pay_can_be_left_out(tmp_path: Path) -> None:
    model = encoder()
    step = CpuBuild(disabled=("SkipLayerNormFusion",))
    result = step.run(model, context_of(tmp_path))
    assert "com.microsoft:SkipLayerNormalization" not in result.counts
    assert result.options.config == {"optimization.disable_specified_optimizers": "SkipLayerNormFusion"}
    require_equivalent(model, result, step.spec.effect, [TOKENS], tmp_path)
    opened = SessionOptions(graph_level="all", config=result.options.config)
    np.testing.assert_allclose(
        answers(result.model, [TOKENS], tmp_path, opened)[0]["y"],
        answers(model, [TOKENS], tmp_path)[0]["y"],
        1e-3,
        1e-4,
    )


@pytest.mark.parametrize("fusions", [(), ("embedding",)])
def test_attention_can_be_left_out(tmp_path: Path, fusions: tuple) -> None:
    step = CpuBuild(fusions=fusions)
    result = step.run(encoder(), context_of(tmp_path))
    assert "com.microsoft:Attention" not in result.counts
    assert result.note == "with onnxruntime's encoder rules"
    require_equivalent(encoder(), result, step.spec.effect, [TOKENS], tmp_path)


def test_embeddings_and_attention_are_formed_with_the_sums_between_them(tmp_path: Path) -> None:
    """The shapes that the embeddings give let onnxruntime fuse the sums that follow."""
    model = embeddings("slice-of-table")
    layer = attention(mask="none")
    for node in layer.graph.node:
        node.input[:] = [f"layer_{name}" if name != "x" else "y" for name in node.input]
        node.output[:] = [f"layer_{name}" for name in node.output]
        model.graph.node.append(node)
    for tensor in layer.graph.initializer:
        tensor.name = f"layer_{tensor.name}"
        model.graph.initializer.append(tensor)
    model.graph.node.append(NODE("Add", ["layer_y", "y"], ["sum2"]))
    model.graph.node.append(NODE("LayerNormalization", ["sum2", "gamma", "beta"], ["out"]))
    model.graph.output[0].name = "out"
    result = CpuBuild(encoder_fusions=False).run(model, context_of(tmp_path))
    assert result.counts == {
        "com.microsoft:Attention": 1,
        "com.microsoft:EmbedLayerNormalization": 1,
        "com.microsoft:SkipLayerNormalization": 1,
    }
    assert result.note == "by rules: 1 x EmbedLayerNormalization, 1 x Attention"
    ids = np.arange(10).reshape(2, 5)
    require_equivalent(model, result, CpuBuild().spec.effect, [{"ids": ids, "segments": ids % 2}], tmp_path)


@pytest.mark.parametrize(
    ("tool", "note"),
    [
        ("optimize_model", "by rules: 1 x Attention; without onnxruntime's encoder rules: KeyError: 'shape'"),
        ("apply_counted", "without rules of our own: KeyError: 'shape'; with onnxruntime's encoder rules"),
    ],
)
def test_rules_that_fail_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, note: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("shape")

    monkeypatch.setattr(cpu_build, tool, fails)
    result = CpuBuild().run(encoder(), context_of(tmp_path))
    assert result.note == note
    assert result.counts["com.microsoft:BiasGelu"] == 1


def test_rules_wait_for_a_softmax_over_one_axis(tmp_path: Path) -> None:
    model = attention()
    model.opset_import[0].version = 12
    result = CpuBuild().run(model, context_of(tmp_path))
    assert "com.microsoft:Attention" not in result.counts


def test_axes_without_a_name_get_none(tmp_path: Path) -> None:
    nodes = [NODE("Conv", ["x", "w"], ["c"]), NODE("Relu", ["c"], ["y"])]
    model = model_of(nodes, {"x": [None, 3, None, 8]}, {"y": [None, 8, None, 6]}, {"w": normal(8, 3, 3, 3)})
    result = CpuBuild().run(model, context_of(tmp_path))
    assert result.changed
    assert signature_of(result.model) == signature_of(model)
    assert "unk" not in str([value.type for value in (*result.model.graph.input, *result.model.graph.output)])


def test_a_model_that_needs_no_operator_of_its_own_is_returned_as_it_is(tmp_path: Path) -> None:
    model = model_of([NODE("Relu", ["x"], ["y"])], {"x": ["batch", 4]}, {"y": ["batch", 4]})
    result = CpuBuild().run(model, context_of(tmp_path))
    assert not result.changed
    assert result.model is model


def test_a_model_that_onnxruntime_cannot_open_is_a_refusal(tmp_path: Path) -> None:
    model = model_of([NODE("Relu", ["x"], ["y"], domain="unknown.domain")], {"x": [1]}, {"y": [1]})
    model.opset_import.append(onnx.helper.make_opsetid("unknown.domain", 1))
    with pytest.raises(PassFailed, match="onnxruntime cannot optimize"):
        CpuBuild().run(model, context_of(tmp_path))


@pytest.mark.parametrize("level", ["ENABLE_EXTENDED", "ENABLE_ALL"])
def test_results_of_higher_levels_are_refused_as_portable_and_accepted_as_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    def optimize(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    model = onnx.load(save_cnn(tmp_path / "model.onnx"))
    monkeypatch.setattr(fusion, "_optimize", optimize)
    with pytest.raises(PassFailed, match=r"not portable: the result holds com\.microsoft"):
        OrtBasic().run(model, context_of(tmp_path))
    assert foreign_ops(CpuBuild().run(model, context_of(tmp_path)).model)


def test_it_declares_that_its_result_is_bound_to_the_host() -> None:
    spec = pickle.loads(pickle.dumps(CpuBuild())).spec
    assert (spec.produces, spec.target, spec.needs) == ("cpu-build", "cpu", {"host"})


def test_weights_in_a_second_file_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(save_mlp(tmp_path / "model.onnx"))
    monkeypatch.setattr("optimizers.graph._LARGEST_FILE_BYTES", 1000)
    result = CpuBuild().run(model, context_of(tmp_path))
    assert result.changed
    sizes = [numpy_helper.to_array(tensor).size for tensor in result.model.graph.initializer]
    assert max(sizes) >= 64 * 10
    require_equivalent(model, result, "tolerance", [{"x": normal(2, 64)}], tmp_path)
