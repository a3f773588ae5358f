import json
from math import prod

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import MalformedRequest
from server.tensor_data import from_binary, from_json, shown, to_binary, to_json
from server.tensors import NUMPY_DTYPE

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(datatype: str, shape: list[int], data: object) -> np.ndarray:
    """Read JSON data both ways, from its text and as a parsed value, and insist that they agree."""
    parsed = from_json("x", datatype, shape, data)
    from_text = from_json("x", datatype, shape, msgspec.Raw(json.dumps(data).encode()))
    assert parsed.dtype == from_text.dtype == NUMPY_DTYPE[datatype]
    np.testing.assert_array_equal(parsed, from_text)
    return from_text


def refusal(datatype: str, shape: list[int], data: object) -> str:
    """The text with which both ways refuse the data."""
    with pytest.raises(MalformedRequest) as parsed:
        from_json("x", datatype, shape, data)
    with pytest.raises(MalformedRequest) as from_text:
        from_json("x", datatype, shape, msgspec.Raw(json.dumps(data).encode()))
    assert str(parsed.value) == str(from_text.value)
    return str(parsed.value)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_integers_are_taken_for_floats(datatype: str) -> None:
    assert read(datatype, [3], [1, 2.5, -3]).tolist() == [1.0, 2.5, -3.0]
    assert read(datatype, [2], [2**64, 2**100]).tolist() == [2.0**64, 2.0**100]


@pytest.mark.parametrize("datatype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"])
def test_integers_keep_their_limits_and_refuse_what_lies_beyond(datatype: str) -> None:
    limits = np.iinfo(NUMPY_DTYPE[datatype])
    assert read(datatype, [2], [limits.min, limits.max]).tolist() == [limits.min, limits.max]
    for outside in (limits.min - 1, limits.max + 1):
        assert f"out of the range of {datatype}" in refusal(datatype, [1], [outside])


@pytest.mark.parametrize(
    ("datatype", "element", "wanted"),
    [
        ("INT32", 1.0, "takes integers"),
        ("INT64", True, "takes integers"),
        ("INT64", "1", "takes integers"),
        ("FP32", True, "takes numbers"),
        ("FP32", "1.5", "takes numbers"),
        ("FP32", None, "takes numbers"),
        ("FP32", {"a": 1}, "is an object"),
        ("BOOL", 1, "takes true or false"),
        ("BYTES", 1, "takes strings"),
    ],
)
def test_elements_of_another_type_are_named(datatype: str, element: object, wanted: str) -> None:
    good = {"BOOL": True, "BYTES": "a"}.get(datatype, 1)
    text = refusal(datatype, [3], [good, element, good])
    assert text.startswith("element 1 of input 'x'")
    assert wanted in text


def test_a_float_beyond_fp32_is_refused_not_made_infinite() -> None:
    assert "out of the range of FP32" in refusal("FP32", [2], [1.0, 1e300])
    assert read("FP64", [1], [1e300]).tolist() == [1e300]


def test_large_integers_keep_every_digit() -> None:
    assert read("INT64", [2], [2**53 + 1, -(2**53) - 1]).tolist() == [2**53 + 1, -(2**53) - 1]


def test_fp16_in_json_is_sent_to_binary() -> None:
    assert "send it as binary" in refusal("FP16", [1], [1.0])
    with pytest.raises(MalformedRequest, match="binary_data true"):
        to_json("y", np.zeros(1, np.float16))


@pytest.mark.parametrize("data", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]])
def test_data_is_flat_or_nested_as_the_shape(data: list[object]) -> None:
    assert read("INT64", [2, 3], data).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 3], [1, 2, 3, 4, 5]),
        ([2, 3], [1, 2, 3, 4, 5, 6, 7]),
        ([2, 3], [[1, 2], [3, 4], [5, 6]]),
        ([2, 3], [[1, 2], [3, 4, 5, 6]]),
        ([2, 3], [[1, 2, 3], 4, 5, 6]),
        ([2, 3], [[[1, 2, 3], [4, 5, 6]]]),
        ([1, 2, 2], [[[1, 2, 3], [4]]]),
        ([2], [1, [2]]),
        ([2], [[1, 2], []]),
        ([2, 0], [[], [], []]),
        ([], [1, 2]),
        ([1], 1),
        ([1], None),
        ([2], {"a": 1}),
    ],
)
def test_data_that_does_not_fill_its_shape_is_refused(shape: list[int], data: object) -> None:
    for datatype in ("INT64", "FP32"):
        assert "input 'x'" in refusal(datatype, shape, data)


@pytest.mark.parametrize(("shape", "data"), [([0], []), ([2, 0], [[], []]), ([0, 5], []), ([], [7]), ([], 7)])
def test_empty_tensors_and_scalars_are_read(shape: list[int], data: object) -> None:
    assert read("FP32", shape, data).shape == tuple(shape)


@pytest.mark.parametrize(
    "shape",
    [[-1], [2**31], [2**31, 0], [2, -3], [10**400], [2**31 - 1] * 10, [1] * 33, [0] + [2**31 - 1] * 3],
)
def test_impossible_shapes_are_refused_without_allocating(shape: list[int]) -> None:
    for datatype in ("FP32", "BYTES"):
        refusal(datatype, shape, [])
        with pytest.raises(MalformedRequest):
            from_binary("x", datatype, shape, memoryview(b""), 0, 0)


def test_unknown_datatypes_are_refused_with_the_known_ones() -> None:
    assert "served are BOOL, UINT8" in refusal("BF16", [1], [1])
    with pytest.raises(MalformedRequest, match="served are"):
        from_binary("x", "FP33", [1], memoryview(b"1234"), 0, 4)


@pytest.mark.parametrize("size", [-1, 0, 7, 9, 12, 13, 10**30])
def test_binary_sizes_must_be_exact(size: int) -> None:
    with pytest.raises(MalformedRequest, match="binary_data_size"):
        from_binary("x", "FP32", [2], memoryview(bytes(12)), 0, size)


def test_binary_tensors_are_views_of_the_body() -> None:
    body = bytearray(b"....." + np.arange(6, dtype=np.int32).tobytes())
    array = from_binary("x", "INT32", [2, 3], memoryview(body), 5, 24)
    body[5] = 9
    assert array.tolist() == [[9, 1, 2], [3, 4, 5]]


def test_bool_bytes_other_than_0_and_1_are_refused() -> None:
    assert from_binary("x", "BOOL", [3], memoryview(b"\1\0\1"), 0, 3).tolist() == [True, False, True]
    with pytest.raises(MalformedRequest, match="other than 0 and 1"):
        from_binary("x", "BOOL", [3], memoryview(b"\1\0\2"), 0, 3)


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ([1], b"\x05\0\0\0abc"),
        ([2], b"\x03\0\0\0abc\x01\0\0"),
        ([1], b"\x01\0\0\0abc"),
        ([2**31 - 1], b"\x01\0\0\0a"),
        ([1], b"\xff\xff\xff\xffa"),
        ([2], b"\x08\0\0\0abcd"),
        ([0], b"\0\0\0\0"),
    ],
)
def test_byte_elements_must_end_with_their_tensor(shape: list[int], body: bytes) -> None:
    with pytest.raises(MalformedRequest, match="input 'x'"):
        from_binary("x", "BYTES", shape, memoryview(body), 0, len(body))


@unhurried
@given(st.lists(st.binary(max_size=9), max_size=9))
def test_byte_elements_survive_binary(elements: list[bytes]) -> None:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    body = bytes(to_binary(array))
    assert from_binary("x", "BYTES", [len(elements)], memoryview(body), 0, len(body)).tolist() == elements


@unhurried
@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_nested_and_flat_data_read_the_same(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(prod(shape), dtype=np.float64).reshape(shape)
    nested = array.tolist()
    if not shape or 0 not in shape[:-1]:  # nested lists lose the sizes behind an empty axis
        np.testing.assert_array_equal(read("FP64", shape, nested), array)
    np.testing.assert_array_equal(read("FP64", shape, array.ravel().tolist()), array)


def test_lone_surrogates_and_broken_utf8_are_refused() -> None:
    with pytest.raises(MalformedRequest, match="not valid Unicode"):
        from_json("x", "BYTES", [1], ["\ud800"])
    with pytest.raises(MalformedRequest, match="cannot be read"):
        from_json("x", "BYTES", [1], msgspec.Raw(b'["\xff"]'))


def test_bytes_that_are_no_utf8_have_no_json_form() -> None:
    with pytest.raises(MalformedRequest, match="binary_data true"):
        to_json("y", np.array([b"\xff"], np.object_))


def test_columns_are_written_in_row_major_order() -> None:
    table = np.arange(6, dtype=np.int16).reshape(2, 3)
    for view in (table[:, 1], table.T, table[::-1]):
        assert bytes(to_binary(view)) == view.tobytes()
        assert np.asarray(to_json("y", view)).tolist() == view.ravel().tolist()


def test_shown_values_stay_short() -> None:
    for value in ("a" * 10**6, 10**5000, [1] * 10**6, {"a": 10**5000}, None):
        assert len(shown(value)) < 80
