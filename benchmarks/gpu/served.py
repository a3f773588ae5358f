"""The same model behind the scheduler and behind HTTP, with its device failing and its version changing under load."""

import asyncio
import contextlib
import itertools
import shutil
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec

from benchmarks.gpu.floor import median_s
from benchmarks.gpu.subjects import Subject
from server.artifact import MANIFEST, Manifest
from server.errors import InferenceFailed, SlipstreamError
from server.metrics import Metrics
from server.model import Model
from server.repository import Repository
from server.session import Opened
from server.settings import Settings
from server.tensors import InferRequest, InferResponse

CLIENTS = 64
DOWN_S, PATIENCE_S = 1.0, 30.0


class Served(msgspec.Struct, frozen=True):
    """A closed loop of 64 clients in the server's own process.

    Attributes:
        variant: What served.
        device: Where.
        rows_per_s: Throughput.
        batch_rows: The batch size that was most frequent.
        compute_ms: Median run time of such a batch while serving: assembly, run and split.
        raw_ms: Median of the bare session with that batch.
    """

    variant: str
    device: str
    rows_per_s: float
    batch_rows: int
    compute_ms: float
    raw_ms: float


class Disturbed(msgspec.Struct, frozen=True):
    """What clients noticed of a change under load.

    Attributes:
        requests: That were answered.
        failed: That were not, by error.
        noticed_s: Until the server said so itself; negative when that never happened.
        recovered_s: From the end of the trouble until the first answer from there again.
    """

    requests: int
    failed: dict[str, int]
    noticed_s: float = 0.0
    recovered_s: float = 0.0


@contextlib.asynccontextmanager
async def serving(repository: Path, gpu: str) -> AsyncIterator[Repository]:
    """Serve a repository in this process while the context is open."""
    opened = Repository(Settings(repository=repository, gpu=gpu, watch_interval_s=0.0, engines="off"), Metrics())
    try:
        await opened.open()
        yield opened
    finally:
        await opened.stop()
        await opened.drain()
        opened.close()


async def throughput(repository: Repository, subject: Subject, seconds: float) -> Served:
    """Measure the closed loop, and then the bare session at the batch size that it reached."""
    model = repository.get(subject.name)
    answers: list[InferResponse] = []
    async with _load(lambda: repository.get(subject.name), subject, answers, Counter()):
        await asyncio.sleep(seconds / 4)  # warm-up: the first batches are small
        answers.clear()
        begun_s = time.perf_counter()
        await asyncio.sleep(seconds)
        await _until(lambda: len(answers) >= CLIENTS)
        elapsed_s, seen = time.perf_counter() - begun_s, list(answers)
    rows = Counter(answer.batch_rows for answer in seen).most_common(1)[0][0]
    runs = [answer.compute_s for answer in seen if answer.batch_rows == rows]
    lane, batch = model.lanes[0], subject.batch(rows)
    raw_s = await asyncio.to_thread(median_s, lambda: lane.runner.run(batch), min(seconds, 2.0))
    return Served(
        seen[0].variant, seen[0].device, len(seen) / elapsed_s, rows, statistics.median(runs) * 1e3, raw_s * 1e3
    )


async def failover(repository: Repository, subject: Subject, seconds: float) -> Disturbed | None:
    """Let the preferred lanes fail for a second; ``None`` where there are no others."""
    model = repository.get(subject.name)
    first = model.lanes[0]
    broken = [lane for lane in model.lanes if (lane.variant, lane.device) == (first.variant, first.device)]
    if len(broken) == len(model.lanes):
        return None
    answers: list[InferResponse] = []
    failed: Counter[str] = Counter()
    noticed_s = recovered_s = -1.0
    async with _load(lambda: model, subject, answers, failed):
        await asyncio.sleep(seconds)
        with _failing([lane.runner for lane in broken]):
            begun_s = time.perf_counter()
            while time.perf_counter() < begun_s + DOWN_S:
                await asyncio.sleep(0.001)
                if noticed_s < 0 and repository.lanes_down:
                    noticed_s = time.perf_counter() - begun_s
        ended_s = time.perf_counter()
        mark = len(answers)
        if await _until(lambda: any((a.variant, a.device) == (first.variant, first.device) for a in answers[mark:])):
            recovered_s = time.perf_counter() - ended_s
    return Disturbed(len(answers), dict(failed), noticed_s, recovered_s)


async def swap(repository: Repository, folder: Path, subject: Subject, seconds: float) -> Disturbed:
    """Bring in a second version under load."""
    answers: list[InferResponse] = []
    failed: Counter[str] = Counter()
    async with _load(lambda: repository.get(subject.name), subject, answers, failed):
        await asyncio.sleep(seconds)
        await asyncio.to_thread(_next_version, folder / subject.name)
        begun_s = time.perf_counter()
        await repository.load(subject.name)
        swapped_s = time.perf_counter() - begun_s
        if not await _until(lambda: answers[-1].version == "2"):
            failed["the new version does not answer"] += 1
    return Disturbed(len(answers), dict(failed), swapped_s)


async def _until(holds: Callable[[], bool]) -> bool:
    """Wait until something holds; return whether it did within ``PATIENCE_S``."""
    until_s = time.perf_counter() + PATIENCE_S
    while not holds() and time.perf_counter() < until_s:  # noqa: ASYNC110  (nothing tells when it does)
        await asyncio.sleep(0.001)
    return holds()


@contextlib.asynccontextmanager
async def _load(
    find: Callable[[], Model], subject: Subject, answers: list[InferResponse], failed: Counter[str]
) -> AsyncIterator[None]:
    """Ask in a closed loop while the context is open."""
    count = len(next(iter(subject.samples.values())))
    rows = [{name: array[i : i + 1] for name, array in subject.samples.items()} for i in range(count)]
    stopped = asyncio.Event()

    async def client(number: int) -> None:
        for index in itertools.count(number):
            if stopped.is_set():
                return
            try:
                answers.append(await find().infer(InferRequest(rows[index % count])))
            except SlipstreamError as exc:
                failed[f"{type(exc).__name__}: {exc}"] += 1

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    try:
        yield
    finally:
        stopped.set()
        await asyncio.gather(*clients)


@contextlib.contextmanager
def _failing(runners: list[Opened]) -> Iterator[None]:
    """Let sessions fail as a lost device does, while the context is open."""

    def lost(*_: object, **__: object) -> None:
        raise InferenceFailed("CUDA failure 719: unspecified launch failure (a switch of this check)")

    shared = {id(runner): runner for runner in runners}.values()  # lanes may share a session
    for runner in shared:
        runner.run = lost  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for runner in shared:
            del runner.run


def _next_version(model: Path) -> None:
    shutil.copytree(model / "1", model / "draft")
    manifest = msgspec.json.decode((model / "draft" / MANIFEST).read_bytes(), type=Manifest)
    (model / "draft" / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, version="2")))
    (model / "draft").rename(model / "2")
