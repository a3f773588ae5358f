"""What a model notices while the versions of another one are swapped: its latency under steady load, before and during.

::

    python -m benchmarks.swapping [--seconds 10] [--rounds 5] [--rate 100]

Windows without and with swaps alternate. In the latter, versions of the other model are put into the repository and
loaded back to back: opened, checked, warmed up, swapped in; the ones before are drained and closed. Requests to the
steady model come at times of a Poisson process, whatever the server does; latency counts from those times. A slow
stream of requests to the swapped model only looks for failures.
"""

import argparse
import asyncio
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cpu import cpu_model
from benchmarks.servers import HOST, RunningServer, slipstream
from loadtests.connection import header_of
from server.cores import usable_cores

CONNECTIONS = 16
BAR = 1.2
_PROBE_RATE = 5.0


class Window(msgspec.Struct):
    """What was seen in one stretch of time.

    Attributes:
        latencies_ms: Of the steady model's requests.
        failed: Answers other than 200, of both models.
        load_s: Seconds of each load call.
    """

    latencies_ms: list[float] = []
    failed: int = 0
    load_s: list[float] = []


def save_dense(path: Path, width: int, depth: int, seed: int) -> None:
    """Write a plain model of ``depth`` square layers: x FP32 [batch, width] -> y FP32 [batch, width]."""
    rng = np.random.default_rng(seed)
    weights = [
        numpy_helper.from_array((rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32), f"w{index}")
        for index in range(depth)
    ]
    names = ["x", *(f"h{index}" for index in range(1, depth)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(depth)]
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "dense", described[:1], described[1:], weights)
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def request_of(path: str, body: bytes, headers: str = "") -> bytes:
    """Return a complete POST request."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def infer_request(name: str, width: int) -> bytes:
    """Return an infer request of one row with binary tensors."""
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "parameters": {"binary_data_size": width * 4}}
    head = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    row = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    return request_of(
        f"/v2/models/{name}/infer", head + row.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n"
    )


class Clients:
    """A pool of connections, used in turn; each carries one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def connect(self, count: int) -> None:
        for _ in range(count):
            self._free.put_nowait(await asyncio.open_connection(HOST, self._port))

    async def post(self, request: bytes) -> int:
        """Send a request and return the status of its answer."""
        reader, writer = await self._free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(header_of(head, b"content-length") or b"0"))
        self._free.put_nowait((reader, writer))
        return int(head.split(b" ", 2)[1])


async def offer(clients: Clients, request: bytes, rate: float, end_s: float, window: Window, *, timed: bool) -> None:
    """Send requests at the times of a Poisson process until ``end_s``, and wait for all answers."""
    dice, pending = random.Random(0), set[asyncio.Task[None]]()

    async def one(due_s: float) -> None:
        status = await clients.post(request)
        window.failed += status != 200
        if timed:
            window.latencies_ms.append((time.perf_counter() - due_s) * 1e3)

    due_s = time.perf_counter()
    while (due_s := due_s + dice.expovariate(rate)) < end_s:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        task = asyncio.create_task(one(due_s))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)


async def swap(clients: Clients, versions: list[Path], target: Path, end_s: float, window: Window) -> None:
    """Move versions into the repository and load them, one after the other."""
    while time.perf_counter() < end_s and versions:
        version = versions.pop(0)
        version.rename(target / version.name)
        started_s = time.perf_counter()
        window.failed += await clients.post(request_of("/v2/repository/models/swapped/load", b"{}")) != 200
        window.load_s.append(time.perf_counter() - started_s)
        await asyncio.sleep(0.5)


async def measure(
    server: RunningServer, arguments: argparse.Namespace, versions: list[Path], target: Path
) -> tuple[list[Window], list[Window]]:
    """Alternate windows without and with swaps."""
    clients = Clients(server.port)
    await clients.connect(CONNECTIONS)
    steady, probe = infer_request("steady", arguments.width), infer_request("swapped", arguments.swapped_width)
    quiet, busy = list[Window](), list[Window]()
    for number in range(2 * arguments.rounds + 1):
        window, is_busy = Window([], 0, []), number and number % 2 == 0
        end_s = time.perf_counter() + arguments.seconds
        work = [
            offer(clients, steady, arguments.rate, end_s, window, timed=True),
            offer(clients, probe, _PROBE_RATE, end_s, window, timed=False),
        ]
        if is_busy:
            work.append(swap(clients, versions, target, end_s, window))
        await asyncio.gather(*work)
        await asyncio.sleep(6.0 if is_busy else 0.0)  # the last version drains and closes
        if number:  # the first one warms up
            (busy if is_busy else quiet).append(window)
    return quiet, busy


def report(quiet: list[Window], busy: list[Window]) -> bool:
    """Print the figures; return whether the bar is met."""
    rows = {}
    for name, windows in (("steady", quiet), ("swapping", busy)):
        times = np.array([ms for window in windows for ms in window.latencies_ms])
        p99s = ", ".join(f"{np.percentile(window.latencies_ms, 99):.2f}" for window in windows)
        rows[name] = np.percentile(times, 99)
        print(
            f"{name:<9} {len(times):>6} requests  p50 {np.median(times):6.2f} ms  p99 {rows[name]:6.2f} ms"
            f"  max {times.max():7.2f} ms  p99 of the windows: {p99s}"
        )
    loads = [seconds for window in busy for seconds in window.load_s]
    failed = sum(window.failed for window in (*quiet, *busy))
    ratio = rows["swapping"] / rows["steady"]
    print(f"{len(loads)} swaps, median {statistics.median(loads):.2f} s each; {failed} requests failed")
    print(f"p99 while swapping / steady: {ratio:.2f} (bar: {BAR})")
    return bool(ratio <= BAR) and failed == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swapping", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the steady model (default: %(default)s)")
    parser.add_argument("--swapped-width", type=int, default=1024, help="of the other one (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=40, help="layers of the other one (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{cpu_model()}, {usable_cores()} cores, Python {platform.python_version()}, onnxruntime "
          f"{onnxruntime.__version__}, load average {os.getloadavg()[0]:.2f}; {vars(arguments)}")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        root, waiting = Path(temporary) / "models", Path(temporary) / "waiting"
        save_dense(root / "steady/1/model.onnx", arguments.width, 8, seed=0)
        save_dense(root / "swapped/1/model.onnx", arguments.swapped_width, arguments.depth, seed=1)
        count = 1 + int(arguments.rounds * arguments.seconds / 1.5)
        for version in range(2, count + 2):
            (waiting / str(version)).mkdir(parents=True)
            shutil.copyfile(root / "swapped/1/model.onnx", waiting / str(version) / "model.onnx")
        versions = [waiting / str(version) for version in range(2, count + 2)]
        with slipstream(root) as server:
            quiet, busy = asyncio.run(measure(server, arguments, versions, root / "swapped"))
    return 0 if report(quiet, busy) else 1


if __name__ == "__main__":
    sys.exit(main())
