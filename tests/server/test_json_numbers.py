"""Long arrays cut out of JSON: what is read must be what the plain way reads, and so must every refusal."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server import json_numbers, wire
from server.errors import MalformedRequest
from server.json_numbers import cut_out, parse_array, placeholder, read_numbers
from server.tensors import InferResponse
from server.wire import ReplyFormat, decode, encode

FP32, FP64, INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
unhurried = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=300
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are cut out whatever their length, and read in slices that hold a number or two."""
    monkeypatch.setattr(json_numbers, "LONG_BYTES", 0)
    monkeypatch.setattr(json_numbers, "SLICE_BYTES", 32)
    monkeypatch.setattr(wire, "LONG_BYTES", 0)


def body(**changes: object) -> bytes:
    first = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1.5, -2, 3e4, 0.25, 5, 6.125]} | changes
    second = {"name": "k", "shape": [3], "datatype": "INT64", "data": [9007199254740993, -7, 12345678]}
    return json.dumps({"id": "7", "inputs": [first, second]}).encode()


def outcome(text: bytes) -> Any:
    """What comes of a message: the request with its arrays as lists, or the text of the refusal."""
    try:
        request, reply = decode(text, None)
    except MalformedRequest as exc:
        return str(exc)
    tensors = {name: (array.dtype, array.shape, repr(array.tolist())) for name, array in request.inputs.items()}
    return tensors, reply, msgspec.structs.replace(request, inputs={})


def plain_outcome(text: bytes) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "LONG_BYTES", len(text) + 1)
        return outcome(text)


def test_arrays_are_cut_out_and_the_rest_stays_json(short: None) -> None:
    cut = cut_out(body())
    assert cut is not None
    assert cut.arrays == [b"1.5, -2, 30000.0, 0.25, 5, 6.125", b"9007199254740993, -7, 12345678"]
    first, second = json.loads(cut.rest)["inputs"]
    assert [first["data"], second["data"]] == [json.loads(placeholder(0)), json.loads(placeholder(1))]


def test_short_arrays_stay_in_the_message() -> None:
    assert cut_out(body()) is None
    assert cut_out(body(data=[0] * json_numbers.LONG_BYTES)) is not None


def test_cut_messages_are_read_exactly(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_read_message", lambda text: pytest.fail("left to the plain way"))
    request = decode(body(), None).request
    assert request.inputs["x"].dtype == FP32
    assert request.inputs["x"].tolist() == [[1.5, -2, 3e4], [0.25, 5, 6.125]]
    assert request.inputs["k"].tolist() == [9007199254740993, -7, 12345678]
    assert request.id == "7"


@pytest.mark.parametrize(
    "changes",
    [
        {"data": [1, 2, 3, 4, 5]},
        {"data": [1, 2, 3, 4, 5, 6, 7]},
        {"data": [1, 2, True, 4, 5, 6]},
        {"data": [1, 2, None, 4, 5, 6]},
        {"data": [1, 2, "3", 4, 5, 6]},
        {"data": [1, 2, {}, 4, 5, 6]},
        {"data": [1, 2, float("nan"), 4, float("-inf"), 6]},
        {"data": [1, 2, 1e300, 4, 5, 6]},
        {"data": [1, 2, 2**70, 4, 5, 6]},
        {"data": [[1, 2, 3], [4, 5, 6]]},
        {"data": [[1, 2], [3, 4, 5, 6]]},
        {"data": ["]", '"data":[1]', "[", "a", "b", "c"], "datatype": "BYTES"},
        {"data": [1, 2, 3, 4, 5, 2**63], "datatype": "INT64"},
        {"data": [1, 2, 3, 4, 5, 6.0], "datatype": "INT64"},
        {"data": [1, 2, 3, 4, 5, 300], "datatype": "UINT8"},
        {"data": [0, 1, 0, 1, 0, 1], "datatype": "BOOL"},
        {"datatype": "FP16"},
        {"datatype": "FP33"},
        {"shape": [-2, -3]},
        {"shape": [2, 3, 10**30]},
        {"shape": [0]},
        {"name": 5},
        {"name": '"data":[1,2]'},
        {"parameters": {"binary_data_size": 4}},
        {"parameters": {"data": [1, 2, 3, 4, 5]}},
        {"data": {"cut": 0}},
        {"data": {"cut": 1}},
    ],
)
def test_everything_else_comes_out_as_without_cutting(short: None, changes: dict[str, object]) -> None:
    assert outcome(body(**changes)) == plain_outcome(body(**changes))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"data": [1.5', b'"data": [1.5], "data": [2.5'),
        (b'"id"', b'"data": [1, 2, oops], "id"'),
        (b'"7"', b'"\\"data\\":[1,2]"'),
        (b'"7"', b'"\\\\"data":[1,2]'),
        (b'"id"', b'"x\\"data": [1, 2], "id"'),
        (b"1.5, ", b"1.5,, "),
        (b"1.5, ", b", 1.5, "),
        (b"6.125]", b"6.125,]"),
        (b"6.125]", b"6.125"),
        (b"1.5", b"01.5"),
        (b"1.5", b"1.5 2"),
        (b'"data": [1.5', b'"data"\n:\t[ 1.5'),
        (b'"data": [1.5', b'"d\\u0061ta": [1.5'),
    ],
)
def test_odd_texts_come_out_as_without_cutting(short: None, old: bytes, new: bytes) -> None:
    text = body().replace(old, new, 1)
    assert text != body()
    assert outcome(text) == plain_outcome(text)


TOKENS = [
    b",",
    b"]",
    b"[",
    b'"',
    b"\\",
    b" ",
    b"1",
    b"-",
    b".",
    b"e9",
    b"null",
    b"true",
    b"NaN",
    b"{",
    b"}",
    b'"data":[',
]


@unhurried
@given(st.data())
def test_damaged_messages_come_out_as_without_cutting(short: None, data: st.DataObject) -> None:
    text = body()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 3))
        text = text[:start] + data.draw(st.sampled_from([b"", *TOKENS])) + text[stop:]
    assert outcome(text) == plain_outcome(text)


@unhurried
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_sliced_doubles_keep_every_bit(short: None, values: list[float]) -> None:
    seen = read_numbers(json.dumps(values).encode()[1:-1], FP64, len(values))
    assert seen is not None
    assert seen.tobytes() == np.array(values).tobytes()


def test_a_slice_without_a_number_is_a_comma_too_many(short: None) -> None:
    text = b"," + b" " * 25 + b"1234567"
    assert len(text) == json_numbers.SLICE_BYTES + 1
    assert read_numbers(text, INT64, 1) is None


def test_what_only_looks_like_a_placeholder_gets_no_other_array(short: None) -> None:
    text = body(data="FAKE", shape=[3], datatype="INT64").replace(b'"FAKE"', placeholder(0))
    assert "input 'x'" in plain_outcome(text)
    assert outcome(text) == plain_outcome(text)


def test_a_number_longer_than_a_slice_is_left_to_the_plain_way(short: None) -> None:
    assert read_numbers(b"1" * 50 + b",2", FP64, 2) is None


@pytest.mark.parametrize("count", [-6, 0, 2, 4, 10**12])
def test_a_count_that_is_not_that_of_the_numbers_is_refused(count: int) -> None:
    assert read_numbers(b"1,2,3", INT64, count) is None


def test_arrays_can_be_parsed_one_after_the_other_in_a_thread() -> None:
    for _ in range(3):
        parsed = parse_array(b"[1,2]")
        assert parsed is not None
        assert len(parsed) == 2
        del parsed
    assert parse_array(b"{}") is None
    assert parse_array(b"[1") is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_])
def test_sliced_output_is_that_of_one_piece(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_numbers, "SLICE_NUMBERS", 3)
    for count in (0, 1, 3, 7, 9):
        numbers = (np.arange(count) % 5 / 2).astype(dtype)
        assert json.loads(json_numbers.write_numbers(numbers)) == numbers.tolist()


def test_sliced_output_writes_what_is_no_number_as_bare_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_numbers, "SLICE_NUMBERS", 2)
    text = json_numbers.write_numbers(np.array([1, 2, np.nan, np.inf, -np.inf], np.float32))
    assert text == b"[1.0,2.0,NaN, Infinity,-Infinity]"


def test_long_outputs_reach_the_client_exactly() -> None:
    array = np.random.default_rng(0).standard_normal((3, json_numbers.SLICE_NUMBERS // 2)).astype(np.float32)
    array[1, 1] = np.nan
    response = InferResponse("m", "1", "", {"y": array, "z": array[:1, :4]}, "fp32", "cpu", 1, 0.0, 0.0)
    outputs = json.loads(encode(response, ReplyFormat()).parts[0])["outputs"]
    for output, expected in zip(outputs, (array, array[:1, :4]), strict=True):
        np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), expected)
