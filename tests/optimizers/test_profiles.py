"""Shape profiles: from data, from traffic, and from what a user writes."""

import json

import numpy as np
import pytest

from optimizers.calibration import Samples
from optimizers.errors import EngineBuildError
from optimizers.profiles import parse_profiles, profile_of, profiles_of, profiles_of_traffic, reaching_down
from server.artifact import Profile
from server.tensors import Signature, TensorSpec

IDS = Samples({name: np.zeros((20, 7), np.int64) for name in ("ids", "mask")}, 20, batched=True)
FRAME = Samples({"frame": np.zeros((20, 3, 5), np.float32)}, 20, batched=False, whole=frozenset({"frame"}))


def test_profile_reaches_from_one_row_to_the_largest_batch():
    one, many = (dict.fromkeys(("ids", "mask"), (rows, 7)) for rows in (1, 16))
    assert profile_of(IDS, 16) == Profile(one, many, many)


def test_profile_of_inputs_without_a_batch_axis_is_their_shape():
    shape = {"frame": (3, 5)}
    assert profile_of(FRAME, 16) == Profile(shape, shape, shape)
    assert profiles_of(FRAME, [8, 16]) == (Profile(shape, shape, shape),)


def test_several_batch_sizes_share_the_range_between_them():
    small, large = profiles_of(IDS, [32, 8, 8])
    assert [small.minimum["ids"], small.optimum["ids"], small.maximum["ids"]] == [(1, 7), (8, 7), (8, 7)]
    assert [large.minimum["mask"], large.optimum["mask"], large.maximum["mask"]] == [(9, 7), (32, 7), (32, 7)]


def test_text_becomes_a_profile():
    assert parse_profiles(["x=1x64:8x64:32x64", "a=b=2"]) == (
        Profile({"x": (1, 64), "a=b": (2,)}, {"x": (8, 64), "a=b": (2,)}, {"x": (32, 64), "a=b": (2,)}),
    )


def test_input_named_again_makes_another_profile():
    small, large = parse_profiles(["x=1x4:2x4:8x4", "state=3", "x=9x4:32x4:32x4"])
    assert (small.minimum, small.maximum) == ({"x": (1, 4), "state": (3,)}, {"x": (8, 4), "state": (3,)})
    assert (large.minimum, large.optimum) == ({"x": (9, 4), "state": (3,)}, {"x": (32, 4), "state": (3,)})


def test_nothing_given_is_a_profile_without_shapes():
    assert parse_profiles([]) == (Profile({}, {}, {}),)


@pytest.mark.parametrize(
    "text",
    ["x", "=1x2", "x=", "x=1x2:3x2", "x=1:2:3:4", "x=0x2", "x=-1x2", "x=1x", "x=1xa", "x=1,2", "x=1x2:3x2:", "x= 1"],
)
def test_other_forms_are_refused(text: str):
    with pytest.raises(EngineBuildError, match="it is INPUT=MIN:BEST:MAX") as refusal:
        parse_profiles([text])
    assert repr(text) in str(refusal.value)


def test_numbers_of_profiles_that_differ_are_refused():
    with pytest.raises(EngineBuildError, match=r"different numbers of profiles: \{'a': 2, 'b': 3\}"):
        parse_profiles(["a=1", "a=2", "b=1", "b=2", "b=3"])


def test_profile_reaches_down_on_variable_axes_only():
    signature = Signature(
        (TensorSpec("ids", "INT64", ("batch", "length")), TensorSpec("image", "FP32", (None, 3, 8, 8))), ()
    )
    large = {"ids": (8, 64), "image": (8, 3, 8, 8)}
    reached = reaching_down(Profile(large, large, large), signature)
    assert reached.minimum == {"ids": (1, 1), "image": (1, 3, 8, 8)}
    assert (reached.optimum, reached.maximum) == (large, large)


def traffic(*shapes: dict[str, list[int]]) -> bytes:
    seen = [{"requests": 9 - place, "inputs": each} for place, each in enumerate(shapes)]
    return json.dumps({"name": "m", "version": "1", "shapes": seen}).encode()


def test_traffic_becomes_profiles_from_the_smallest_to_the_largest_best_at_the_most_frequent():
    seen = traffic({"ids": [-1, 64], "side": [3]}, {"ids": [-1, 8], "side": [3]}, {"ids": [-1, 128], "side": [3]})
    small, large = profiles_of_traffic(seen, [32, 8])
    assert small == Profile(
        {"ids": (1, 8), "side": (3,)}, {"ids": (8, 64), "side": (3,)}, {"ids": (8, 128), "side": (3,)}
    )
    assert (large.minimum["ids"], large.optimum["ids"], large.maximum["ids"]) == ((9, 8), (32, 64), (32, 128))


def test_traffic_of_a_model_without_a_batch_needs_no_rows():
    (profile,) = profiles_of_traffic(traffic({"x": [5, 2]}, {"x": [7, 2]}), [])
    assert profile == Profile({"x": (5, 2)}, {"x": (5, 2)}, {"x": (7, 2)})


@pytest.mark.parametrize(
    ("document", "rows", "text"),
    [
        (b"{}", [8], "no answer of /v2/models/NAME/shapes"),
        (b"no JSON", [8], "no answer of /v2/models/NAME/shapes"),
        (traffic(), [8], "m version 1 has had no requests yet"),
        (traffic({"x": [-1, 2]}), [], "largest batch of each profile with --rows"),
    ],
)
def test_traffic_that_makes_no_profile_says_why(document: bytes, rows: list[int], text: str):
    with pytest.raises(EngineBuildError, match=text):
        profiles_of_traffic(document, rows)
