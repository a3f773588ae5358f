"""``python -m benchmarks.unequal_lanes``: a fast lane beside a slow one, and what happens when the fast one fails.

The fast lane stands for a GPU: it sleeps a fifth of the time that the slow lane computes, and gives the same answers
(the benchmark checks every one). The slow lane is an onnxruntime session. Both are lanes of the scheduler that serves.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.artifact import LatencyTable, SessionOptions
from server.batching import BatchLimits
from server.errors import SlipstreamError
from server.metrics import Metrics, ModelMetrics
from server.providers import CPU
from server.scheduler import Completion, Cores, LaneSpec, Scheduler
from server.session import Session, measure_latency
from server.tensors import Array, InferRequest, Tensors

WIDTH, LAYERS, ROWS, SPEEDUP = 2048, 16, (1, 2, 4, 8), 5.0


class FakeGpu:
    """Answers as the session does, without its arithmetic: it looks the rows up, and sleeps."""

    def __init__(self, table: LatencyTable, answers: dict[bytes, Array]) -> None:
        self.broken = False
        self._table, self._answers = table, answers

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Sleep, then answer; raise while broken."""
        if self.broken:
            raise RuntimeError("the device is lost")
        until_s = time.perf_counter() + self._table.predict_s(len(inputs["x"]))
        outputs = {"y": np.stack([self._answers[row.tobytes()] for row in inputs["x"]])}
        time.sleep(max(0.0, until_s - time.perf_counter()))
        return outputs


class Bench:
    """The lanes and their requests."""

    def __init__(self, folder: Path) -> None:
        self.session = Session(save_model(folder / "model.onnx"), CPU, SessionOptions())
        self.slow = measure_latency(self.session, ROWS, 4.0)
        columns = [tuple(ms / SPEEDUP for ms in column) for column in (self.slow.p50_ms, self.slow.p99_ms)]
        self.fast = LatencyTable(ROWS, columns[0], columns[1], columns[0], columns[0])
        rng = np.random.default_rng(0)
        self.rows = [rng.standard_normal((1, WIDTH)).astype(np.float32) for _ in range(64)]
        self.expected = [self.session.run({"x": row})["y"] for row in self.rows]
        self.gpu = FakeGpu(self.fast, {r.tobytes(): e[0] for r, e in zip(self.rows, self.expected, strict=True)})

    def scheduler(self, *, fast: bool, slow: bool) -> tuple[Scheduler, Metrics]:
        """Start lanes."""
        metrics, probe = Metrics(), {"x": self.rows[0]}
        lanes = [LaneSpec("fp16", "cuda:0", self.gpu, self.fast, 1, probe=probe)] if fast else []
        lanes += [LaneSpec("fp32", "cpu", self.session, self.slow, 1, probe=probe)] if slow else []
        return Scheduler(
            lanes, BatchLimits(True, ROWS[-1], 4096, 0.0, 0.0), ModelMetrics(metrics, "m", "1"), Cores(2)
        ), metrics

    async def ask(self, scheduler: Scheduler, number: int) -> Completion:
        """Send one request and check its answer."""
        number %= len(self.rows)
        done = await scheduler.submit(InferRequest({"x": self.rows[number]}))
        np.testing.assert_allclose(done.outputs["y"], self.expected[number], rtol=1e-3, atol=1e-4)
        return done

    async def throughput(self, seconds: float, **lanes: bool) -> float:
        """Return requests per second of a closed loop of 64."""
        scheduler, _ = self.scheduler(**lanes)
        until_s, count = time.perf_counter() + seconds, 0

        async def client(number: int) -> None:
            nonlocal count
            while time.perf_counter() < until_s:
                await self.ask(scheduler, number)
                number += 1
                count += 1

        start_s = time.perf_counter()
        await asyncio.gather(*(client(64 * i) for i in range(64)))
        rate = count / (time.perf_counter() - start_s)
        scheduler.close()
        return rate

    async def latencies(self, rate: float, seconds: float, **lanes: bool) -> tuple[list[float], int]:
        """Return the latency of each request in an open loop, and how many the slow lane took."""
        scheduler, _ = self.scheduler(**lanes)
        times: list[float] = []
        slow = 0

        async def one(number: int) -> None:
            nonlocal slow
            start_s = time.perf_counter()
            done = await self.ask(scheduler, number)
            times.append((time.perf_counter() - start_s) * 1e3)
            slow += done.device == "cpu"

        await arrivals(one, rate, seconds)
        scheduler.close()
        return times, slow

    async def failover(self, rate: float, seconds: float) -> str:
        """Break the fast lane for a second in the middle of a run."""
        scheduler, metrics = self.scheduler(fast=True, slow=True)
        labels = {"model": "m", "version": "1", "variant": "fp16", "device": "cuda:0"}
        lost = answered = 0
        seen: dict[str, float] = {}

        async def one(number: int) -> None:
            nonlocal lost, answered
            try:
                await self.ask(scheduler, number)
                answered += 1
            except SlipstreamError:
                lost += 1

        async def trouble() -> None:
            await asyncio.sleep(seconds / 3)
            self.gpu.broken, broken_s = True, time.perf_counter()
            await until(lambda: metrics.registry.get_sample_value("slipstream_lane_up", labels) == 0)
            seen["down"] = time.perf_counter() - broken_s
            await asyncio.sleep(max(0.0, 1.0 - seen["down"]))
            self.gpu.broken, mended_s = False, time.perf_counter()
            await until(lambda: metrics.registry.get_sample_value("slipstream_lane_up", labels) == 1)
            seen["up"] = time.perf_counter() - mended_s

        await asyncio.gather(arrivals(one, rate, seconds), trouble())
        scheduler.close()
        down_ms, up_ms = seen["down"] * 1e3, seen["up"] * 1e3
        return (
            f"{answered} requests answered, {lost} lost; "
            f"the lane was reported down after {down_ms:.0f} ms and up again {up_ms:.0f} ms after it was mended"
        )


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    while not holds():  # noqa: ASYNC110  (a metric has no event)
        await asyncio.sleep(0.001)


async def arrivals(one: Callable[[int], "asyncio.Future[None]"], rate: float, seconds: float) -> None:
    """Start ``one`` at Poisson times and wait for all."""
    chance, tasks, at_s = random.Random(0), [], time.perf_counter()
    until_s = at_s + seconds
    while at_s < until_s:
        at_s += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(len(tasks))))
    await asyncio.gather(*tasks)


def save_model(path: Path) -> Path:
    """Write a dense net that takes a few milliseconds."""
    rng = np.random.default_rng(1)
    nodes, weights, name = [], [], "x"
    for layer in range(LAYERS):
        weight = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], ["y" if layer == LAYERS - 1 else f"r{layer}"]))
        name = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


async def measure(seconds: float) -> None:
    """Run all parts and print."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        first, last = bench.slow.p50_ms[0], bench.slow.p50_ms[-1]
        print(f"slow lane: {first:.2f} ms for 1 row, {last:.2f} ms for {ROWS[-1]}; fast: a {SPEEDUP:g}th of it")
        shares, rates = [], []
        for _ in range(3):
            slow = await bench.throughput(seconds, fast=False, slow=True)
            fast = await bench.throughput(seconds, fast=True, slow=False)
            both = await bench.throughput(seconds, fast=True, slow=True)
            rates.append(fast)
            shares.append(both / (slow + fast))
            print(f"closed loop: slow {slow:.0f}/s, fast {fast:.0f}/s, both {both:.0f}/s = {shares[-1]:.3f} of the sum")
        for load in (0.5, 0.9):
            alone, _ = await bench.latencies(load * min(rates), seconds, fast=True, slow=False)
            beside, slow_count = await bench.latencies(load * min(rates), seconds, fast=True, slow=True)
            for name, share in (("p50", 50), ("p99", 99), ("max", 100)):
                seen = (
                    f"{np.percentile(alone, share):.2f} ms alone, {np.percentile(beside, share):.2f} ms beside the slow"
                )
                print(f"open loop at {load:g} of the fast lane: {name} {seen}")
            print(f"  the slow lane took {slow_count} of {len(beside)}")
        print(f"failure: {await bench.failover(0.5 * min(rates), max(6.0, seconds))}")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unequal_lanes", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of every part (default: %(default)s)")
    asyncio.run(measure(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
