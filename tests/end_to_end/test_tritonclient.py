"""Triton's own Python clients, unchanged, against the server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.end_to_end.process import Server

X = np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 64)


@pytest.fixture
def sync_client(server: Server) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


@pytest.fixture
async def aio_client(server: Server) -> AsyncIterator[triton_aio.InferenceServerClient]:
    client = triton_aio.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    await client.close()


def tensor_in(array: np.ndarray = X, name: str = "x", *, binary: bool = True) -> triton.InferInput:
    kind = {"f": "FP32", "i": "INT32", "O": "BYTES"}[array.dtype.kind]
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_health_and_metadata(sync_client: triton.InferenceServerClient) -> None:
    assert sync_client.is_server_live()
    assert sync_client.is_server_ready()
    assert sync_client.is_model_ready("mlp")
    assert sync_client.is_model_ready("mlp", "1")
    assert not sync_client.is_model_ready("mlp", "9")
    assert sync_client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    metadata = sync_client.get_model_metadata("mlp")
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}]
    assert sync_client.get_model_metadata("mlp", "1") == metadata


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_all_forms_give_the_same_outputs(
    sync_client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None
) -> None:
    wanted = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = sync_client.infer("mlp", [tensor_in(binary=binary_in)], outputs=wanted, request_id="r-1")
    reference = sync_client.infer("mlp", [tensor_in()])
    np.testing.assert_allclose(result.as_numpy("y"), reference.as_numpy("y"), rtol=1e-5, atol=1e-6)
    assert result.as_numpy("y").shape == (2, 10)
    assert result.get_response()["id"] == "r-1"


def test_compressed_requests_work(sync_client: triton.InferenceServerClient) -> None:
    for algorithm in ("gzip", "deflate"):
        result = sync_client.infer(
            "mlp",
            [tensor_in()],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert result.as_numpy("y").shape == (2, 10)


@pytest.mark.parametrize("binary", [True, False])
def test_text_tensors_survive(sync_client: triton.InferenceServerClient, binary: bool) -> None:
    text = np.array([b"one", "zwei ß".encode()], object)
    result = sync_client.infer("strings", [tensor_in(text, "text", binary=binary)])
    assert result.as_numpy("same").tolist() == text.tolist()


def test_version_timeout_and_pinned_variant(sync_client: triton.InferenceServerClient) -> None:
    result = sync_client.infer(
        "mlp", [tensor_in()], model_version="1", timeout=30_000_000, parameters={"variant": "second"}
    )
    assert result.get_response()["model_version"] == "1"


def test_many_at_once(sync_client: triton.InferenceServerClient, server: Server) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8)
    rows = [np.full((1, 64), number / 100, np.float32) for number in range(64)]
    pending = [client.async_infer("mlp", [tensor_in(row)]) for row in rows]
    for row, future in zip(rows, pending, strict=True):
        alone = sync_client.infer("mlp", [tensor_in(row)]).as_numpy("y")
        np.testing.assert_allclose(future.get_result().as_numpy("y"), alone, rtol=1e-5, atol=1e-5)
    client.close()


ERRORS = [
    ("ghost", [tensor_in()], {}, "404", "Request for unknown model: 'ghost' is not found"),
    ("mlp", [tensor_in()], {"model_version": "9"}, "404", "Request for unknown model: 'mlp' version 9 is not found"),
    ("mlp", [tensor_in(X.astype(np.int32))], {}, "400", "input 'x' has datatype INT32; the model takes FP32"),
    ("mlp", [tensor_in(X[:, :60])], {}, "400", "unexpected shape for input 'x': got [2, 60]"),
    ("mlp", [tensor_in(name="z")], {}, "400", "missing input 'x'"),
    ("mlp", [tensor_in()], {"outputs": [triton.InferRequestedOutput("z")]}, "400", "unexpected inference output 'z'"),
    ("mlp", [tensor_in()], {"parameters": {"variant": "z"}}, "400", "unknown variant 'z'"),
    ("mlp", [tensor_in()], {"sequence_id": 3}, "400", "sequence"),
]


@pytest.mark.parametrize(("model", "inputs", "fields", "status", "text"), ERRORS)
def test_errors_carry_our_text(
    sync_client: triton.InferenceServerClient,
    model: str,
    inputs: list[Any],
    fields: dict[str, Any],
    status: str,
    text: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        sync_client.infer(model, inputs, **fields)
    assert caught.value.status() == status
    assert text in caught.value.message()


@pytest.mark.parametrize(("model", "inputs", "fields", "status", "text"), ERRORS)
async def test_errors_carry_our_text_in_asyncio_too(
    aio_client: triton_aio.InferenceServerClient,
    model: str,
    inputs: list[Any],
    fields: dict[str, Any],
    status: str,
    text: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        await aio_client.infer(model, inputs, **fields)
    assert caught.value.status() == status
    assert text in caught.value.message()


def test_metadata_error_carries_our_text(sync_client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'ghost' is not found"):
        sync_client.get_model_metadata("ghost")


async def test_asyncio_client(aio_client: triton_aio.InferenceServerClient) -> None:
    assert await aio_client.is_server_live()
    assert await aio_client.is_server_ready()
    assert await aio_client.is_model_ready("mlp")
    assert (await aio_client.get_server_metadata())["name"] == "slipstream"
    assert (await aio_client.get_model_metadata("mlp"))["name"] == "mlp"
    results = await asyncio.gather(
        *[aio_client.infer("mlp", [tensor_in(binary=binary)]) for binary in (True, False) for _ in range(8)]
    )
    for result in results[1:]:
        np.testing.assert_allclose(result.as_numpy("y"), results[0].as_numpy("y"), rtol=1e-5, atol=1e-6)
    as_json = await aio_client.infer(
        "mlp", [tensor_in()], outputs=[triton_aio.InferRequestedOutput("y", binary_data=False)]
    )
    np.testing.assert_allclose(as_json.as_numpy("y"), results[0].as_numpy("y"), rtol=1e-5, atol=1e-6)
