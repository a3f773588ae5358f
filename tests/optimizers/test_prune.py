from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.graph import signature_of
from optimizers.passes.check import answers, require_equivalent
from optimizers.passes.prune import PruneChannels, cheapest_channels
from optimizers.passes.refit import refit_kept
from server.golden import sqnr_db
from tests.optimizers.graphs import NODE, context_of, model_of, normal, weights_of

PRUNE = PruneChannels()


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed, scale=float(np.prod(shape[1:]) ** -0.5))


def mlp() -> onnx.ModelProto:
    """A Gemm with ``transB``, a GELU of several nodes, a MatMul with its bias, a ReLU, a Gemm."""
    nodes = [
        NODE("Gemm", ["x", "w1", "b1"], ["h"], name="one", transB=1),
        NODE("Div", ["h", "root"], ["d"], name="div"),
        NODE("Erf", ["d"], ["e"], name="erf"),
        NODE("Add", ["e", "unit"], ["f"], name="plus"),
        NODE("Mul", ["h", "f"], ["g"], name="gelu"),
        NODE("MatMul", ["g", "w2"], ["m"], name="two"),
        NODE("Add", ["m", "b2"], ["a"], name="bias"),
        NODE("Relu", ["a"], ["r"], name="relu"),
        NODE("Gemm", ["r", "w3"], ["y"], name="three"),
    ]
    weights = {
        "w1": weight(64, 16),
        "b1": normal(64, seed=4),
        "root": np.float32(2**0.5),
        "unit": np.ones(1, np.float32),
        "w2": weight(64, 48, seed=2),
        "b2": normal(1, 48, seed=5),
        "w3": weight(48, 10, seed=3),
    }
    return model_of(nodes, {"x": ["n", 16]}, {"y": ["n", 10]}, weights)


def cnn() -> onnx.ModelProto:
    """Conv, BatchNormalization, PRelu, depthwise Conv, pooling, Conv, activation, global pooling, a dense layer."""
    nodes = [
        NODE("Conv", ["x", "w1"], ["c"], name="one", pads=[1, 1, 1, 1]),
        NODE("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], name="norm"),
        NODE("PRelu", ["n", "slope"], ["p"], name="prelu"),
        NODE("Conv", ["p", "wd", "bd"], ["d"], name="depthwise", group=32, pads=[1, 1, 1, 1]),
        NODE("MaxPool", ["d"], ["q"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        NODE("Conv", ["q", "w2", "b2"], ["e"], name="two", pads=[1, 1, 1, 1]),
        NODE("Sigmoid", ["e"], ["s"], name="sigmoid"),
        NODE("Mul", ["e", "s"], ["u"], name="silu"),
        NODE("GlobalAveragePool", ["u"], ["v"], name="mean_pool"),
        NODE("Flatten", ["v"], ["k"], name="flatten"),
        NODE("Gemm", ["k", "w3", "b3"], ["y"], name="three"),
    ]
    weights = {
        "w1": weight(32, 3, 3, 3),
        "scale": 1 + 0.1 * normal(32),
        "shift": normal(32, seed=1),
        "mean": normal(32, seed=2),
        "var": 1 + normal(32, seed=3) ** 2,
        "slope": normal(32, 1, 1, seed=4, scale=0.2),
        "wd": weight(32, 1, 3, 3, seed=5),
        "bd": normal(32, seed=6),
        "w2": weight(24, 32, 3, 3, seed=7),
        "b2": normal(24, seed=8),
        "w3": weight(24, 10, seed=9),
        "b3": normal(10, seed=10),
    }
    return model_of(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 10]}, weights)


def batches(*shape: int, sizes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(size, *shape, seed=100 + seed)} for seed, size in enumerate(sizes)]


MLP_DATA = batches(16, sizes=(400, 400, 33))
CNN_DATA = batches(3, 12, 12, sizes=(32, 32, 5))


def sqnr(before: onnx.ModelProto, after: onnx.ModelProto, batch: dict[str, np.ndarray], work: Path) -> float:
    return sqnr_db(answers(before, [batch], work)[0], answers(after, [batch], work)[0])


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in weights_of(model).items()}


def test_a_quarter_of_the_hidden_units_goes(tmp_path: Path) -> None:
    model = mlp()
    before = model.SerializeToString()
    result = PRUNE.run(model, context_of(tmp_path, MLP_DATA))
    found = shapes(result.model)
    assert [found[name] for name in ("w1", "b1", "w2", "b2", "w3")] == [(48, 16), (48,), (48, 40), (1, 40), (40, 10)]
    assert result.counts == {"chains": 2, "channels_removed": 16 + 8, "skipped": 1}  # the last layer has no follower
    assert "24 of 112 channels between 2 pairs" in result.note
    assert model.SerializeToString() == before
    assert signature_of(result.model) == signature_of(model)
    require_equivalent(model, result, "lossy", MLP_DATA[2:], tmp_path)


def test_declared_shapes_follow(tmp_path: Path) -> None:
    model = onnx.shape_inference.infer_shapes(cnn())
    after = PRUNE.run(model, context_of(tmp_path, CNN_DATA)).model
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in after.graph.value_info}
    assert [declared[name][1] for name in "cnpdqesuvk"] == [24] * 5 + [24] * 5
    assert [node.name for node in after.graph.node] == [node.name for node in model.graph.node]
    onnx.checker.check_model(after, full_check=True)


def test_everything_between_two_convolutions_is_narrowed(tmp_path: Path) -> None:
    model = cnn()
    result = PruneChannels(share=0.5).run(model, context_of(tmp_path, CNN_DATA))
    found = shapes(result.model)
    assert found["w1"] == (16, 3, 3, 3)
    assert found["wd"] == (16, 1, 3, 3)
    assert {found[name] for name in ("scale", "shift", "mean", "var", "bd")} == {(16,)}
    assert found["slope"] == (16, 1, 1)
    assert found["w2"] == (16, 16, 3, 3)
    assert found["w3"] == (16, 10)
    require_equivalent(model, result, "lossy", CNN_DATA[2:], tmp_path)


@pytest.mark.parametrize(
    ("model", "data", "shape", "gain_db"),
    [(mlp(), MLP_DATA, (500, 16), 7), (cnn(), CNN_DATA, (64, 3, 12, 12), 20)],
    ids=["mlp", "cnn"],
)
def test_the_refit_recovers_several_db_on_other_samples(
    tmp_path: Path, model: onnx.ModelProto, data: list, shape: tuple[int, ...], gain_db: float
) -> None:
    held_out = {"x": normal(*shape, seed=7)}
    with_refit, without = (
        sqnr(model, PruneChannels(refit=refit).run(model, context_of(tmp_path, data)).model, held_out, tmp_path)
        for refit in (True, False)
    )
    assert with_refit > without + gain_db


def test_of_two_equal_channels_one_goes_and_never_both(tmp_path: Path) -> None:
    rows = weight(64, 32)
    rows[16:32] = rows[:16]
    model = between([NODE("Relu", ["h"], ["t"])], {}, w1=rows.T.copy(), w2=weight(64, 8))
    result = PRUNE.run(model, context_of(tmp_path, [{"x": normal(20_000, 32)}]))
    kept = weights_of(result.model)["w1"].T
    assert len(np.unique(kept, axis=0)) == len(kept) == 48
    assert sqnr(model, result.model, {"x": normal(100, 32, seed=7)}, tmp_path) > 60


def cost(x: np.ndarray, weight: np.ndarray, kept: list[int]) -> float:
    gram = x.T @ x / len(x)
    error = x[:, kept] @ refit_kept(gram, weight, np.array(kept), 1e-6) - x @ weight
    return float(np.sum(error**2))


@pytest.mark.parametrize("patch", [1, 2])
def test_each_removal_is_the_cheapest_with_a_refit(patch: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((12, 5))
    hessian = x.T @ x / 300
    hessian += 1e-6 * np.trace(hessian) / 12 * np.eye(12)
    removed = cheapest_channels(hessian, w, 3, patch)
    left = list(range(12 // patch))
    for channel in removed:
        costs = {c: cost(x, w, [k for o in left if o != c for k in range(o * patch, (o + 1) * patch)]) for c in left}
        assert channel == min(costs, key=costs.__getitem__)
        left.remove(channel)


def test_channels_of_constant_inputs_cost_nothing() -> None:
    assert cheapest_channels(np.zeros((6, 6)), np.ones((6, 2)), 2, 1) == [4, 5]


# What must stay


def between(nodes: list[onnx.NodeProto], outputs: dict[str, list], **weights: np.ndarray) -> onnx.ModelProto:
    """A dense layer of 32 hidden units ``h``, the nodes, and a dense layer that reads ``t``."""
    graph = [NODE("Gemm", ["x", "w1"], ["h"]), *nodes, NODE("Gemm", ["t", "w2"], ["y"])]
    constants = {"w1": weight(32, 32), "w2": weight(32, 8), **weights}
    return model_of(graph, {"x": ["n", 32]}, {"y": ["n", 8], **outputs}, constants)


def with_subgraph() -> onnx.ModelProto:
    branch = helper.make_graph(
        [NODE("Identity", ["t"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, ["n", 32])]
    )
    nodes = [NODE("Relu", ["h"], ["t"]), NODE("If", ["c"], ["i"], then_branch=branch, else_branch=branch)]
    return between(nodes, {"i": ["n", 32]}, c=np.array(True))


RELU = NODE("Relu", ["h"], ["t"])
# Of the two layers the second one always ends in an output.
REFUSED = {
    "residual": (between([NODE("Add", ["h", "x"], ["t"])], {}), "1 whose channels meet another tensor"),
    "output": (between([RELU], {"h": ["n", 32]}), "2 whose channels are outputs, or read by a subgraph"),
    "subgraph": (with_subgraph(), "2 whose channels are outputs, or read by a subgraph"),
    "softmax": (between([NODE("Softmax", ["h"], ["t"])], {}), "1 followed by Softmax, which mixes channels"),
    "two readers": (
        between([RELU, NODE("MatMul", ["t", "w3"], ["z"])], {"z": ["n", 4]}, w3=weight(32, 4)),
        "1 whose channels 2 other layers read",
    ),
    "tied": (
        between([RELU, NODE("MatMul", ["x", "w1"], ["z"])], {"z": ["n", 32]}),
        "2 with a weight that is shared or an output",
    ),
    "narrow": (
        model_of(
            [NODE("Gemm", ["x", "w1"], ["h"]), NODE("Gemm", ["h", "w2"], ["y"])],
            {"x": ["n", 32]},
            {"y": ["n", 8]},
            {"w1": weight(32, 8), "w2": weight(8, 8)},
        ),
        "1 with too few channels to remove 25% in steps of 8",
    ),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_channels_that_others_need_stay(tmp_path: Path, model: onnx.ModelProto, reason: str) -> None:
    onnx.checker.check_model(model)
    with pytest.raises(PassFailed, match=f"no hidden channel can be removed: .*{reason}"):
        PRUNE.run(model, context_of(tmp_path, [{"x": normal(64, 32)}]))


def test_convolutions_before_a_residual_connection_stay(tmp_path: Path) -> None:
    nodes = [
        NODE("Conv", ["x", "w1"], ["a"], name="one"),
        NODE("Relu", ["a"], ["r"]),
        NODE("Conv", ["r", "w2"], ["b"], name="two"),
        NODE("Add", ["b", "x"], ["s"]),
        NODE("Conv", ["s", "w3"], ["y"], name="three"),
    ]
    weights = {f"w{i}": weight(32, 32, 1, 1, seed=i) for i in (1, 2, 3)}
    model = model_of(nodes, {"x": ["n", 32, 4, 4]}, {"y": ["n", 32, 4, 4]}, weights)
    result = PRUNE.run(model, context_of(tmp_path, batches(32, 4, 4, sizes=(16, 3))))
    assert [shapes(result.model)[f"w{i}"][:2] for i in (1, 2, 3)] == [(24, 32), (32, 24), (32, 32)]
    assert "1 whose channels meet another tensor" in result.note
    require_equivalent(model, result, "lossy", [{"x": normal(2, 32, 4, 4)}], tmp_path)


def test_channels_that_meet_themselves_along_another_axis_stay(tmp_path: Path) -> None:
    nodes = [
        NODE("Conv", ["x", "w1"], ["a"]),
        NODE("GlobalAveragePool", ["a"], ["p"]),
        NODE("Flatten", ["p"], ["f"]),
        NODE("Mul", ["p", "f"], ["m"]),  # [n, 32, n, 32]
        NODE("Conv", ["m", "w2"], ["y"]),
    ]
    weights = {"w1": weight(32, 32, 1, 1), "w2": weight(32, 32, 1, 1, seed=1)}
    model = model_of(nodes, {"x": ["n", 32, 4, 4]}, {"y": ["n", 32, "n", 32]}, weights)
    with pytest.raises(PassFailed, match="1 whose channels meet another tensor"):
        PRUNE.run(model, context_of(tmp_path, [{"x": normal(8, 32, 4, 4)}]))


def test_shared_constants_between_layers_are_kept_for_the_others(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["h", "s"], ["t"]), NODE("Mul", ["x", "s"], ["z"])]
    model = between(nodes, {"z": ["n", 32]}, s=normal(32, seed=3))
    result = PRUNE.run(model, context_of(tmp_path, [{"x": normal(200, 32)}]))
    assert sorted(shape for name, shape in shapes(result.model).items() if name.startswith("s")) == [(24,), (32,)]
    batch = {"x": normal(5, 32, seed=1)}
    before, after = (answers(m, [batch], tmp_path)[0]["z"] for m in (model, result.model))
    np.testing.assert_array_equal(before, after)


def test_runs_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no calibration data"):
        PRUNE.run(mlp(), context_of(tmp_path))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"share": share}, PruneChannels)
