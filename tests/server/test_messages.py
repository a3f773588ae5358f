"""Requests, answers and errors arrive in the other process as they left."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from server import errors
from server.errors import QueueFull, SlipstreamError
from server.messages import ALIGNMENT, SMALL_TENSOR_BYTES, Codec, Codecs, Encoded, Failure, Inferred
from server.tensors import NUMPY_DTYPE, InferRequest, InferResponse

NUMERIC = [datatype for datatype in NUMPY_DTYPE if datatype != "BYTES"]


def bytes_of(encoded: Encoded) -> bytes:
    memory = bytearray(b"\xaa" * encoded.size_bytes)
    encoded.write(memoryview(memory))
    return bytes(memory)


def over_there(codec: Codec[Any], value: Any) -> Any:
    encoded = codec.encode(value)
    return codec.decode(bytes_of(encoded), len(encoded.head))


def assert_same(seen: dict[str, np.ndarray], sent: dict[str, np.ndarray]) -> None:
    assert list(seen) == list(sent)
    for name, array in sent.items():
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape)
        assert seen[name].ravel().tolist() == array.ravel().tolist() or seen[name].tobytes() == array.tobytes()


shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12)
numeric = st.sampled_from(NUMERIC).flatmap(lambda name: arrays.arrays(NUMPY_DTYPE[name], shapes))
texts = shapes.flatmap(lambda shape: arrays.arrays(np.dtype(object), shape, elements=st.binary(max_size=5)))
requests = st.builds(
    InferRequest,
    st.dictionaries(st.text(max_size=5), st.one_of(numeric, texts), max_size=4),
    id=st.text(max_size=8),
    outputs=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    timeout_s=st.none() | st.floats(0, 1e9),
    variant=st.text(max_size=5),
)


@given(requests)
def test_every_request_arrives_as_it_left(request: InferRequest) -> None:
    seen = over_there(Codecs().infer, request)
    assert_same(seen.inputs, request.inputs)
    for field in InferRequest.__struct_fields__:
        if field != "inputs":
            assert getattr(seen, field) == getattr(request, field)


@pytest.mark.parametrize("datatype", NUMPY_DTYPE)
@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (7, 3), (SMALL_TENSOR_BYTES, 5)])
def test_every_datatype_and_size_arrives(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(NUMPY_DTYPE[datatype])
    if datatype == "BYTES":
        array = np.array([b"\xff%d" % i for i in range(array.size)] or [b""], object)[: array.size].reshape(shape)
    assert_same(over_there(Codecs().infer, InferRequest({"t": array})).inputs, {"t": array})


def test_large_tensors_are_views_of_the_message_at_aligned_offsets() -> None:
    sent = {name: np.full(SMALL_TENSOR_BYTES + 1, value, np.int8) for value, name in enumerate("ab")}
    codec = Codecs().infer
    encoded = codec.encode(InferRequest(sent))
    assert [offset % ALIGNMENT for offset, _ in encoded.tensors] == [0, 0]
    memory = np.zeros(encoded.size_bytes, np.uint8)
    encoded.write(memoryview(memory))
    seen = codec.decode(memory, len(encoded.head))
    assert all(np.shares_memory(array, memory) for array in seen.inputs.values())
    assert_same(seen.inputs, sent)


def test_parts_of_a_batch_that_are_not_contiguous_arrive() -> None:
    array = np.arange(40_000, dtype=np.int32).reshape(200, 200)
    response = InferResponse("m", "1", "", {"y": array[:, ::2], "z": array.T[:3]}, "fp32", "cpu", 1, 0.1, 0.2)
    seen = over_there(Codecs().inferred, Inferred(response, "shared"))
    assert_same(seen.response.outputs, response.outputs)
    assert seen.how == "shared"


@given(st.binary(max_size=200), st.integers(0, 300))
def test_foreign_bytes_are_an_error_and_no_crash(message: bytes, head_bytes: int) -> None:
    with pytest.raises((ValueError, TypeError, msgspec.MsgspecError)):  # what a channel closes at
        Codecs().infer.decode(message, head_bytes)


def test_tensor_behind_the_end_of_the_message_is_an_error() -> None:
    codec = Codecs().infer
    encoded = codec.encode(InferRequest({"x": np.zeros(10_000, np.float32)}))
    with pytest.raises((ValueError, TypeError), match="too small"):
        codec.decode(bytes_of(encoded)[:-1], len(encoded.head))


def kinds_of(root: type[SlipstreamError]) -> list[type[SlipstreamError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds_of(child))]


@pytest.mark.parametrize("kind", [k for k in kinds_of(SlipstreamError) if k.__module__ == errors.__name__])
def test_every_error_arrives_with_its_class_and_text(kind: type[SlipstreamError]) -> None:
    sent = kind("some text", 2.5) if issubclass(kind, errors.Refused) else kind("some text")
    error = over_there(Codecs().failure, Failure.of(sent)).to_error()
    assert (type(error), str(error), vars(error)) == (kind, "some text", vars(sent))


def test_refusal_keeps_its_time_to_retry() -> None:
    error = over_there(Codecs().failure, Failure.of(QueueFull("full", 7.5))).to_error()
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 7.5
