from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from optimizers.errors import PassFailed
from optimizers.graph import signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.low_rank import LowRank, least_rank, principal_outputs
from optimizers.passes.refit import Unsuited
from server.golden import sqnr_db
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of

EXACT = LowRank(energy=1.0)


def of_rank(rank: int, inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return normal(inputs, rank, seed=seed) @ normal(rank, outputs, seed=seed + 1) / np.float32(np.sqrt(inputs * rank))


def mlp(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """A Gemm with ``transB``, and a MatMul with the Add of a bias."""
    nodes = [
        NODE("Gemm", ["x", "w", "b"], ["h"], name="first", transB=1),
        NODE("Relu", ["h"], ["r"], name="relu"),
        NODE("MatMul", ["r", "v"], ["m"], name="second"),
        NODE("Add", ["m", "c"], ["y"], name="add"),
    ]
    weights = {"w": first.T.copy(), "b": normal(first.shape[1]), "v": second, "c": normal(second.shape[1], seed=4)}
    return model_of(nodes, {"x": ["n", len(first)]}, {"y": ["n", second.shape[1]]}, weights)


def conv(weight: np.ndarray, **settings: object) -> onnx.ModelProto:
    nodes = [NODE("Conv", ["x", "w"], ["y"], name="conv", **settings)]
    return model_of(nodes, {"x": ["n", weight.shape[1], 9, 9]}, {"y": ["n", len(weight), None, None]}, {"w": weight})


def batches(*shape: int, sizes: tuple[int, ...] = (64, 64, 21)) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(size, *shape, seed=seed)} for seed, size in enumerate(sizes)]


def sqnr(before: onnx.ModelProto, after: onnx.ModelProto, batch: dict[str, np.ndarray], work: Path) -> float:
    return sqnr_db(answers(before, [batch], work)[0], answers(after, [batch], work)[0])


def test_weights_of_low_rank_are_factorized_to_that_rank_exactly(tmp_path: Path) -> None:
    model = mlp(of_rank(7, 64, 48), of_rank(5, 48, 40, seed=5))
    before = model.SerializeToString()
    result = EXACT.run(model, context_of(tmp_path, batches(64)))
    shapes = {name: array.shape for name, array in weights_of(result.model).items()}
    assert shapes["w_first_factor"] == (64, 7)
    assert shapes["w_second_factor"] == (7, 48)
    assert shapes["v_first_factor"] == (48, 5)
    assert {"w", "v"}.isdisjoint(shapes)
    assert result.counts == {"factorized": 2, "skipped": 0}
    assert model.SerializeToString() == before
    require_equivalent(model, result, "tolerance", [{"x": normal(32, 64, seed=9)}], tmp_path)
    assert sqnr(model, result.model, {"x": normal(32, 64, seed=9)}, tmp_path) > 110


def test_the_second_factor_keeps_the_names(tmp_path: Path) -> None:
    model = mlp(of_rank(7, 64, 48), of_rank(5, 48, 40))
    after = EXACT.run(model, context_of(tmp_path, batches(64))).model
    made = {node.name: node.output[0] for node in after.graph.node}
    assert {node.name: node.output[0] for node in model.graph.node}.items() <= made.items()
    assert [node.op_type for node in after.graph.node] == ["Gemm", "Gemm", "Relu", "MatMul", "MatMul", "Add"]
    assert signature_of(after) == signature_of(model)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in after.graph.value_info}
    assert shapes["h_rank_7"][1] == 7


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [((1, 1), {}), ((3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]})],
    ids=["1x1", "3x3"],
)
def test_convolutions_of_low_rank_become_two(tmp_path: Path, kernel: tuple[int, int], settings: dict) -> None:
    inputs = 32 * kernel[0] * kernel[1]
    model = conv(of_rank(6, inputs, 32).T.reshape(32, 32, *kernel).copy(), **settings)
    result = EXACT.run(model, context_of(tmp_path, batches(32, 9, 9, sizes=(4, 4, 2))))
    shapes = {name: array.shape for name, array in weights_of(result.model).items()}
    assert shapes["w_first_factor"] == (6, 32, *kernel)
    assert shapes["w_second_factor"] == (32, 6, 1, 1)
    require_equivalent(model, result, "tolerance", [{"x": normal(3, 32, 9, 9, seed=9)}], tmp_path)


def test_the_rank_follows_the_inputs_and_not_the_weights_alone(tmp_path: Path) -> None:
    # The weight has full rank; the inputs live near a space of 6 dimensions.
    directions = normal(6, 64, seed=3)

    def inputs(rows: int, seed: int) -> dict[str, np.ndarray]:
        return {"x": normal(rows, 6, seed=seed) @ directions + normal(rows, 64, seed=seed + 50, scale=0.01)}

    model = mlp(normal(64, 64, scale=0.1), of_rank(5, 64, 40))
    result = LowRank(energy=0.999).run(model, context_of(tmp_path, [inputs(400, seed) for seed in range(3)]))
    first = weights_of(result.model)["w_first_factor"]
    assert first.shape == (64, 6)
    assert sqnr(model, result.model, inputs(200, 9), tmp_path) > 30
    # The singular vectors of the weight alone lose most of it at this rank.
    u, s, v = np.linalg.svd(weights_of(model)["w"].T)
    x, w = inputs(200, 9)["x"], weights_of(model)["w"].T
    plain = sqnr_db({"y": x @ w}, {"y": x @ (u[:, :6] * s[:6]) @ v[:6]})
    assert plain < 5


def test_a_mean_far_from_zero_goes_into_the_bias(tmp_path: Path) -> None:
    model = conv(of_rank(6, 64, 64).T.reshape(64, 64, 1, 1) + normal(64, 64, 1, 1, scale=0.01))
    data = [{"x": 10 + batch["x"]} for batch in batches(64, 9, 9, sizes=(8, 8))]
    result = LowRank(energy=0.9).run(model, context_of(tmp_path, data))
    assert len(result.model.graph.node[1].input) == 3
    seen = answers(result.model, data, tmp_path)[0]["y"].mean(axis=(0, 2, 3))
    expected = answers(model, data, tmp_path)[0]["y"].mean(axis=(0, 2, 3))
    np.testing.assert_allclose(seen, expected, atol=0.1)


def test_few_samples_do_not_make_a_layer_look_simple(tmp_path: Path) -> None:
    # 12 samples span 12 dimensions: taken at face value, rank 12 would be exact.
    model = mlp(normal(64, 64, scale=0.1), normal(64, 64, scale=0.1))
    with pytest.raises(PassFailed, match="no layer has a rank low enough"):
        LowRank().run(model, context_of(tmp_path, batches(64, sizes=(12,))))


def test_more_energy_takes_a_higher_rank(tmp_path: Path) -> None:
    decaying = (of_rank(64, 64, 64) @ np.diag(0.8 ** np.arange(64))).astype(np.float32)
    model = mlp(decaying, decaying)
    ranks, errors = [], []
    for energy in (0.9, 0.99, 0.999):
        result = LowRank(energy=energy).run(model, context_of(tmp_path, batches(64)))
        ranks.append(weights_of(result.model)["w_first_factor"].shape[1])
        errors.append(sqnr(model, result.model, {"x": normal(64, 64, seed=9)}, tmp_path))
    assert ranks == sorted(set(ranks))
    assert errors == sorted(errors)
    assert errors[1] > 15


def test_a_share_sets_the_rank(tmp_path: Path) -> None:
    model = mlp(normal(64, 48), normal(48, 40))
    after = LowRank(share=0.5).run(model, context_of(tmp_path, batches(64))).model
    assert weights_of(after)["w_first_factor"].shape[1] == int(0.5 * 64 * 48 / (64 + 48))


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 30), (30, 12)])
def test_principal_outputs_are_those_of_the_data(inputs: int, outputs: int) -> None:
    x, weight = np.random.default_rng(0).standard_normal((500, inputs)), normal(inputs, outputs).astype(np.float64)
    energies, directions = principal_outputs(weight, x.T @ x / 500)
    singular, vectors = np.linalg.svd(x @ weight / np.sqrt(500), full_matrices=False)[1:]
    np.testing.assert_allclose(energies, singular[:12] ** 2, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(directions.T * vectors[:12], axis=1)), 1, atol=1e-6)


def test_least_rank() -> None:
    energies = np.array([90.0, 9.0, 0.9, 0.1])
    assert [least_rank(energies, share, 10**9) for share in (0.5, 0.9, 0.95, 0.98, 0.998, 1.0)] == [1, 2, 2, 2, 3, 4]
    assert least_rank(np.array([1.0, 1e-14]), 1.0, 10) == 1  # rounding, not rank


def test_the_error_counts_more_the_more_directions_were_fitted_to_the_rows() -> None:
    energies = np.array([90.0, 9.0, 0.9, 0.1])
    assert least_rank(energies, 0.98, 20) == 2  # 1 % of the energy, over (1 - 2/20)^2
    assert least_rank(energies, 0.98, 6) == 3  # 1 % over (1 - 2/6)^2 is 2.25 %
    assert least_rank(energies, 0.98, 2) == 4


def test_inputs_that_never_vary_are_a_reason() -> None:
    with pytest.raises(Unsuited, match="with inputs that never vary"):
        principal_outputs(normal(4, 4).astype(np.float64), np.zeros((4, 4)))


def test_full_rank_is_refused_with_the_numbers(tmp_path: Path) -> None:
    model = mlp(normal(64, 48), normal(48, 40))
    reason = r"low enough at 0.99 of the energy: 2 that would keep 75% or more.* the best would keep 1\d\d% of its"
    with pytest.raises(PassFailed, match=reason):
        LowRank().run(model, context_of(tmp_path, batches(64)))


def test_tied_weights_are_left_alone(tmp_path: Path) -> None:
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Gemm", ["h", "w"], ["y"], transB=1)]
    model = model_of(nodes, {"x": ["n", 64]}, {"y": ["n", 64]}, {"w": of_rank(3, 64, 64)})
    with pytest.raises(PassFailed, match="2 with a weight that is shared or an output"):
        EXACT.run(model, context_of(tmp_path, batches(64)))


def test_models_without_weights_and_runs_without_data_are_refused(tmp_path: Path) -> None:
    model = model_of([NODE("MatMul", ["x", "x"], ["y"])], {"x": [4, 4]}, {"y": [4, 4]})
    with pytest.raises(PassFailed, match="no MatMul, Gemm or Conv has a constant weight"):
        EXACT.run(model, context_of(tmp_path, [{"x": normal(4, 4)}]))
    with pytest.raises(PassFailed, match="no calibration data"):
        EXACT.run(model, context_of(tmp_path))


@pytest.mark.parametrize("settings", [{"energy": 0.0}, {"energy": 1.5}, {"share": 0.8}, {"share": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, LowRank)


def test_the_pass_declares_itself() -> None:
    assert (LowRank().spec.name, LowRank().spec.effect, LowRank().spec.needs) == ("low-rank", "lossy", {"calibration"})
