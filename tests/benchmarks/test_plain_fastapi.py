"""The plain handler gives the session's answers, otherwise the comparison would be worth nothing."""

import httpx
import numpy as np

from benchmarks.plain_fastapi import create_app, nested
from benchmarks.workloads import Workload, save_tiny


async def test_plain_handler_answers_as_the_session_does(tmp_path) -> None:
    workload: Workload = save_tiny(tmp_path)
    transport = httpx.ASGITransport(create_app(workload.model, workload.options))
    async with httpx.AsyncClient(transport=transport, base_url="http://plain") as client:
        answer = await client.post("/predict", json={"x": workload.rows[1]["x"].tolist()})
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["y"], workload.expected[1]["y"], rtol=1e-6)
        assert (await client.post("/predict", json={"x": "no list"})).status_code == 422


def test_lists_are_as_deep_as_the_input() -> None:
    assert nested(float, 0) is float
    assert nested(float, 4) == list[list[list[list[float]]]]
