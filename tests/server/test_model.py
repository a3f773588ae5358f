import asyncio
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from server.artifact import read_artifact
from server.errors import Draining, InferenceFailed, ModelNotReady, SignatureMismatch, UnknownVariant
from server.metrics import Metrics
from server.model import Model
from server.providers import CPU
from server.scheduler import Cores
from server.settings import Settings
from server.tensors import InferRequest, InferResponse
from tests import models
from tests.artifacts import edit_manifest, random_inputs, write_artifact, write_plain


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def start(metrics: Metrics):
    """Load and start a model from its folder; it is closed after the test."""
    started: list[Model] = []

    def load_and_start(folder: Path, **settings: object) -> Model:
        model = Model.load(read_artifact(folder), (CPU,), Settings(cpu_instances=1, **settings), metrics)
        model.start(Cores(2))
        started.append(model)
        return model

    yield load_and_start
    for model in started:
        model.close()


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    return write_artifact(tmp_path, "mlp", "7", {"int8": mlp, "fp32": mlp})


def ready_gauge(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("slipstream_model_ready", {"model": "mlp", "version": "7"})


async def test_answers_with_its_account(folder: Path, start):
    model = start(folder)
    inputs = random_inputs(model.signature, rows=3)
    response = await model.infer(InferRequest(inputs, id="abc"))
    assert isinstance(response, InferResponse)
    assert (response.model, response.version, response.id) == ("mlp", "7", "abc")
    assert (response.variant, response.device, response.batch_rows) == ("int8", "cpu", 3)
    assert response.queue_s >= 0
    assert response.compute_s > 0
    assert response.outputs["y"].shape == (3, 10)


async def test_facts(folder: Path, start, metrics: Metrics):
    model = start(folder)
    assert (model.name, model.version, model.state, model.unoptimized) == ("mlp", "7", "ready", False)
    assert model.variants == ("int8", "fp32")
    assert model.refused == {}
    assert ready_gauge(metrics) == 1.0
    assert model.metadata() == {
        "variants": ["int8", "fp32"],
        "refused": {},
        "lanes": [
            {"variant": "int8", "device": "cpu", "instances": 1, "threads": 1},
            {"variant": "fp32", "device": "cpu", "instances": 1, "threads": 1},
        ],
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
    }


async def test_refused_variant_is_told_and_counted(folder: Path, start, metrics: Metrics):
    int8, fp32 = read_artifact(folder).variants
    edit_manifest(folder, variants=(replace(int8, host_bound=True, host="another"), fp32))
    model = start(folder)
    assert model.variants == ("fp32",)
    assert "built for hosts of kind another, this is one of" in model.metadata()["refused"]["int8"]
    served = {
        variant: metrics.registry.get_sample_value(
            "slipstream_variant_served", {"model": "mlp", "version": "7", "variant": variant}
        )
        for variant in ("int8", "fp32")
    }
    assert served == {"int8": 0.0, "fp32": 1.0}


async def test_requests_that_arrive_together_share_a_batch_and_get_their_own_rows(folder: Path, start):
    model = start(folder)
    requests = [random_inputs(model.signature, rows=rows, seed=rows) for rows in (1, 2, 3)]
    alone = [(await model.infer(InferRequest(inputs))).outputs["y"] for inputs in requests]
    together = await asyncio.gather(*(model.infer(InferRequest(inputs)) for inputs in requests))
    assert [response.batch_rows for response in together] == [6, 6, 6]
    for response, expected in zip(together, alone, strict=True):
        # Kernels for other sizes add in another order.
        np.testing.assert_allclose(response.outputs["y"], expected, rtol=1e-5, atol=1e-5)


async def test_plain_model_without_common_batch_axis_is_run_one_by_one(tmp_path: Path, start):
    model = start(write_plain(tmp_path, "m", "1", models.save_batch_on_axis_1(tmp_path / "m.onnx")))
    assert model.unoptimized
    inputs = random_inputs(model.signature, rows=2)
    together = await asyncio.gather(*(model.infer(InferRequest(inputs)) for _ in range(3)))
    assert [response.outputs["state"].shape for response in together] == [(2, 2, 4)] * 3


async def test_model_that_was_not_proven_batchable_is_run_one_by_one(tmp_path: Path, start):
    mixing = models.save_batch_mixing(tmp_path / "mixing.onnx")
    model = start(write_artifact(tmp_path / "models", "m", "1", {"fp32": mixing}, batchable=False))
    x = np.array([[1, 2, 3, 4]], np.float32)
    together = await asyncio.gather(*(model.infer(InferRequest({"x": x * scale})) for scale in (1, 2, 3)))
    assert [response.outputs["y"].tolist() for response in together] == [[[0.0] * 4]] * 3


async def test_pinned_variant_answers(folder: Path, start):
    model = start(folder)
    response = await model.infer(InferRequest(random_inputs(model.signature), variant="fp32"))
    assert response.variant == "fp32"
    with pytest.raises(UnknownVariant, match=r"'fp8'.*int8, fp32"):
        await model.infer(InferRequest(random_inputs(model.signature), variant="fp8"))


async def test_only_wanted_outputs_are_kept(tmp_path: Path, start):
    model = start(write_plain(tmp_path, "two", "1", models.save_two_inputs(tmp_path / "two.onnx")))
    inputs = random_inputs(model.signature)
    both, one, swapped = await asyncio.gather(
        model.infer(InferRequest(inputs)),
        model.infer(InferRequest(inputs, outputs=("diff",))),
        model.infer(InferRequest(inputs, outputs=("diff", "sum"))),
    )
    assert [list(response.outputs) for response in (both, one, swapped)] == [["sum", "diff"], ["diff"], ["diff", "sum"]]
    np.testing.assert_array_equal(one.outputs["diff"], inputs["a"] - inputs["b"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({}, (), "missing input 'x'"),
        ({"x": np.zeros((1, 63), np.float32)}, (), r"got \[1, 63\]"),
        ({"x": np.zeros((1, 64))}, (), "datatype FP64"),
        ({"x": np.zeros((1, 64), np.float32)}, ("z",), "output 'z'"),
    ],
)
async def test_what_does_not_fit_the_signature_is_refused(folder: Path, start, inputs, outputs, message):
    with pytest.raises(SignatureMismatch, match=message):
        await start(folder).infer(InferRequest(inputs, outputs=outputs))


async def test_text_that_is_not_utf8_is_refused_alone(tmp_path: Path, start):
    model = start(write_plain(tmp_path, "text", "1", models.save_strings(tmp_path / "text.onnx")))
    good, bad = await asyncio.gather(
        model.infer(InferRequest({"text": np.array([b"good"], object)})),
        model.infer(InferRequest({"text": np.array([b"\xff"], object)})),
        return_exceptions=True,
    )
    assert good.outputs["same"].tolist() == [b"good"]
    assert isinstance(bad, SignatureMismatch)


async def test_failing_run_fails_its_request_and_not_the_model(tmp_path: Path, start):
    model = start(write_plain(tmp_path, "m", "1", models.save_sequence(tmp_path / "m.onnx")))
    ones = np.ones((1, 2), np.int64)
    with pytest.raises(InferenceFailed):
        await model.infer(InferRequest({"ids": ones * 1000, "mask": ones}))
    assert (await model.infer(InferRequest({"ids": ones, "mask": ones}))).outputs["vector"].shape == (1, 8)


async def test_not_ready_before_start(folder: Path, metrics: Metrics):
    model = Model.load(read_artifact(folder), (CPU,), Settings(), metrics)
    assert (model.state, model.ready) == ("loading", False)
    with pytest.raises(ModelNotReady, match="model 'mlp' version 7 is loading"):
        await model.infer(InferRequest(random_inputs(model.signature)))
    model.close()


async def test_drain_finishes_what_waits_and_refuses_what_comes(folder: Path, start, metrics: Metrics):
    model = start(folder)
    request = InferRequest(random_inputs(model.signature))
    waiting = [asyncio.ensure_future(model.infer(request)) for _ in range(10)]
    await asyncio.sleep(0)  # lets them be admitted
    assert await model.drain(10.0)
    assert [task.done() for task in waiting] == [True] * 10
    assert {task.result().outputs["y"].shape for task in waiting} == {(4, 10)}
    assert (model.state, model.ready, ready_gauge(metrics)) == ("draining", False, 0.0)
    with pytest.raises(Draining):
        await model.infer(request)


async def test_closed_model_refuses(folder: Path, start):
    model = start(folder)
    model.close()
    with pytest.raises(Draining):
        await model.infer(InferRequest(random_inputs(model.signature)))
