import json

import numpy as np
import pytest

from loadtests.payloads import LENGTH_HEADER, Filling, Payload, PayloadError, build_payload, difference, read_outputs
from server.tensors import NUMPY_DTYPE, InferResponse
from server.wire import ReplyFormat, decode, encode

DATATYPES = sorted(NUMPY_DTYPE)


def metadata(*inputs: tuple[str, str, list[int]]) -> dict[str, object]:
    return {"name": "m", "inputs": [dict(zip(("name", "datatype", "shape"), spec, strict=True)) for spec in inputs]}


def read_by_server(payload: Payload) -> dict[str, np.ndarray]:
    length = payload.headers.get(LENGTH_HEADER)
    decoded = decode(payload.body, int(length) if length else None)
    assert decoded.reply.binary == (length is not None)
    return dict(decoded.request.inputs)


@pytest.mark.parametrize("binary", [True, False])
def test_the_server_reads_bodies_of_every_datatype(binary: bool) -> None:
    datatypes = [datatype for datatype in DATATYPES if binary or datatype != "FP16"]
    specs = [(f"input {datatype}", datatype, [-1, 3]) for datatype in datatypes]
    inputs = read_by_server(build_payload(metadata(*specs), Filling(rows=2), binary=binary))
    assert {name: array.dtype for name, array in inputs.items()} == {
        f"input {datatype}": NUMPY_DTYPE[datatype] for datatype in datatypes
    }
    assert {array.shape for array in inputs.values()} == {(2, 3)}


def test_json_and_binary_bodies_of_one_seed_hold_the_same_tensors() -> None:
    model = metadata(("x", "FP32", [-1, 4]), ("text", "BYTES", [-1]), ("ids", "INT64", [-1, -1]))
    filling = Filling(rows=3, variable_size=5, max_integer=9, seed=4)
    as_json, as_binary = (read_by_server(build_payload(model, filling, binary=binary)) for binary in (False, True))
    for name, array in as_binary.items():
        np.testing.assert_array_equal(as_json[name], array)
    assert as_binary["ids"].shape == (3, 5)
    assert set(as_binary["ids"].ravel()) <= set(range(10))
    assert len(set(as_binary["ids"].ravel())) > 2


def test_equal_seeds_give_equal_bodies_and_others_do_not() -> None:
    model = metadata(("x", "FP32", [-1, 4]))
    first, again, other = (build_payload(model, Filling(seed=seed), binary=True) for seed in (1, 1, 2))
    assert first == again
    assert first.body != other.body


def test_masks_hold_ones() -> None:
    model = metadata(("attention_mask", "INT64", [-1, -1]))
    assert read_by_server(build_payload(model, Filling(rows=2), binary=True))["attention_mask"].min() == 1


@pytest.mark.parametrize(
    ("spec", "binary", "text"),
    [
        (("x", "FP32", [1, 4]), True, "use --rows 1"),
        (("x", "FP32", []), True, "use --rows 1"),
        (("x", "BF16", [-1]), True, "is BF16; known are"),
        (("x", "FP16", [-1]), False, "use --wire binary"),
    ],
)
def test_bodies_that_cannot_be_made_are_refused(spec: tuple[str, str, list[int]], binary: bool, text: str) -> None:
    with pytest.raises(PayloadError, match=text):
        build_payload(metadata(spec), Filling(rows=2), binary=binary)


def test_a_fixed_shape_is_kept() -> None:
    payload = build_payload(metadata(("x", "FP32", [1, 4])), Filling(), binary=True)
    assert read_by_server(payload)["x"].shape == (1, 4)


@pytest.mark.parametrize("binary", [True, False])
def test_answers_of_the_server_are_read(binary: bool) -> None:
    outputs = {
        "y": np.array([[1.5, np.nan]], np.float32),
        "text": np.array([b"a", b""], np.object_),
        "label": np.array([3], np.int64),
        "empty": np.empty((0, 2), np.float32),
    }
    encoded = encode(InferResponse("m", "1", "", outputs, "v", "cpu", 1, 0.0, 0.0), ReplyFormat(binary))
    length = None if encoded.json_length is None else str(encoded.json_length)
    body = b"".join(encoded.parts)
    seen = read_outputs(body, length)
    assert difference(outputs, seen, 0.0) == ""
    for damaged in (body[:-1], body + b"!", b"", b"null"):
        with pytest.raises(PayloadError, match="not an infer response"):
            read_outputs(damaged, length)


def test_byte_elements_that_end_behind_their_tensor_are_no_answer() -> None:
    output = {"name": "t", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}
    head = json.dumps({"outputs": [output]}).encode()
    with pytest.raises(PayloadError, match="ends behind its tensor"):
        read_outputs(head + b"\2\0\0\0a", str(len(head)))


@pytest.mark.parametrize(
    ("seen", "tolerance", "text"),
    [
        ({"y": np.array([10.0, 0.05])}, 0.01, ""),
        ({"y": np.array([10.0, 0.2])}, 0.01, "farther than the tolerance"),
        ({"y": np.array([10.0, np.nan])}, 9.0, "farther than the tolerance"),
        ({"y": np.array([10.0, 0.0], np.float32)}, 1.0, "another datatype or shape"),
        ({"y": np.array([[10.0, 0.0]])}, 1.0, "another datatype or shape"),
        ({"z": np.array([10.0, 0.0])}, 1.0, "outputs ['z'] instead of ['y']"),
        ({}, 1.0, "outputs [] instead"),
    ],
)
def test_differences_are_told_relative_to_the_magnitude(
    seen: dict[str, np.ndarray], tolerance: float, text: str
) -> None:
    told = difference({"y": np.array([10.0, 0.0])}, seen, tolerance)
    assert text in told
    assert bool(told) == bool(text)


def test_labels_must_be_equal_whatever_the_tolerance() -> None:
    assert difference({"y": np.array([100])}, {"y": np.array([101])}, 1.0)
    assert not difference({"y": np.array([100])}, {"y": np.array([100])}, 0.0)


def test_a_server_that_names_no_inputs_is_told_so() -> None:
    with pytest.raises(PayloadError, match="names no inputs of model 'm'"):
        build_payload({"name": "m", "inputs": []}, Filling(), binary=True)
