"""What the server holds after the soak, compared with what it held after the warm-up. Pure.

Both times no client is connected and nothing runs, so objects that belong to a request or a connection must be as many
as before, exactly; memory may not grow with the requests.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from benchmarks.soak.counting import Counts
from benchmarks.soak.observed import Held
from benchmarks.soak.trend import Trend

# Of these packages everything counts. Tables with bounds, whose entries may become more, hold other types.
COUNTED_PACKAGES = ("server", "asyncio", "_asyncio", "uvloop", "uvicorn", "starlette", "fastapi", "anyio")
COUNTED_TYPES = ("builtins.coroutine", "builtins.async_generator", "builtins.frame", "builtins.traceback")
# The answers that a cache keeps are as many as fit into it.
KEPT_BY_CACHE = "server.tensors.InferResponse"
# A front end makes these for each model that it is asked for, which may be after the warm-up: at most so many.
PER_MODEL = (
    "server.gathering.Gathering",
    "server.remote.RemoteCounter",
    "server.remote.RemoteModel",
    "server.tensors.Signature",
    "server.tensors.TensorSpec",
)
MOST_PER_MODEL = 6

# What tables with bounds may take up anew: 10,000 names of clients of the model that gets nearly everything, two blocks
# each, and the few that the other models see.
TABLE_BLOCKS = 24_000
BLOCKS_PER_REQUEST = 0.001
# Threads of the pool for long bodies are started when they are needed; the pool's bound is this many above the cores.
POOL_THREADS = 4

# Caches of the C library's threads, and the tables, make what it has handed out vary by less than this.
LEAST_GROWN_BYTES = 256 * 1024

GROWS_BYTES = 1.0
"""Bytes per request: a slope below it is zero."""

LEAST_OBJECT_BYTES = 16.0
"""Bytes per request: where the interval reaches beyond the smallest object of Python, nothing is proven."""


class State(msgspec.Struct, frozen=True):
    """What all processes of the server hold at one time; by process."""

    counts: Mapping[int, Counts]
    held: Mapping[int, Held]


def always_held(counts: Sequence[Mapping[int, Counts]]) -> dict[int, Counts]:
    """Join counts that were made shortly after each other: what passes by is not in all of them."""
    return {pid: _least([each[pid] for each in counts if pid in each]) for pid in counts[-1]}


def _least(counts: Sequence[Counts]) -> Counts:
    numbers = {
        field: min(getattr(each, field) for each in counts) for field in Counts.__struct_fields__ if field != "objects"
    }
    objects = {name: min(each.objects.get(name, 0) for each in counts) for name in counts[-1].objects}
    return Counts(objects=objects, **numbers)


def leaks(states: Sequence[State], requests: int, cores: int, *, caches: bool) -> list[str]:
    """Say what the server holds that it should have given back.

    Args:
        states: After the warm-up, and after each of equal parts of the requests.
        requests: How many there were after the warm-up.
        cores: Of this machine; a pool of threads is bounded by them.
        caches: Whether answers are kept.
    """
    warm, end = states[0], states[-1]
    if any(set(state.counts) != set(warm.counts) for state in states):
        return [f"processes {sorted(warm.counts)} became {sorted(end.counts)}"]
    found = [(pid, text) for pid in sorted(end.counts) for text in _kept(pid, warm, end, requests, cores, caches)]
    found += [(pid, text) for pid in sorted(end.counts) for text in _allocated(pid, states, requests)]
    return [f"process {pid}: {text}" for pid, text in found]


def _kept(pid: int, warm: State, end: State, requests: int, cores: int, caches: bool) -> Iterator[str]:
    before, after = warm.counts[pid], end.counts[pid]
    for name, number in sorted(after.objects.items()):
        grown = number - before.objects.get(name, 0)
        expected = MOST_PER_MODEL if name in PER_MODEL else 0
        if grown > expected and _is_counted(name) and not (caches and name == KEPT_BY_CACHE):
            yield f"{grown} more {name}, now {number}"
    if after.open_futures > before.open_futures:
        yield f"{after.open_futures - before.open_futures} more open futures, now {after.open_futures}"
    for what, number in (
        ("busy lanes", after.busy_lanes),
        ("bytes of shared memory handed out", after.slab_bytes),
    ):
        if number:
            yield f"{number} {what}"
    grown, most = after.blocks - before.blocks, TABLE_BLOCKS + BLOCKS_PER_REQUEST * requests
    if grown > most:
        yield f"{grown} more blocks of Python's memory, {grown / requests:.3f} per request"
    grown = end.held[pid].files - warm.held[pid].files
    if grown > 0:
        yield f"{grown} more open descriptors, now {end.held[pid].files}"
    grown = end.held[pid].threads - warm.held[pid].threads
    if grown > cores + POOL_THREADS:
        yield f"{grown} more threads, now {end.held[pid].threads}"


def _allocated(pid: int, states: Sequence[State], requests: int) -> Iterator[str]:
    """Judge the typical part: onnxruntime's arena takes some megabytes in one step when it needs more than ever."""
    handed_out = [state.counts[pid].malloc_bytes for state in states]
    grown = statistics.median(after - before for before, after in pairwise(handed_out))
    per_request = grown / requests * (len(states) - 1)
    if per_request >= GROWS_BYTES and grown > LEAST_GROWN_BYTES:
        yield f"{per_request:.2f} more bytes of the C library's memory per request"


def _is_counted(name: str) -> bool:
    return name in COUNTED_TYPES or name.partition(".")[0] in COUNTED_PACKAGES


def growth(trend: Trend) -> str | None:
    """Say how memory grows; ``None`` where its slope is zero.

    Args:
        trend: Of resident bytes over requests.
    """
    if trend.slope >= GROWS_BYTES and trend.low > 0:
        return f"memory grows by {trend.slope:.2f} bytes per request"
    if trend.high >= LEAST_OBJECT_BYTES:
        return f"too few requests to tell: memory may grow by {trend.high:.1f} bytes per request"
    return None


def summary(counts: Iterable[Counts]) -> str:
    """Describe counts on one line, of all processes together."""
    every = list(counts)
    names = ("Connection", "Exchange", "InferRequest", "Pending", "Run", "Task", "Future", "Lease")
    objects = {
        name: sum(n for each in every for key, n in each.objects.items() if key.endswith(f".{name}")) for name in names
    }
    numbers = [f"{name} {number}" for name, number in objects.items()]
    numbers += [
        f"{f.replace('_', ' ')} {sum(getattr(each, f) for each in every)}" for f in Counts.__struct_fields__[1:]
    ]
    return ", ".join(numbers)
