"""AdaRound: its codes survive onnxruntime's quantizer, and the outputs move nearer to the original ones."""

import msgspec
import numpy as np
import pytest
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.passes.adaround import AdaRound, as_channels, channel_errors, channel_scales, learned_codes, shrunk
from optimizers.passes.check import answers
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.moments import InputMoments
from tests.optimizers.graphs import NODE, WITH_DOT, WITHOUT_DOT, context_of, model_of, normal, weights_of

QUICK = AdaRound(steps=100)


def _inputs(count, *shape, seed=0):
    """Non-negative, correlated samples, as behind a ReLU."""
    mixing = normal(shape[0], shape[0], seed=99) / np.sqrt(shape[0])
    flat = np.einsum("ij,nj...->ni...", mixing, normal(count, *shape, seed=seed))
    return np.maximum(flat + 0.3, 0).astype(np.float32)


def _mlp():
    nodes = [
        NODE("Gemm", ["x", "w1", "b1"], ["h"], name="first", transB=1),
        NODE("Relu", ["h"], ["r"], name="relu"),
        NODE("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    weights = {"w1": normal(48, 32, seed=1), "b1": normal(48, seed=2), "w2": normal(48, 24, seed=3)}
    return model_of(nodes, {"x": [None, 32]}, {"y": [None, 24]}, weights)


def _cnn():
    nodes = [
        NODE("Conv", ["x", "w1", "b1"], ["c"], name="first", pads=[1, 1, 1, 1]),
        NODE("Relu", ["c"], ["r"], name="relu"),
        NODE("Conv", ["r", "w2", "b2"], ["d"], name="depthwise", group=8, pads=[1, 1, 1, 1], strides=[2, 2]),
        NODE("Conv", ["d", "w3"], ["y"], name="pointwise"),
    ]
    weights = {"w1": normal(8, 3, 3, 3, seed=1), "b1": normal(8, seed=2), "w2": normal(8, 1, 3, 3, seed=3)}
    weights |= {"b2": normal(8, seed=4), "w3": normal(12, 8, 1, 1, seed=5)}
    return model_of(nodes, {"x": [None, 3, 8, 8]}, {"y": [None, 12, 4, 4]}, weights)


def _calibration(*shape, count=64):
    return [{"x": _inputs(count, *shape, seed=seed)} for seed in (1, 2)]


def _sqnr(model, candidate, x, work, name="y"):
    expected, seen = (answers(each, [{"x": x}], work)[0][name].astype(np.float64) for each in (model, candidate))
    return 10 * np.log10((expected**2).sum() / ((expected - seen) ** 2).sum())


def _codes(quantized, name):
    tensors = weights_of(quantized)
    stem = name if f"{name}_quantized" in tensors else f"{name}_Transposed"
    return tensors[f"{stem}_quantized"].astype(np.int32), tensors[f"{stem}_scale"]


@pytest.mark.parametrize(("host", "largest"), [(WITH_DOT, 127), (WITHOUT_DOT, 64)])
@pytest.mark.parametrize("quantizer", [Int8Static(), Int8Dynamic()], ids=["static", "dynamic"])
def test_the_quantizer_finds_exactly_the_learned_codes_and_the_old_scales(tmp_path, host, largest, quantizer):
    model = _mlp()
    context = context_of(tmp_path, _calibration(32), host)
    rounded = QUICK.run(model, context)
    assert rounded.counts == {"rounded": 2}
    after, plain = (quantizer.run(each, context).model for each in (rounded.model, model))
    for node, name in ((rounded.model.graph.node[0], "w1"), (rounded.model.graph.node[2], "w2")):
        before, weight = (as_channels(node, weights_of(each)[name])[0] for each in (model, rounded.model))
        expected = np.rint(weight / channel_scales(before, largest)).astype(np.int32)
        codes, scales = _codes(after, name)
        nearest, old_scales = _codes(plain, name)
        codes = codes.T if codes.shape != expected.shape else codes
        nearest = nearest.T if nearest.shape != expected.shape else nearest
        assert np.array_equal(codes, expected)
        assert np.array_equal(scales, old_scales)
        assert np.array_equal(scales, channel_scales(before, largest).ravel())
        assert np.abs(codes - nearest).max() == 1, "some weights must be rounded the other way"
        assert np.abs(codes).max() == largest
        moved = (codes != nearest).any(axis=1)
        assert moved.mean() > 0.9, "a channel whose error did not fall keeps its weights"
        assert np.abs(weight / scales[:, np.newaxis] - codes)[moved].max() < 1e-3
        assert np.array_equal(weight[~moved], before[~moved])


@pytest.mark.parametrize(("make", "shape"), [(_mlp, (32,)), (_cnn, (3, 8, 8))], ids=["mlp", "cnn"])
def test_held_out_outputs_of_reduced_weights_come_nearer_to_the_original(tmp_path, make, shape):
    model = make()
    context = context_of(tmp_path, _calibration(*shape), WITHOUT_DOT)
    result = QUICK.run(model, context)
    assert result.changed
    assert "kept" not in result.counts
    assert "skipped" not in result.counts
    held_out = _inputs(64, *shape, seed=7)
    plain, learned = (_grid(each, result.model) for each in (model, result.model))
    gain = _sqnr(model, learned, held_out, tmp_path) - _sqnr(model, plain, held_out, tmp_path)
    assert gain > 1.5, f"gained {gain:.2f} dB"


def _grid(model, rounded):
    """Return a model with its weights rounded to nearest on the 7-bit grid, without rounding its activations."""
    twin = type(model)()
    twin.CopyFrom(model)
    by_name = {node.input[1]: node for node in rounded.graph.node if len(node.input) > 1}
    for tensor in twin.graph.initializer:
        if tensor.name not in by_name or len(tensor.dims) < 2:
            continue
        node = by_name[tensor.name]
        weight = weights_of(model)[tensor.name]
        channels = as_channels(node, weight)
        scales = channel_scales(channels, 64)
        snapped = np.rint(channels / scales) * scales
        matrix = node.op_type == "MatMul"
        tensor.raw_data = np.ascontiguousarray(snapped[0].T if matrix else snapped.reshape(weight.shape)).tobytes()
    return twin


def test_static_int8_models_answer_better_after_it(tmp_path):
    model = _mlp()
    context = context_of(tmp_path, _calibration(32), WITHOUT_DOT)
    plain, learned = (Int8Static().run(m, context).model for m in (model, QUICK.run(model, context).model))
    held_out = _inputs(64, 32, seed=7)
    assert _sqnr(model, learned, held_out, tmp_path) > _sqnr(model, plain, held_out, tmp_path) + 0.4


def test_sweeps_alone_find_a_better_rounding_than_the_nearest_and_descent_a_better_one_still():
    channels, x = normal(1, 40, 64, seed=1), _inputs(2000, 64, seed=2)
    gram, scales = (x.T @ x / len(x)).astype(np.float64), channel_scales(channels, 64)
    codes = [np.rint(channels / scales), *(learned_codes(channels, scales, 64, gram, steps) for steps in (0, 300))]
    nearest, swept, descended = (channel_errors(each * scales - channels, gram).sum() for each in codes)
    assert swept < 0.6 * nearest
    assert descended < 0.95 * swept
    for each in codes[1:]:
        assert np.abs(each - channels / scales).max() < 1.001
        assert np.abs(each).max() == 64


def test_few_rows_pull_the_moments_towards_independent_columns():
    x = _inputs(8, 16, seed=3).astype(np.float64)
    mean, gram = x.mean(axis=0), x.T @ x / 8
    few, many = (shrunk(InputMoments(rows, mean, gram)) for rows in (8, 10**9))
    np.testing.assert_allclose(many, gram, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.diag(few), np.diag(gram), rtol=1e-6)
    centred = gram - np.outer(mean, mean)
    np.testing.assert_allclose((few - np.outer(mean, mean))[0, 1], centred[0, 1] / 3)


def test_weights_on_the_grid_already_stay_as_they_are(tmp_path):
    weight = np.diag(np.float32([1, 2, 4, 8]))
    model = model_of([NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": [None, 4]}, {"y": [None, 4]}, {"w": weight})
    result = QUICK.run(model, context_of(tmp_path, _calibration(4)))
    assert not result.changed
    assert result.model is model
    assert result.counts == {"kept": 1}
    assert "nearest is best" in result.note


def test_channels_of_zeros_and_tiny_channels_stay_as_they_are(tmp_path):
    weight = normal(16, 8)
    weight[:, 2], weight[:, 5] = 0, weight[:, 5] * 1e-38
    model = model_of([NODE("MatMul", ["x", "w"], ["y"], name="m")], {"x": [None, 16]}, {"y": [None, 8]}, {"w": weight})
    result = QUICK.run(model, context_of(tmp_path, _calibration(16)))
    after = weights_of(result.model)["w"]
    assert result.changed
    assert np.array_equal(after[:, [2, 5]], weight[:, [2, 5]])
    assert np.isfinite(after).all()


def test_nodes_that_share_a_weight_learn_their_own(tmp_path):
    nodes = [NODE("MatMul", ["x", "w"], ["h"], name="a"), NODE("Relu", ["h"], ["r"]), NODE("MatMul", ["r", "w"], ["y"])]
    model = model_of(nodes, {"x": [None, 16]}, {"y": [None, 16]}, {"w": normal(16, 16)})
    before = model.SerializeToString(deterministic=True)
    result = QUICK.run(model, context_of(tmp_path, _calibration(16)))
    assert result.counts == {"rounded": 2}
    first, _, second = result.model.graph.node
    assert first.input[1] != second.input[1]
    assert first.name == "a"
    assert [value.name for value in result.model.graph.output] == ["y"]
    assert model.SerializeToString(deterministic=True) == before


def test_layers_that_are_too_wide_or_shared_are_skipped(tmp_path):
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"], name="wide"),
        NODE("Unsqueeze", ["h", "one"], ["u"], name="unsqueeze"),
        NODE("Conv", ["u", "v"], ["a"], name="first", pads=[1, 1]),
        NODE("Conv", ["a", "v"], ["b"], name="second", pads=[1, 1]),
        NODE("Conv", ["b", "o"], ["y"], name="own", pads=[1, 1]),
    ]
    weights = {"w": normal(2501, 8), "v": normal(1, 1, 3), "o": normal(4, 1, 3, seed=1), "one": np.int64([1])}
    model = model_of(nodes, {"x": [None, 2501]}, {"y": [None, 4, 8]}, weights)
    result = QUICK.run(model, context_of(tmp_path, [{"x": normal(16, 2501)}]))
    assert result.counts == {"rounded": 1, "skipped": 3}
    after = weights_of(result.model)
    assert [name for name in weights if not np.array_equal(after[name], weights[name])] == ["o"]


def test_weights_that_a_subgraph_reads_stay(tmp_path):
    branch = helper.make_graph(
        [NODE("MatMul", ["x", "v"], ["b"])], "branch", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    nodes = [
        NODE("MatMul", ["x", "v"], ["s"], name="shared"),
        NODE("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
        NODE("Add", ["s", "z"], ["t"]),
        NODE("MatMul", ["t", "u"], ["y"], name="own"),
    ]
    weights = {"v": normal(16, 16), "u": normal(16, 8), "yes": np.array(True)}
    model = model_of(nodes, {"x": [None, 16]}, {"y": [None, 8]}, weights)
    after = weights_of(QUICK.run(model, context_of(tmp_path, _calibration(16))).model)
    assert np.array_equal(after["v"], weights["v"])
    assert not np.array_equal(after["u"], weights["u"])


def test_nodes_that_stay_in_float_keep_their_weights(tmp_path):
    model = _mlp()
    result = AdaRound(steps=20, keep=("first",)).run(model, context_of(tmp_path, _calibration(32)))
    assert result.counts == {"rounded": 1}
    before, after = weights_of(model), weights_of(result.model)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["w2"]


def test_convolutions_stay_when_they_will_not_be_quantized(tmp_path):
    context = context_of(tmp_path, _calibration(3, 8, 8, count=4))
    with pytest.raises(PassFailed, match="no Gemm, MatMul has a constant weight"):
        AdaRound(convolutions=False).run(_cnn(), context)


def test_weights_for_tensorrt_have_8_bits_on_every_host(tmp_path):
    model = _mlp()
    results = [
        AdaRound(steps=20, target=target).run(model, context_of(tmp_path, _calibration(32), host)).model
        for target, host in (("tensorrt", WITHOUT_DOT), ("cpu", WITH_DOT), ("cpu", WITHOUT_DOT))
    ]
    tensorrt, eight_bits, seven_bits = (weights_of(each)["w2"] for each in results)
    assert np.array_equal(tensorrt, eight_bits)
    assert not np.array_equal(tensorrt, seven_bits)
    assert "host" not in AdaRound(target="tensorrt").spec.needs
    assert AdaRound().spec.needs == {"calibration", "host"}


def test_settings_are_part_of_the_value():
    assert msgspec.json.encode(AdaRound()) != msgspec.json.encode(AdaRound(steps=1))


def test_no_calibration_data_and_no_weights_are_refused(tmp_path):
    with pytest.raises(PassFailed, match="no calibration data"):
        AdaRound().run(_mlp(), context_of(tmp_path))
    bare = model_of([NODE("Relu", ["x"], ["y"])], {"x": [None, 2]}, {"y": [None, 2]})
    with pytest.raises(PassFailed, match="no Conv, Gemm, MatMul has a constant weight"):
        AdaRound().run(bare, context_of(tmp_path, [{"x": normal(1, 2)}]))
