"""The simulation answers as the really quantized model does, for any set of layers, and FP32 as FP32."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimizers.errors import PassFailed
from optimizers.evidence import run_batched, run_singly
from optimizers.fidelity import worst_sqnr_db
from optimizers.passes import PassResult
from optimizers.passes.activations import minmax_ranges
from optimizers.passes.check import answers
from optimizers.passes.int8 import WEIGHTED_OPS, prepared, weighted_nodes
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.switchboard import Scheme, Switchboard, rounded_tensors, rounded_weight
from server.artifact import SessionOptions
from server.errors import InferenceFailed
from server.host import read_host
from server.providers import EXACT_PRODUCTS
from tests.models import save_two_inputs
from tests.optimizers.graphs import NODE, WITH_DOT, WITHOUT_DOT, context_of, model_of, normal, weights_of

DENSE = frozenset({"MatMul", "Gemm"})
EXACT = SessionOptions(graph_level="basic", config={EXACT_PRODUCTS: "1"})
"""How to open the real model: no fusion that adds rounding of its own, no saturation, whatever the host."""


def residual_mlp() -> onnx.ModelProto:
    """x [n,32] -> y [n,5]: MatMul and both forms of Gemm, around a residual that reads what two layers read."""
    nodes = [
        NODE("MatMul", ["x", "w1"], ["h"], name="first"),
        NODE("Relu", ["h"], ["r"], name="relu"),
        NODE("Gemm", ["r", "w2", "b2"], ["g"], name="second", transB=1),
        NODE("Gemm", ["r", "w3"], ["k"], name="third"),
        NODE("Add", ["g", "r"], ["s"], name="residual"),
        NODE("Mul", ["s", "k"], ["m"], name="gate"),
        NODE("MatMul", ["m", "w4"], ["y"], name="last"),
    ]
    weights = {
        "w1": normal(32, 24, seed=1, scale=0.2),
        "w2": normal(24, 24, seed=2, scale=0.2),
        "b2": normal(24, seed=3),
        "w3": normal(24, 24, seed=4, scale=0.2),
        "w4": normal(24, 5, seed=5, scale=0.2),
    }
    return model_of(nodes, {"x": ["n", 32]}, {"y": ["n", 5]}, weights)


def cnn() -> onnx.ModelProto:
    """x [n,3,8,8] -> y [n,4]: a residual of convolutions, with clipping, pooling and a dense layer behind."""
    nodes = [
        NODE("Conv", ["x", "w1", "b1"], ["c1"], name="stem", pads=[1, 1, 1, 1]),
        NODE("Relu", ["c1"], ["r1"], name="relu"),
        NODE("Conv", ["r1", "w2"], ["c2"], name="wide", pads=[1, 1, 1, 1], group=2),
        NODE("Add", ["c2", "r1"], ["a"], name="residual"),
        NODE("MaxPool", ["a"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        NODE("Conv", ["p", "w3"], ["c3"], name="point"),
        NODE("Clip", ["c3", "low", "high"], ["k"], name="clip"),
        NODE("GlobalAveragePool", ["k"], ["g"], name="mean"),
        NODE("Flatten", ["g"], ["f"], name="flat"),
        NODE("Gemm", ["f", "w4"], ["y"], name="head", transB=1),
    ]
    weights = {
        "w1": normal(8, 3, 3, 3, seed=1, scale=0.3),
        "b1": normal(8, seed=2),
        "w2": normal(8, 4, 3, 3, seed=3, scale=0.2),
        "w3": normal(6, 8, 1, 1, seed=4, scale=0.4),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
        "w4": normal(4, 6, seed=5),
    }
    return model_of(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 4]}, weights)


SHAPES = {"mlp": (32,), "cnn": (3, 8, 8)}
MODELS = {"mlp": residual_mlp, "cnn": cnn}


def data(name: str, seed: int = 0, rows: int = 16) -> dict[str, np.ndarray]:
    return {"x": normal(rows, *SHAPES[name], seed=seed)}


def scheme_of(kind: str, model: onnx.ModelProto, batches: list, work: Path, bits: int = 8) -> Scheme:
    ops = DENSE if kind == "dynamic" else WEIGHTED_OPS
    if kind == "dynamic":
        return Scheme("dynamic", ops, bits)
    ready = prepared(model)
    return Scheme("static", ops, bits, minmax_ranges(ready, rounded_tensors(ready, ops), batches, work))


def board_of(name: str, kind: str, work: Path, bits: int = 8) -> tuple[onnx.ModelProto, Switchboard]:
    model = MODELS[name]()
    scheme = scheme_of(kind, model, [data(name, seed) for seed in (0, 1)], work, bits)
    return model, Switchboard(model, scheme, work, data(name, rows=1))


def really_quantized(
    model: onnx.ModelProto, kind: str, work: Path, name: str, host, keep: tuple[str, ...] = ()
) -> PassResult:
    step = Int8Static(keep=keep) if kind == "static" else Int8Dynamic(keep=keep)
    return step.run(model, context_of(work, [data(name, seed) for seed in (0, 1)], host))


def names_of(board: Switchboard) -> list[str]:
    return [layer.node for layer in board.layers]


# Against the real thing


@pytest.mark.parametrize(("host", "bits"), [(WITH_DOT, 8), (WITHOUT_DOT, 7)], ids=["8 bits", "7 bits"])
@pytest.mark.parametrize(("name", "kind"), [("mlp", "dynamic"), ("mlp", "static"), ("cnn", "static")])
def test_all_layers_switched_answer_as_the_real_int8_model(tmp_path: Path, name: str, kind: str, host, bits: int):
    model, board = board_of(name, kind, tmp_path, bits)
    batch = data(name, seed=9)
    result = really_quantized(model, kind, tmp_path, name, host)
    real = answers(result.model, [batch], tmp_path, EXACT)[0]
    simulated = board.view(names_of(board)).run(batch)
    original = answers(model, [batch], tmp_path)[0]
    assert worst_sqnr_db(original, real) < 50
    assert worst_sqnr_db(real, simulated) > 80


SUBSETS = [
    *(("mlp", kind, keep) for kind in ("dynamic", "static") for keep in ("first", "second", "third", "last")),
    *(("cnn", "static", keep) for keep in ("stem", "wide", "point", "head")),
]


@pytest.mark.parametrize(("name", "kind", "keep"), SUBSETS)
def test_any_subset_answers_as_the_real_model_of_that_subset(tmp_path: Path, name: str, kind: str, keep: str):
    model, board = board_of(name, kind, tmp_path)
    batch = data(name, seed=9)
    real = answers(really_quantized(model, kind, tmp_path, name, WITH_DOT, (keep,)).model, [batch], tmp_path, EXACT)[0]
    simulated = board.view([layer for layer in names_of(board) if layer != keep]).run(batch)
    assert worst_sqnr_db(answers(model, [batch], tmp_path)[0], real) < 60
    assert worst_sqnr_db(real, simulated) > 80


def test_nothing_switched_is_the_original(tmp_path: Path):
    for name, kind in (("mlp", "dynamic"), ("mlp", "static"), ("cnn", "static")):
        model, board = board_of(name, kind, tmp_path)
        batch = data(name, seed=9)
        assert worst_sqnr_db(answers(model, [batch], tmp_path)[0], board.view([]).run(batch)) > 120


def test_each_layer_matters_and_views_do_not_disturb_each_other(tmp_path: Path):
    _, board = board_of("cnn", "static", tmp_path)
    batch = data("cnn", seed=9)
    views = {layer: board.view([layer]) for layer in names_of(board)}
    first = {layer: view.run(batch)["y"] for layer, view in views.items()}
    again = {layer: view.run(batch)["y"] for layer, view in reversed(views.items())}
    for layer in first:
        np.testing.assert_array_equal(first[layer], again[layer])
    assert len({array.tobytes() for array in first.values()}) == len(board.layers) == 4


def test_weights_are_rounded_as_the_quantizer_rounds_them(tmp_path: Path):
    model = residual_mlp()
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(normal(32, 24) * (np.arange(24) % 5).astype(np.float32), "w1")
    )
    for host, bits in ((WITH_DOT, 8), (WITHOUT_DOT, 7)):
        weights = weights_of(really_quantized(model, "static", tmp_path, "mlp", host).model)
        for name, axis in (("w1", 1), ("w2", 0)):
            scale = weights[f"{name}_scale"]
            real = weights[f"{name}_quantized"] * (scale if axis else scale[:, None])
            np.testing.assert_array_equal(rounded_weight(weights_of(model)[name], axis, bits), real)


# What static quantization rounds


def test_a_rounded_tensor_is_rounded_for_all_of_its_readers(tmp_path: Path):
    model, board = board_of("mlp", "static", tmp_path)
    batch = data("mlp", seed=9)
    # "second" and the residual read "r"; quantizing "third" alone, which also reads it, changes them too.
    only_third = board.view(["third"]).run(batch)["y"]
    gate = weights_of(model)
    h = np.maximum(batch["x"] @ gate["w1"], 0)
    unrounded = (h @ gate["w2"].T + gate["b2"] + h) * (h @ rounded_weight(gate["w3"], 1, 8)) @ gate["w4"]
    assert not np.allclose(only_third, unrounded, rtol=1e-3)


def test_chains_of_convolutions_are_rounded_and_clipping_is_not_rounded_twice():
    tensors = rounded_tensors(prepared(cnn()), WEIGHTED_OPS)
    assert set(tensors) == {"x", "r1", "c2", "a", "p", "k", "g", "f"}  # neither c1 nor c3


def test_dense_layers_round_their_inputs_only():
    assert rounded_tensors(prepared(residual_mlp()), WEIGHTED_OPS) == ("x", "r", "m")


# Layers


def test_arithmetic_is_counted_for_one_sample(tmp_path: Path):
    _, board = board_of("cnn", "static", tmp_path)
    assert {layer.node: (layer.op_type, layer.macs) for layer in board.layers} == {
        "stem": ("Conv", 8 * 8 * 8 * 3 * 9),
        "wide": ("Conv", 8 * 8 * 8 * 4 * 9),
        "point": ("Conv", 4 * 4 * 6 * 8),
        "head": ("Gemm", 6 * 4),
    }
    _, board = board_of("mlp", "dynamic", tmp_path)
    assert [layer.macs for layer in board.layers] == [32 * 24, 24 * 24, 24 * 24, 24 * 5]


def test_tied_weights_are_switched_one_by_one(tmp_path: Path):
    nodes = [
        NODE("Conv", ["x", "w"], ["h"], name="a", pads=[1, 1, 1, 1]),
        NODE("Sigmoid", ["h"], ["s"]),
        NODE("Conv", ["s", "w"], ["y"], name="b", pads=[1, 1, 1, 1]),
    ]
    shape = ["n", 3, 8, 8]
    model = model_of(nodes, {"x": shape}, {"y": shape}, {"w": normal(3, 3, 3, 3)})
    batch = data("cnn")
    board = Switchboard(model, scheme_of("static", model, [batch], tmp_path), tmp_path, data("cnn", rows=1))
    answered = [board.view(chosen).run(batch)["y"].tobytes() for chosen in ([], ["a"], ["b"], ["a", "b"])]
    assert len(set(answered)) == 4


def test_a_gemm_that_the_dynamic_quantizer_leaves_is_no_layer(tmp_path: Path):
    nodes = [NODE("Gemm", ["x", "w"], ["h"], name="scaled", alpha=0.5), NODE("MatMul", ["h", "v"], ["y"], name="plain")]
    weights = {"w": normal(32, 8), "v": normal(8, 4, seed=1)}
    model = model_of(nodes, {"x": ["n", 32]}, {"y": ["n", 4]}, weights)
    result = Int8Dynamic().run(model, context_of(tmp_path))
    assert [node.name for node in weighted_nodes(result.model, DENSE)] == ["scaled"]
    board = Switchboard(model, Scheme("dynamic", DENSE, 8), tmp_path, data("mlp", rows=1))
    assert names_of(board) == ["plain"]


def test_the_model_is_left_unchanged_and_the_folder_empty(tmp_path: Path):
    model = cnn()
    before = model.SerializeToString()
    Switchboard(model, scheme_of("static", model, [data("cnn")], tmp_path), tmp_path, data("cnn", rows=1))
    assert model.SerializeToString() == before
    assert list(tmp_path.iterdir()) == []


def test_views_are_runners_of_evidence(tmp_path: Path):
    _, board = board_of("mlp", "static", tmp_path)
    view = board.view(names_of(board))
    singles = [data("mlp", seed, rows=1) for seed in range(10)]
    alone, batched = run_singly(view, singles, workers=2), run_batched(view, singles, rows=4, workers=2)
    assert list(alone) == ["y"]
    np.testing.assert_allclose(batched["y"], alone["y"], rtol=1e-4, atol=1e-4)


# Refusals


def test_a_model_without_weights_is_refused(tmp_path: Path):
    model = onnx.load(save_two_inputs(tmp_path / "model.onnx"))
    with pytest.raises(PassFailed, match="no Conv, Gemm, MatMul has a constant weight to switch"):
        Switchboard(model, Scheme("static", WEIGHTED_OPS, 8), tmp_path, {"a": normal(1, 4), "b": normal(1, 4)})


def test_convolutions_are_no_layers_of_the_dynamic_scheme(tmp_path: Path):
    model = model_of(
        [NODE("Conv", ["x", "w"], ["y"])], {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 6, 6]}, {"w": normal(4, 3, 3, 3)}
    )
    with pytest.raises(PassFailed, match="no Gemm, MatMul has a constant weight to switch"):
        Switchboard(model, Scheme("dynamic", WEIGHTED_OPS, 8), tmp_path, data("cnn", rows=1))


def test_unknown_layers_are_named_with_those_that_exist(tmp_path: Path):
    _, board = board_of("mlp", "dynamic", tmp_path)
    with pytest.raises(PassFailed, match="no layer is named 'nope', 'relu'; the layers are first, second, third, last"):
        board.view(["first", "relu", "nope"])


def test_a_missing_range_is_named(tmp_path: Path):
    ranges = {"x": (-1.0, 1.0), "m": (-1.0, 1.0)}
    with pytest.raises(PassFailed, match="no range of tensor 'r' is given"):
        Switchboard(residual_mlp(), Scheme("static", DENSE, 8, ranges), tmp_path, data("mlp", rows=1))


def test_a_sample_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(PassFailed, match="the model does not run with switched layers"):
        Switchboard(residual_mlp(), Scheme("dynamic", DENSE, 8), tmp_path, {"x": normal(1, 7)})


def test_a_closed_switchboard_answers_no_more(tmp_path: Path):
    _, board = board_of("mlp", "dynamic", tmp_path)
    view: Collection = board.view([])
    board.close()
    with pytest.raises(InferenceFailed, match="closed"):
        view.run(data("mlp"))


def test_this_host_serves_what_was_simulated(tmp_path: Path):
    host = read_host()
    model, board = board_of("cnn", "static", tmp_path, 8 if host.has_int8_dot else 7)
    batch = data("cnn", seed=9)
    result = really_quantized(model, "static", tmp_path, "cnn", host)
    served = answers(result.model, [batch], tmp_path, SessionOptions(config=result.options.config))[0]
    simulated = board.view(names_of(board)).run(batch)
    original = answers(model, [batch], tmp_path)[0]
    # Served with all fusions: rounding of FP32 tips some codes, which counts as noise of one step.
    assert worst_sqnr_db(served, simulated) > worst_sqnr_db(original, served) + 10
