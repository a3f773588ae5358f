"""Bias correction: means of an INT8 model return to those of its reference, and only biases change."""

import msgspec
import numpy as np
import pytest
from onnx import helper, numpy_helper

from optimizers.errors import PassFailed
from optimizers.graph import save_model
from optimizers.passes.bias_correction import BiasCorrection
from optimizers.passes.check import answers
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from tests.optimizers.graphs import NODE, WITHOUT_DOT, context_of, model_of, normal, weights_of


def _inputs(count, *shape, seed=0):
    """Non-negative samples, as behind a ReLU: their mean makes a bias of every rounding error."""
    return np.maximum(normal(count, *shape, seed=seed) + 1, 0)


def _cnn(depth=4, opset=17):
    nodes, weights, before = [], {}, "x"
    for index in range(depth):
        weights[f"w{index}"] = normal(8, 3 if index == 0 else 8, 3, 3, seed=index) * np.float32(0.2)
        weights[f"b{index}"] = normal(8, seed=50 + index) * np.float32(0.1)
        inputs = [before, f"w{index}", f"b{index}"]
        nodes.append(NODE("Conv", inputs, [f"c{index}"], name=f"conv{index}", pads=[1, 1, 1, 1]))
        nodes.append(NODE("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        before = f"r{index}"
    nodes += [NODE("GlobalAveragePool", [before], ["p"], name="pool"), NODE("Flatten", ["p"], ["f"], name="flatten")]
    nodes.append(NODE("Gemm", ["f", "w", "b"], ["y"], name="head"))
    weights |= {"w": normal(8, 6, seed=70), "b": normal(6, seed=71)}
    return model_of(nodes, {"x": [None, 3, 8, 8]}, {"y": [None, 6]}, weights, opset=opset)


def _mlp(depth=6):
    nodes, weights, before = [], {}, "x"
    for index in range(depth):
        weights[f"w{index}"] = normal(32, 32, seed=index) * np.float32(0.25)
        weights[f"b{index}"] = normal(32, seed=50 + index) * np.float32(0.1)
        nodes.append(NODE("MatMul", [before, f"w{index}"], [f"m{index}"], name=f"matmul{index}"))
        nodes.append(NODE("Add", [f"m{index}", f"b{index}"], [f"a{index}"], name=f"add{index}"))
        nodes.append(NODE("Relu", [f"a{index}"], [f"r{index}"], name=f"relu{index}"))
        before = f"r{index}"
    nodes.append(NODE("Neg", [before], ["y"], name="last"))
    return model_of(nodes, {"x": [None, 4, 32]}, {"y": [None, 4, 32]}, weights)


def _context(work, model, batches):
    save_model(model, work / "reference.onnx")
    return msgspec.structs.replace(context_of(work, batches, WITHOUT_DOT), reference=work / "reference.onnx")


def _sqnr(model, candidate, x, work):
    expected, seen = (answers(each, [{"x": x}], work)[0]["y"].astype(np.float64) for each in (model, candidate))
    return 10 * np.log10((expected**2).sum() / ((expected - seen) ** 2).sum())


def _batches(*shape):
    return [{"x": _inputs(count, *shape, seed=count)} for count in (96, 33)]


CASES = [
    pytest.param(_cnn(), (3, 8, 8), Int8Static(), 5.0, 5, id="static-cnn"),
    pytest.param(_cnn(opset=18), (3, 8, 8), Int8Static(), 5.0, 5, id="static-cnn-opset-18"),
    pytest.param(_mlp(), (4, 32), Int8Static(), 1.0, 6, id="static-mlp"),
    pytest.param(_mlp(), (4, 32), Int8Dynamic(), 1.0, 6, id="dynamic-mlp"),
    pytest.param(_cnn(), (3, 8, 8), Int8Dynamic(), 0.5, 1, id="dynamic-cnn-with-fp32-convolutions"),
    pytest.param(_cnn(), (3, 8, 8), Int8Static(target="tensorrt"), 3.0, 5, id="tensorrt-cnn-with-fp32-biases"),
]


@pytest.mark.parametrize(("model", "shape", "quantizer", "gain", "layers"), CASES)
def test_held_out_outputs_come_nearer_and_only_biases_change(tmp_path, model, shape, quantizer, gain, layers):
    context = _context(tmp_path, model, _batches(*shape))
    quantized = quantizer.run(model, context).model
    before = quantized.SerializeToString(deterministic=True)
    result = BiasCorrection().run(quantized, context)
    held_out = _inputs(128, *shape, seed=7)
    gained = _sqnr(model, result.model, held_out, tmp_path) - _sqnr(model, quantized, held_out, tmp_path)
    assert gained > gain, f"gained {gained:.2f} dB"
    assert result.counts["corrected"] == layers
    assert result.note.endswith("dB on the calibration data")
    assert quantized.SerializeToString(deterministic=True) == before
    twin = type(quantized)()
    twin.CopyFrom(result.model)
    old, new = weights_of(quantized), weights_of(twin)
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert len(moved) == layers
    assert all(name.startswith("b") for name in moved)
    assert {name: (a.shape, a.dtype) for name, a in old.items()} == {
        name: (a.shape, a.dtype) for name, a in new.items()
    }
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(quantized.graph.initializer)
    assert twin.SerializeToString(deterministic=True) == before


def test_means_of_every_corrected_layer_are_those_of_the_reference(tmp_path):
    model = _mlp(4)
    context = _context(tmp_path, model, _batches(4, 32))
    quantized = Int8Dynamic().run(model, context).model
    corrected = BiasCorrection().run(quantized, context).model
    x = np.concatenate([batch["x"] for batch in context.calibration])
    for index in range(4):
        means = []
        for each in (model, quantized, corrected):
            watched = type(each)()
            watched.CopyFrom(each)
            watched.graph.output.append(helper.make_tensor_value_info(f"a{index}", 1, None))
            means.append(answers(watched, [{"x": x}], tmp_path)[0][f"a{index}"].reshape(-1, 32).mean(axis=0))
        old, new = (np.abs(mean - means[0]).max() for mean in means[1:])
        assert new < 0.1 * old, f"layer {index}"


def test_every_level_counts_and_fewer_levels_correct_less(tmp_path):
    model = _mlp()
    context = _context(tmp_path, model, _batches(4, 32))
    quantized = Int8Static().run(model, context).model
    results = [BiasCorrection(levels=levels).run(quantized, context) for levels in (1, 3, 6)]
    assert [result.counts["corrected"] for result in results] == [1, 3, 6]
    assert [result.counts.get("skipped", 0) for result in results] == [5, 3, 0]
    old = weights_of(quantized)
    new = weights_of(results[0].model)
    assert {name for name in old if not np.array_equal(old[name], new[name])} == {"b5"}, "the last level is among them"
    held_out = _inputs(128, 4, 32, seed=7)
    worst, some, best = (_sqnr(model, result.model, held_out, tmp_path) for result in results)
    assert _sqnr(model, quantized, held_out, tmp_path) < worst < some < best


def test_a_known_error_of_a_bias_is_found(tmp_path):
    weights = {"w": normal(4, 3), "b": np.float32([1, 2, 3])}
    nodes = [NODE("Gemm", ["x", "w", "b"], ["y"], name="gemm", beta=2.0)]
    model = model_of(nodes, {"x": [None, 4]}, {"y": [None, 3]}, weights)
    wrong = model_of(nodes, {"x": [None, 4]}, {"y": [None, 3]}, weights | {"b": np.float32([1, 2.5, 2])})
    result = BiasCorrection().run(wrong, _context(tmp_path, model, [{"x": normal(8, 4)}]))
    np.testing.assert_allclose(weights_of(result.model)["b"], [1, 2, 3], rtol=1e-5)


@pytest.mark.parametrize("op_type", ["Conv", "Gemm"])
def test_quantized_biases_move_by_whole_steps_of_their_own_scale(tmp_path, op_type):
    shape, kernel, out = ((4,), (4, 3), [None, 3]) if op_type == "Gemm" else ((4, 5), (3, 4, 2), [None, 3, 4])
    node = NODE(op_type, ["x", "w", "b"], ["h"], name="layer")
    sizes = np.float32([1, 5, 9]) if op_type == "Gemm" else np.float32([[[1]], [[5]], [[9]]])
    weights = {"w": normal(*kernel) * sizes}
    model = model_of([node, NODE("Relu", ["h"], ["y"])], {"x": [None, *shape]}, {"y": out}, weights | {"b": normal(3)})
    batches = [{"x": _inputs(16, *shape)}]
    right = Int8Static().run(model, context_of(tmp_path, batches)).model
    wrong = type(right)()
    wrong.CopyFrom(right)
    bias = next(tensor for tensor in wrong.graph.initializer if tensor.name == "b_quantized")
    codes = numpy_helper.to_array(bias)
    bias.CopyFrom(numpy_helper.from_array(codes + np.int32([300, -200, 100]), bias.name))
    context = _context(tmp_path, model, batches)
    seen = [weights_of(BiasCorrection().run(each, context).model)["b_quantized"] for each in (wrong, right)]
    assert np.array_equal(*seen), "the same steps, wherever the bias started"
    assert np.abs(seen[0] - codes).max() < 100


def test_biases_that_the_model_also_returns_stay(tmp_path):
    weights = {"w": normal(4, 3), "b": normal(3)}
    node = NODE("Gemm", ["x", "w", "b"], ["y"], name="gemm")
    model = model_of([node], {"x": [None, 4]}, {"y": [None, 3], "b": [3]}, weights)
    with pytest.raises(PassFailed, match="none of 1 layers has a bias of its own"):
        BiasCorrection().run(model, _context(tmp_path, model, [{"x": normal(8, 4)}]))


def test_a_model_without_errors_stays_as_it_is(tmp_path):
    model = _mlp(2)
    result = BiasCorrection().run(model, _context(tmp_path, model, _batches(4, 32)))
    assert not result.changed
    assert result.model is model
    assert "no nearer" in result.note


def test_corrections_that_hurt_the_outputs_are_not_kept(tmp_path):
    # Abs hides the wrong sign of the weight; with the mean restored, 1, 2, 3 would become 3, 2, 1.
    nodes = [NODE("MatMul", ["x", "w"], ["m"]), NODE("Add", ["m", "b"], ["a"]), NODE("Abs", ["a"], ["y"])]
    weights = {"w": np.eye(1, dtype=np.float32), "b": np.float32([0])}
    shapes = {"x": [None, 1]}, {"y": [None, 1]}
    model, other = model_of(nodes, *shapes, weights), model_of(nodes, *shapes, weights | {"w": -weights["w"]})
    result = BiasCorrection().run(other, _context(tmp_path, model, [{"x": np.float32([[1], [2], [3]])}]))
    assert not result.changed
    assert result.model is other


def test_biases_that_other_nodes_read_stay(tmp_path):
    weights = {"w": normal(32, 32), "v": normal(32, 32, seed=1), "b": normal(32, seed=2), "own": normal(32, seed=3)}
    nodes = [
        NODE("Gemm", ["x", "w", "b"], ["h"], name="first"),
        NODE("Relu", ["h"], ["r"]),
        NODE("Gemm", ["r", "v", "own"], ["s"], name="second"),
        NODE("Add", ["s", "b"], ["y"]),
    ]
    model = model_of(nodes, {"x": [None, 32]}, {"y": [None, 32]}, weights)
    context = _context(tmp_path, model, _batches(32))
    quantized = Int8Dynamic().run(model, context).model
    result = BiasCorrection().run(quantized, context)
    assert result.counts == {"corrected": 1, "skipped": 1}
    assert np.array_equal(weights_of(result.model)["b"], weights["b"])
    assert not np.array_equal(weights_of(result.model)["own"], weights["own"])


def test_subgraphs_that_read_layers_do_not_matter(tmp_path):
    branch = helper.make_graph([NODE("Neg", ["a"], ["n"])], "branch", [], [helper.make_tensor_value_info("n", 1, None)])
    nodes = [
        NODE("MatMul", ["x", "w"], ["m"], name="m"),
        NODE("Add", ["m", "b"], ["a"], name="a"),
        NODE("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
        NODE("MatMul", ["z", "v"], ["n2"], name="n"),
        NODE("Add", ["n2", "c"], ["y"], name="c"),
    ]
    weights = {"w": normal(32, 32), "b": normal(32, seed=1), "v": normal(32, 8, seed=2), "c": normal(8, seed=3)}
    model = model_of(nodes, {"x": [None, 32]}, {"y": [None, 8]}, weights)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    context = _context(tmp_path, model, _batches(32))
    wrong = model_of(
        nodes, {"x": [None, 32]}, {"y": [None, 8]}, weights | {"b": weights["b"] + 1, "c": weights["c"] - 1}
    )
    wrong.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    result = BiasCorrection().run(wrong, context)
    assert result.counts == {"corrected": 2}
    for name in ("b", "c"):
        np.testing.assert_allclose(weights_of(result.model)[name], weights[name], atol=1e-4)
    # onnxruntime's quantizer sorts the nodes without regard to what subgraphs read.
    quantized = BiasCorrection().run(Int8Dynamic().run(model, context).model, context)
    assert quantized.counts == {"corrected": 2}


def test_what_is_missing_is_named(tmp_path):
    model = _mlp(2)
    context = _context(tmp_path, model, _batches(4, 32))
    with pytest.raises(PassFailed, match="no calibration data"):
        BiasCorrection().run(model, msgspec.structs.replace(context, calibration=()))
    with pytest.raises(PassFailed, match="no unquantized model"):
        BiasCorrection().run(model, msgspec.structs.replace(context, reference=None))
    bare = model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": [None, 4]}, {"y": [None, 4]}, {"w": normal(4, 4)})
    with pytest.raises(PassFailed, match="none of 1 layers has a bias of its own"):
        BiasCorrection().run(bare, _context(tmp_path, bare, [{"x": normal(2, 4)}]))


def test_the_pass_takes_and_makes_int8():
    spec = BiasCorrection().spec
    assert (spec.consumes, spec.produces, spec.effect) == ("int8", "int8", "lossy")
    assert spec.needs == {"calibration", "reference"}
