from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizers.graph import op_counts
from optimizers.passes.fuse_conv import CONV_RULES
from tests.optimizers.graphs import NODE, model_of, normal, weights_of
from tests.optimizers.rewriting import fused, refusals

X = {"x": normal(3, 4, 6, 6, seed=9)}
NORM = {
    "gamma": normal(6, seed=1) + 2,
    "beta": normal(6, seed=2),
    "mean": normal(6, seed=3),
    "var": np.abs(normal(6, seed=4)) + np.float32(0.5),
}


def around_conv(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",), **attributes: object
) -> onnx.ModelProto:
    """A Conv from ``c_in`` to ``c`` with 6 channels, and more nodes; ``x`` is ``[batch, 4, 6, 6]``."""
    source = "c_in" if any("c_in" in node.output for node in nodes) else "x"
    conv = NODE("Conv", [source, "w", "b"], ["c"], name="conv", **attributes)
    first = [node for node in nodes if "c_in" in node.output]
    later = [node for node in nodes if "c_in" not in node.output]
    kernel = normal(6, 4 // int(attributes.get("group", 1)), 3, 3)
    shapes = {name: [None] * 4 for name in outputs}
    given = {"w": kernel, "b": normal(6, seed=5), **weights}
    return model_of([*first, conv, *later], {"x": ["batch", 4, 6, 6]}, shapes, given)


def norm_node(**attributes: object) -> onnx.NodeProto:
    return NODE("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], epsilon=1e-3, **attributes)


@pytest.mark.parametrize("group", [1, 2])
def test_batch_normalization_scales_the_weights(tmp_path: Path, group: int) -> None:
    result = fused(around_conv([norm_node()], NORM, group=group), "conv", [X], tmp_path)
    assert result.counts == {"Conv+BatchNormalization": 1}
    assert op_counts(result.model) == {"Conv": 1}
    assert result.note == "1 x Conv+BatchNormalization"
    assert result.model.graph.node[0].name == "conv"


def test_a_conv_without_bias_gets_one(tmp_path: Path) -> None:
    model = around_conv([norm_node()], NORM)
    del model.graph.node[0].input[2]
    assert fused(model, "conv", [X], tmp_path).counts == {"Conv+BatchNormalization": 1}


@pytest.mark.parametrize("group", [1, 2])
def test_batch_normalization_scales_the_weights_of_a_transposed_convolution(tmp_path: Path, group: int) -> None:
    nodes = [NODE("ConvTranspose", ["x", "w", "b"], ["c"], group=group), norm_node()]
    weights = {"w": normal(4, 6 // group, 3, 3), "b": normal(6, seed=5), **NORM}
    model = model_of(nodes, {"x": ["batch", 4, 6, 6]}, {"y": [None] * 4}, weights)
    assert fused(model, "conv", [X], tmp_path).counts == {"ConvTranspose+BatchNormalization": 1}


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
@pytest.mark.parametrize("op_type", ["Mul", "Add"])
@pytest.mark.parametrize("swapped", [False, True])
def test_one_constant_per_channel_is_folded(tmp_path: Path, shape: tuple, op_type: str, swapped: bool) -> None:
    operands = ["k", "c"] if swapped else ["c", "k"]
    model = around_conv([NODE(op_type, operands, ["y"])], {"k": np.asarray(normal(*shape, seed=7), np.float32)})
    assert fused(model, "conv", [X], tmp_path).counts == {f"Conv+{op_type}": 1}


def test_a_chain_disappears_and_each_step_is_counted(tmp_path: Path) -> None:
    nodes = [
        NODE("Mul", ["x", "third"], ["m"]),
        NODE("Add", ["m", "half"], ["c_in"]),
        NODE("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        NODE("Mul", ["n", "k"], ["s"]),
        NODE("Add", ["s", "k"], ["y"]),
    ]
    weights = {**NORM, "third": np.float32([1 / 3]), "half": np.float32([0.5]), "k": normal(6, 1, 1, seed=8)}
    # Two nodes make the input of the Conv, so the builder's order is given here.
    conv = NODE("Conv", ["c_in", "w", "b"], ["c"])
    given = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=5), **weights}
    model = model_of([*nodes[:2], conv, *nodes[2:]], {"x": ["batch", 4, 6, 6]}, {"y": [None] * 4}, given)
    result = fused(model, "conv", [X], tmp_path)
    assert result.counts == {
        "Conv+BatchNormalization": 1,
        "Conv+Mul": 1,
        "Conv+Add": 1,
        "Mul+Conv": 1,
        "Add+Conv": 1,
    }
    assert op_counts(result.model) == {"Conv": 1}


def test_a_factor_before_a_padded_conv_is_folded_and_an_offset_is_not(tmp_path: Path) -> None:
    factor = around_conv([NODE("Mul", ["x", "k"], ["c_in"])], {"k": np.float32([2])}, ("c",), pads=[1, 1, 1, 1])
    assert fused(factor, "conv", [X], tmp_path).counts == {"Mul+Conv": 1}
    offset = around_conv([NODE("Add", ["x", "k"], ["c_in"])], {"k": np.float32([2])}, ("c",), pads=[1, 1, 1, 1])
    assert not fused(offset, "conv", [X], tmp_path).changed
    assert "zeros of the padding would be shifted too" in refusals(offset, CONV_RULES["Add+Conv"])


def test_padding_with_zeros_becomes_an_attribute(tmp_path: Path) -> None:
    model = around_conv([NODE("Pad", ["x", "pads"], ["c_in"])], {"pads": np.array([0, 0, 1, 2, 0, 0, 1, 2])}, ("c",))
    result = fused(model, "conv", [X], tmp_path)
    assert result.counts == {"Pad+Conv": 1}
    assert op_counts(result.model) == {"Conv": 1}


def test_two_convolutions_that_share_weights_each_get_their_own(tmp_path: Path) -> None:
    nodes = [
        NODE("Conv", ["x", "w"], ["c1"]),
        NODE("Conv", ["x", "w"], ["c2"]),
        NODE("Mul", ["c1", "k1"], ["m1"]),
        NODE("Mul", ["c2", "k2"], ["m2"]),
        NODE("Sub", ["m1", "m2"], ["y"]),
    ]
    weights = {"w": normal(6, 4, 3, 3), "k1": np.float32([2]), "k2": np.float32([3])}
    model = model_of(nodes, {"x": ["batch", 4, 6, 6]}, {"y": [None] * 4}, weights)
    result = fused(model, "conv", [X], tmp_path)
    assert result.counts == {"Conv+Mul": 2}
    assert len(weights_of(result.model)) == 4


def test_a_conv_with_two_readers_is_left_alone(tmp_path: Path) -> None:
    model = around_conv(
        [NODE("Mul", ["c", "k"], ["y"]), NODE("Relu", ["c"], ["z"])], {"k": np.float32([2])}, ("y", "z")
    )
    assert not fused(model, "conv", [X], tmp_path).changed


def test_a_conv_that_is_an_output_is_left_alone(tmp_path: Path) -> None:
    model = around_conv([NODE("Mul", ["c", "k"], ["y"])], {"k": np.float32([2])}, ("y", "c"))
    assert not fused(model, "conv", [X], tmp_path).changed


@pytest.mark.parametrize("shape", [(4,), (4, 4), (6, 4, 4), (1, 1, 1, 6, 1, 1)])
def test_a_constant_that_varies_along_other_axes_is_refused(tmp_path: Path, shape: tuple) -> None:
    for op_type in ("Mul", "Add"):
        model = around_conv([NODE(op_type, ["c", "k"], ["y"])], {"k": normal(*shape)})
        if len(shape) > 4:
            del model.graph.output[0].type.tensor_type.shape.dim[:]
            model.graph.output[0].type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 6)
        assert not fused(model, "conv", [X], tmp_path).changed
        assert f"'k' has shape {list(shape)}, which is not one element per channel" in refusals(
            model, CONV_RULES[f"Conv+{op_type}"]
        )


def test_a_factor_that_is_an_input_is_refused(tmp_path: Path) -> None:
    model = around_conv([NODE("Mul", ["c", "k"], ["y"])], {})
    model.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [1]))
    assert not fused(model, "conv", [X], tmp_path).changed
    assert "'k' is not constant" in refusals(model, CONV_RULES["Conv+Mul"])


def test_weights_that_are_computed_are_refused(tmp_path: Path) -> None:
    model = around_conv([norm_node()], NORM)
    model.graph.node[0].input[1] = "v"
    model.graph.input.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [6, 4, 3, 3]))
    assert not fused(model, "conv", [X], tmp_path).changed
    assert "'v' of Conv is not constant" in refusals(model, CONV_RULES["Conv+BatchNormalization"])


def test_batch_normalization_that_uses_the_batch_is_refused(tmp_path: Path) -> None:
    model = around_conv([norm_node(training_mode=1)], NORM)
    assert not fused(model, "conv", [X], tmp_path).changed
    assert "training mode" in refusals(model, CONV_RULES["Conv+BatchNormalization"])


def test_new_weights_take_no_name_that_is_in_use(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["c", "k"], ["m"]), NODE("Add", ["m", "c_weight"], ["y"])]
    model = around_conv(nodes, {"k": np.float32([2]), "c_weight": normal(4, 4)})
    assert fused(model, "conv", [X], tmp_path).counts == {"Conv+Mul": 1}
