import contextlib
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from server.errors import MalformedRequest
from server.tensors import DATATYPE_OF_NUMPY, NUMPY_DTYPE, InferRequest, InferResponse, Tensors, TensorSpec
from server.wire import Encoded, ReplyFormat, decode, encode

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMERIC = sorted(set(NUMPY_DTYPE) - {"BYTES"})
X = TensorSpec("x", "FP32", ("batch", 2))


def message(**changes: object) -> dict[str, Any]:
    """A request that is valid unless the changes break it."""
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]}]} | changes


def tensor(**changes: object) -> dict[str, Any]:
    given = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]} | changes
    return message(inputs=[{key: value for key, value in given.items() if value is not ...}])


def refusal(body: object, tail: bytes = b"", *, length: int | None = -1) -> str:
    """The text with which a message is refused; it is sent with its own length unless one is given."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(MalformedRequest) as caught:
        decode(text + tail, len(text) if length == -1 else length)
    return str(caught.value)


def response(outputs: Tensors, request_id: str = "") -> InferResponse:
    return InferResponse("m", "3", request_id, outputs, "fp32", "cpu", 1, 0.0, 0.0)


def read_by_client(encoded: Encoded) -> InferResult:
    return InferResult.from_response_body(b"".join(encoded.parts), header_length=encoded.json_length)


def sent_by_client(inputs: dict[str, tuple[np.ndarray, bool]], **options: Any) -> InferRequest:
    """What the server reads when tritonclient sends these arrays, each in JSON or (True) binary."""
    tensors = []
    for name, (array, binary) in inputs.items():
        tensors.append(InferInput(name, list(array.shape), DATATYPE_OF_NUMPY[array.dtype]))
        tensors[-1].set_data_from_numpy(array, binary_data=binary)
    return decode(*InferenceServerClient.generate_request_body(tensors, **options)).request


@st.composite
def arrays(draw: st.DrawFn, binary: bool) -> np.ndarray:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    datatypes = [*NUMERIC, "BYTES"] if binary else sorted({*NUMERIC, "BYTES"} - {"FP16"})
    dtype = NUMPY_DTYPE[draw(st.sampled_from(datatypes))]
    if dtype == np.object_:
        elements = st.binary(max_size=5) if binary else st.text(max_size=5).map(str.encode)
        return draw(hnp.arrays(dtype, shape, elements=elements, fill=st.nothing()))
    return draw(hnp.arrays(dtype, shape))


@st.composite
def named_arrays(draw: st.DrawFn) -> dict[str, tuple[np.ndarray, bool]]:
    flags = draw(st.dictionaries(st.text("abc/:é", min_size=1, max_size=4), st.booleans(), min_size=1, max_size=3))
    return {name: (draw(arrays(binary)), binary) for name, binary in flags.items()}


def assert_same(seen: np.ndarray, expected: np.ndarray) -> None:
    assert seen.dtype == expected.dtype
    assert seen.shape == expected.shape
    if expected.dtype == np.object_:
        assert seen.tolist() == expected.tolist()
    else:
        np.testing.assert_array_equal(seen, expected)


@unhurried
@given(named_arrays())
def test_requests_of_the_triton_client_arrive_exactly(inputs: dict[str, tuple[np.ndarray, bool]]) -> None:
    seen = sent_by_client(inputs).inputs
    assert list(seen) == list(inputs)
    for name, (array, _) in inputs.items():
        assert_same(seen[name], array)


@unhurried
@given(named_arrays(), st.text(max_size=3))
def test_responses_reach_the_triton_client_exactly(
    outputs: dict[str, tuple[np.ndarray, bool]], request_id: str
) -> None:
    reply = ReplyFormat(False, {name: binary for name, (_, binary) in outputs.items()})
    encoded = encode(response({name: array for name, (array, _) in outputs.items()}, request_id), reply)
    result = read_by_client(encoded)
    for name, (array, binary) in outputs.items():
        seen = result.as_numpy(name)
        if array.dtype == np.object_ and not binary:
            assert [element.encode() for element in seen.ravel()] == array.ravel().tolist()
        else:
            assert_same(seen, array)
    assert (encoded.json_length is None) == (len(encoded.parts) == 1)
    assert result.get_response().get("id", "") == request_id


@unhurried
@given(hnp.arrays(np.float32, 8))
def test_float32_survives_a_json_round_trip_bit_by_bit(array: np.ndarray) -> None:
    text = b"".join(encode(response({"x": array}), ReplyFormat()).parts)
    seen = decode(json.dumps({"inputs": json.loads(text)["outputs"]}).encode(), None).request.inputs["x"]
    finite = np.isfinite(array)
    assert seen[finite].tobytes() == array[finite].tobytes()
    np.testing.assert_array_equal(seen, array)


@unhurried
@given(st.binary(max_size=60), st.none() | st.integers(-2, 70))
def test_arbitrary_bytes_are_read_or_refused(body: bytes, length: int | None) -> None:
    with contextlib.suppress(MalformedRequest):
        decode(body, length, X)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@unhurried
@given(st.sampled_from(["name", "shape", "datatype", "data", "parameters", "id", "outputs", "inputs"]), JSON_VALUES)
def test_any_value_in_any_field_is_read_or_refused(field: str, value: object) -> None:
    body = message(**{field: value}) if field in ("id", "outputs", "inputs") else tensor(**{field: value})
    with contextlib.suppress(MalformedRequest):
        decode(json.dumps(body).encode(), None)


@unhurried
@given(st.dictionaries(st.sampled_from(["timeout", "variant", "sequence_id", "binary_data_output", "k"]), JSON_VALUES))
def test_any_parameters_are_read_or_refused(parameters: dict[str, object]) -> None:
    with contextlib.suppress(MalformedRequest):
        decode(json.dumps(message(parameters=parameters)).encode(), None)


def test_a_request_cut_at_any_byte_is_refused() -> None:
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
                {"name": "b", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}},
                {"name": "c", "shape": [2], "datatype": "FP32", "data": [1.5, 2.5]},
            ]
        }
    ).encode()
    body = head + b"\1\0\2\0" + b"\2\0\0\0hi\1\0\0\0!"
    inputs = decode(body, len(head)).request.inputs
    assert inputs["a"].tolist() == [1, 2]
    assert inputs["b"].tolist() == [b"hi", b"!"]
    for end in range(len(body)):
        for length in (len(head), None, end):
            with pytest.raises(MalformedRequest):
                decode(body[:end], length, None)
    for length in range(1, len(head)):
        with pytest.raises(MalformedRequest):
            decode(body, length)
    with pytest.raises(MalformedRequest, match="1 bytes are left over"):
        decode(body + b"!", len(head))


@pytest.mark.parametrize("length", [-1, 10**30, 2**31])
def test_a_header_length_beyond_the_body_is_refused(length: int) -> None:
    body = json.dumps(message()).encode()
    with pytest.raises(MalformedRequest, match="at most the"):
        decode(body, length)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[NaN,{"a":'])
def test_a_depth_bomb_is_refused(opening: bytes) -> None:
    for depth in (100, 900, 5_000, 200_000):
        bomb = opening * depth
        assert "request" in refusal(bomb)
        assert refusal(b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + bomb)
        closing = {b"[": b"]", b'{"a":': b"}", b'[NaN,{"a":': b"}]"}[opening] * depth
        assert refusal(b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + bomb + b"1" + closing + b"}]}")
        assert refusal(
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":' + bomb + b"1" + closing + b"}]}"
        )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b" ", "not valid JSON"),
        (b"{}", "missing required field `inputs`"),
        (b"[]", "Expected `object`, got `array`"),
        (b"null", "got `null`"),
        (b'{"inputs":[]} x', "not valid JSON"),
        (b'{"inputs":[{"data":[Nan]}]}', "not valid JSON"),
        (b'{"inputs":[{"data":[NaN]}]', "not valid JSON"),
        (b'\xff\xfe{"inputs":NaN}', "not valid JSON"),
        (b'{"inputs":NaN}', "Expected `array`"),
        (message(id=5), "Expected `str`, got `int` - at `$.id`"),
        (tensor(name=...), "missing required field `name`"),
        (tensor(shape=[1, 2.0]), "Expected `int`, got `float`"),
        (tensor(shape=[1, -2]), "has the size -2 in its shape; sizes go from 0"),
        (tensor(shape=[1, 3]), "has 2 elements where shape [1, 3] wants 1"),
        (tensor(datatype="FP31"), "datatype 'FP31'; served are"),
        (tensor(data=...), "neither of data and binary_data_size; give exactly one"),
        (tensor(parameters={"binary_data_size": 8}), "both of data and binary_data_size; give exactly one"),
        (tensor(data=..., parameters={"binary_data_size": 8}), "the body holds 0 more bytes"),
        (tensor(data=..., parameters={"binary_data_size": -8}), "binary_data_size -8"),
        (tensor(data=..., parameters={"binary_data_size": True}), "Expected `int | null`, got `bool`"),
        (tensor(data=..., parameters={"shared_memory_region": "r"}), "shared memory is not served"),
        (message(inputs=message()["inputs"] * 2), "input 'x' already exists in request"),
        (message(outputs=[{"name": "y"}, {"name": "y"}]), "output 'y' already exists in request"),
        (message(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory is not served"),
        (message(outputs=[{"name": "y", "parameters": {"classification": 3}}]), "classification, which is not served"),
        (message(parameters={"timeout": -1}), "timeout -1; it counts microseconds"),
        (message(parameters={"timeout": 1.5}), "Expected `int | null`, got `float`"),
        (message(parameters={"timeout": 10**30}), "it counts microseconds"),
        (message(parameters={"variant": 8}), "Expected `str`, got `int`"),
        (message(parameters={"sequence_id": 7}), "sequences are not served"),
        (message(parameters={"sequence_id": "s"}), "sequences are not served"),
        (message(parameters={"sequence_start": True}), "sequences are not served"),
    ],
)
def test_malformed_messages_are_refused_by_name(body: object, text: str) -> None:
    assert text in refusal(body)


def test_lone_surrogates_beside_nan_are_refused() -> None:
    for body in (message(id="\ud800", nan=float("nan")), tensor(name="\ud800", data=[float("nan"), 1])):
        assert "not valid JSON" in refusal(body)


def test_nan_and_infinity_are_read_as_clients_write_them() -> None:
    body = json.dumps(tensor(shape=[4], data=[float("nan"), float("inf"), -float("inf"), 1])).encode()
    np.testing.assert_array_equal(
        decode(body, None).request.inputs["x"], np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    )
    assert "element 0 of input 'x' is nan" in refusal(tensor(datatype="INT32", data=[float("nan"), 1]))
    body = json.dumps(message(id="NaN", parameters={"variant": "Infinity"})).encode()
    assert decode(body, None).request.id == "NaN"


def test_parameters_of_the_request_are_read() -> None:
    body = message(id="7", parameters={"timeout": 2_500, "variant": "int8", "priority": 2, "mine": {"a": [1]}})
    request = decode(json.dumps(body).encode(), None).request
    assert (request.id, request.timeout_s, request.variant, request.outputs) == ("7", 0.0025, "int8", ())


@pytest.mark.parametrize(
    "parameters", [None, {}, {"timeout": 0}, {"timeout": None}, {"sequence_id": 0, "sequence_end": False}]
)
def test_empty_parameters_mean_the_defaults(parameters: object) -> None:
    request = decode(json.dumps(message(parameters=parameters)).encode(), None).request
    assert (request.timeout_s, request.variant) == (None, "")


@pytest.mark.parametrize(
    ("outputs", "parameters", "binary", "named"),
    [
        (None, None, False, {}),
        ([], None, False, {}),
        (None, {"binary_data_output": True}, True, {}),
        ([{"name": "y"}], None, False, {"y": False}),
        ([{"name": "y"}], {"binary_data_output": True}, True, {"y": True}),
        ([{"name": "y", "parameters": {"binary_data": True}}], None, False, {"y": True}),
        ([{"name": "y", "parameters": {"binary_data": False}}], {"binary_data_output": True}, True, {"y": False}),
    ],
)
def test_the_flag_of_an_output_overrides_the_one_of_the_request(
    outputs: object, parameters: object, binary: bool, named: dict[str, bool]
) -> None:
    decoded = decode(json.dumps(message(outputs=outputs, parameters=parameters)).encode(), None)
    assert decoded.reply == ReplyFormat(binary, named)
    assert decoded.request.outputs == tuple(named)


def test_the_triton_client_asks_for_binary_outputs_as_it_documents() -> None:
    request_input = InferInput("x", [2], "INT8").set_data_from_numpy(np.zeros(2, np.int8))
    wanted = [InferRequestedOutput("y"), InferRequestedOutput("z", binary_data=False)]
    for outputs, reply in ((None, ReplyFormat(True)), (wanted, ReplyFormat(False, {"y": True, "z": False}))):
        body = InferenceServerClient.generate_request_body([request_input], outputs=outputs, timeout=9)
        assert decode(*body).reply == reply


def test_a_response_holds_only_the_members_that_it_needs() -> None:
    floats = np.array([[1.5, 2.0]], np.float32)
    text = b"".join(encode(response({"y": floats}), ReplyFormat()).parts)
    output = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}
    assert json.loads(text) == {"model_name": "m", "model_version": "3", "outputs": [output]}

    encoded = encode(response({"y": floats, "e": floats[:0]}, "7"), ReplyFormat(True))
    assert encoded.json_length is not None
    body = b"".join(encoded.parts)
    head = json.loads(body[: encoded.json_length])
    assert head["id"] == "7"
    assert head["outputs"][0] == {
        "name": "y",
        "datatype": "FP32",
        "shape": [1, 2],
        "parameters": {"binary_data_size": 8},
    }
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 0}
    assert body[encoded.json_length :] == floats.tobytes()


def test_a_response_of_empty_binary_outputs_is_all_json() -> None:
    encoded = encode(response({"e": np.empty((0, 3), np.int64)}), ReplyFormat(True))
    assert encoded.json_length is None
    assert orjson.loads(b"".join(encoded.parts))["outputs"][0]["parameters"] == {"binary_data_size": 0}


def test_nan_in_an_output_is_written_as_a_token_and_the_word_null_stays_text() -> None:
    outputs = {
        "null": np.array([b"null"], np.object_),
        "y": np.array([np.nan, np.inf, -np.inf, 0.1], np.float32),
        "n": np.arange(3),
    }
    text = b"".join(encode(response(outputs), ReplyFormat()).parts)
    assert b"NaN" in text
    assert b"-Infinity" in text
    seen = {output["name"]: output["data"] for output in json.loads(text)["outputs"]}
    assert seen["null"] == ["null"]
    assert seen["n"] == [0, 1, 2]
    np.testing.assert_array_equal(np.array(seen["y"], np.float32), outputs["y"])


def test_binary_outputs_are_written_without_a_copy_where_they_are_contiguous() -> None:
    batch = np.arange(8, dtype=np.float32).reshape(4, 2)
    part = encode(response({"y": batch[1:2]}), ReplyFormat(True)).parts[1]
    assert np.shares_memory(np.frombuffer(part, np.float32), batch)


@pytest.mark.parametrize(
    ("shape", "datatype", "body", "expected"),
    [
        ((2, 2), "FP32", bytes(16), (2, 2)),
        (("batch", 2), "FP32", bytes(8), (1, 2)),
        (("batch", 2), "FP32", bytes(24), (3, 2)),
        (("batch", "length"), "INT64", bytes(24), (1, 3)),
        ((), "UINT8", b"1", ()),
        (("batch",), "BYTES", b"any \xff bytes", (1,)),
        (("batch", 1), "BYTES", b"any", (1, 1)),
    ],
)
def test_a_raw_request_is_the_bytes_of_the_only_input(
    shape: tuple[int | str, ...], datatype: str, body: bytes, expected: tuple[int, ...]
) -> None:
    decoded = decode(body, 0, TensorSpec("x", datatype, shape))
    assert decoded.request.inputs["x"].shape == expected
    if datatype == "BYTES":
        assert decoded.request.inputs["x"].item() == body
    assert decoded.reply.binary


@pytest.mark.parametrize(
    ("spec", "body", "text"),
    [
        (None, bytes(8), "exactly one input"),
        (X, b"", "raw request is empty"),
        (X, bytes(7), r"shape \[1, 2\] of FP32 takes exactly 8 bytes"),
        (X, bytes(12), r"shape \[1, 2\] of FP32 takes exactly 8 bytes"),
        (TensorSpec("x", "FP32", ("b", "h", "w")), bytes(8), "can leave one axis open"),
        (TensorSpec("x", "FP32", (2, "h", "w")), bytes(8), "can leave one axis open"),
        (TensorSpec("x", "FP32", (0, "h")), bytes(8), "binary_data_size"),
        (TensorSpec("x", "BYTES", (2,)), b"abc", "input 'x'"),
    ],
)
def test_a_raw_request_that_does_not_fit_is_refused(spec: TensorSpec | None, body: bytes, text: str) -> None:
    with pytest.raises(MalformedRequest, match=text):
        decode(body, 0, spec)


@pytest.mark.parametrize(("given", "seen"), [(1, 1), (9, 9), (0, 0)])
def test_priority_is_read(given: int, seen: int):
    message = {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
        "parameters": {"priority": given},
    }
    assert decode(json.dumps(message).encode(), None, None).request.priority == seen


@pytest.mark.parametrize("given", [10, -1])
def test_priority_out_of_range_is_refused(given: int):
    message = {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
        "parameters": {"priority": given},
    }
    with pytest.raises(MalformedRequest, match=rf"priority {given}; it is 1 \(first\) to 9 \(last\)"):
        decode(json.dumps(message).encode(), None, None)
