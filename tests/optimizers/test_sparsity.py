from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.graph import signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.refit import relative_output_error, shrunk
from optimizers.passes.sparsity import Sparsity24, by_place, is_sparse, two_of_four
from server.golden import sqnr_db
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of

SPARSE = Sparsity24()


def model() -> onnx.ModelProto:
    nodes = [
        NODE("Conv", ["x", "w1"], ["c"], name="conv"),
        NODE("Relu", ["c"], ["r"], name="relu"),
        NODE("GlobalAveragePool", ["r"], ["p"], name="pool"),
        NODE("Flatten", ["p"], ["f"], name="flatten"),
        NODE("Gemm", ["f", "w2", "b2"], ["g"], name="gemm", transB=1),
        NODE("MatMul", ["g", "w3"], ["y"], name="matmul"),
    ]
    weights = {
        "w1": normal(32, 8, 3, 3, scale=0.1),
        "w2": normal(24, 32, seed=1, scale=0.2),
        "b2": normal(24, seed=2),
        "w3": normal(24, 10, seed=3, scale=0.2),
    }
    return model_of(nodes, {"x": ["n", 8, 6, 6]}, {"y": ["n", 10]}, weights)


def batches() -> list[dict[str, np.ndarray]]:
    return [{"x": normal(size, 8, 6, 6, seed=seed)} for seed, size in enumerate((128, 128, 5))]


def test_every_four_inputs_have_two_weights(tmp_path: Path) -> None:
    original = model()
    before = original.SerializeToString()
    result = SPARSE.run(original, context_of(tmp_path, batches()))
    weights = weights_of(result.model)
    # Conv: neighbouring input channels at one place of the kernel.
    conv = weights["w1"].reshape(32, 2, 4, 3, 3)
    assert np.count_nonzero(conv, axis=2).max() == 2
    assert np.count_nonzero(weights["w2"].reshape(24, 8, 4), axis=2).max() == 2
    assert np.count_nonzero(weights["w3"].reshape(6, 4, 10), axis=1).max() == 2
    assert result.counts == {"sparse": 3, "skipped": 0}
    assert original.SerializeToString() == before
    assert signature_of(result.model) == signature_of(original)
    require_equivalent(original, result, "lossy", batches()[2:], tmp_path)


def test_what_is_left_makes_up_for_what_is_gone(tmp_path: Path) -> None:
    original, held_out = model(), {"x": normal(200, 8, 6, 6, seed=9)}
    fitted = SPARSE.run(original, context_of(tmp_path, batches())).model
    plain = model()
    for tensor in plain.graph.initializer:
        if tensor.name != "b2":
            array = weights_of(plain)[tensor.name]
            flat = array if tensor.name == "w3" else array.reshape(len(array), -1).T
            rows = by_place(np.arange(len(flat)), 9 if array.ndim == 4 else 1)
            flat = flat.copy()
            flat[rows] = by_magnitude(flat[rows])
            flat = flat if tensor.name == "w3" else flat.T.reshape(array.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(flat), tensor.name))
    expected = answers(original, [held_out], tmp_path)[0]
    with_fit, without = (sqnr_db(expected, answers(m, [held_out], tmp_path)[0]) for m in (fitted, plain))
    assert with_fit > without + 5


def by_magnitude(weight: np.ndarray) -> np.ndarray:
    groups = weight.reshape(-1, 4, weight.shape[1]).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0, axis=1)
    return groups.reshape(weight.shape)


@pytest.mark.parametrize("kind", ["unequal", "correlated"])
@pytest.mark.parametrize("inputs", [64, 192])  # 192: more than one block of rows
def test_saliency_beats_magnitude(kind: str, inputs: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, inputs))
    x = x * np.exp(rng.standard_normal(inputs)) if kind == "unequal" else x @ rng.standard_normal((inputs, inputs))
    weight, gram, held_out = normal(inputs, 16).astype(np.float64), x[:2000].T @ x[:2000], x[2000:].T @ x[2000:]
    sparse = two_of_four(weight, shrunk(gram, 1e-3))
    assert is_sparse(sparse)
    errors = [relative_output_error(weight, w, held_out) for w in (sparse, by_magnitude(weight))]
    assert errors[0] < 0.8 * errors[1]


def test_without_correlations_the_choice_is_that_of_the_saliency() -> None:
    weight, power = normal(16, 6).astype(np.float64), np.exp(np.random.default_rng(0).standard_normal(16))
    sparse = two_of_four(weight, np.diag(power))
    saliency = (weight**2 * power[:, None]).reshape(4, 4, 6)
    kept = np.sort(np.argsort(saliency, axis=1)[:, 2:], axis=1)
    expected = np.zeros_like(saliency)
    np.put_along_axis(expected, kept, np.take_along_axis(weight.reshape(4, 4, 6), kept, axis=1), axis=1)
    np.testing.assert_allclose(sparse, expected.reshape(16, 6), atol=1e-12)


def test_inputs_that_are_always_zero_keep_the_larger_weights() -> None:
    weight = normal(8, 3).astype(np.float64)
    np.testing.assert_array_equal(two_of_four(weight, np.zeros((8, 8))), by_magnitude(weight))


def test_a_sparse_model_stays_as_it_is(tmp_path: Path) -> None:
    once = SPARSE.run(model(), context_of(tmp_path, batches())).model
    again = SPARSE.run(once, context_of(tmp_path, batches()))
    assert not again.changed
    assert again.model is once
    assert again.note == "3 layers are 2:4 sparse already"


def matmul(inputs: int) -> onnx.ModelProto:
    return model_of([NODE("MatMul", ["x", "w"], ["y"])], {"x": [8, inputs]}, {"y": [8, 8]}, {"w": normal(inputs, 8)})


def test_layers_without_groups_of_four_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no weight can be made sparse: 1 whose inputs are no multiple of 4"):
        SPARSE.run(matmul(6), context_of(tmp_path, [{"x": normal(8, 6)}]))


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Gemm", ["h", "w"], ["y"], transB=1)]
    tied = model_of(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": normal(8, 8)})
    with pytest.raises(PassFailed, match="2 with a weight that is shared or an output"):
        SPARSE.run(tied, context_of(tmp_path, [{"x": normal(8, 8)}]))


def test_runs_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no calibration data"):
        SPARSE.run(matmul(8), context_of(tmp_path))


def test_the_pass_pays_for_tensorrt_only() -> None:
    assert (SPARSE.spec.name, SPARSE.spec.target, SPARSE.spec.effect) == ("sparsity-2-4", "tensorrt", "lossy")
