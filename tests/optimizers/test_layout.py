import onnx
import onnx_ir as ir
import pytest

from optimizers.passes.layout import ONE, Part, Size, axes_of, followed
from tests.optimizers.graphs import NODE, model_of

BATCH, LENGTH = Part("batch", Size(1, ("batch",))), Part("length", Size(12))
HIDDEN, HEADS, HEAD = Part("hidden", Size(32)), Part("heads", Size(4)), Part("head", Size(8))
START = axes_of([BATCH], [LENGTH], [HIDDEN])


def reshaped_to(*shape: int | str | None) -> ir.Value:
    """Return a value that Reshape made, of this shape."""
    model = model_of([NODE("Reshape", ["x", "shape"], ["y"])], {"x": ["batch", 12, 32]}, {"y": list(shape)})
    model.graph.input.append(onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [len(shape)]))
    return ir.from_proto(model).graph.outputs[0]


def test_quotients_are_whole_for_every_value_of_the_names() -> None:
    assert Size(12, ("a", "b")).over(Size(4, ("b",))) == Size(3, ("a",))
    assert Size(12, ("a",)).over(Size(5)) is None
    assert Size(12).over(Size(1, ("a",))) is None
    assert Size(12).over(Size(0)) is None


@pytest.mark.parametrize(
    "shape", [("batch", 12, 4, 8), (None, 12, 4, 8), ("batch", 12, None, 8), ("batch", 12, 4, None)]
)
def test_one_unknown_size_follows_from_the_others(shape: tuple) -> None:
    assert followed(START, [reshaped_to(*shape)]) == axes_of([BATCH], [LENGTH], [HEADS], [HEAD])


def test_a_name_of_inference_counts_as_what_it_is_known_to_be() -> None:
    step = reshaped_to("other", 12, None, 8)
    assert followed(START, [step]) is None
    assert followed(START, [step], {"other": BATCH.size}) == axes_of([BATCH], [LENGTH], [HEADS], [HEAD])


def test_only_the_hidden_size_is_cut() -> None:
    assert followed(START, [reshaped_to("batch", 4, 3, 32)]) is None


def test_a_cut_across_parts_is_not_followed() -> None:
    assert followed(START, [reshaped_to("batch", 8, 48)]) is None


def test_parts_of_size_one_are_anywhere() -> None:
    start = axes_of([Part("batch", ONE)], [LENGTH], [HIDDEN])
    assert followed(start, [reshaped_to(1, 12, 4, 8)]) == axes_of([], [LENGTH], [HEADS], [HEAD])
