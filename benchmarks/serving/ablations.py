"""What our own ideas buy: the server beside itself without one of them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

import msgspec

from benchmarks.servers import RunningServer, free_port, offer, offer_open, running, slipstream_command
from benchmarks.serving.dialects import PROTOCOL_BINARY, PROTOCOL_JSON, Dialect, with_deadline
from benchmarks.serving.loads import open_load, recovers
from benchmarks.serving.material import Material
from benchmarks.serving.results import Ablated, Rate, offered
from benchmarks.serving.systems import SLIPSTREAM, SYSTEMS, is_right
from benchmarks.summary import percentile

OVERLOAD = 2.0
_OURS = next(system for system in SYSTEMS if system.name == SLIPSTREAM)
Figure = Callable[[RunningServer, Material, float], float]


class Ablation(msgspec.Struct, frozen=True):
    """One idea and how it is taken away.

    Attributes:
        idea: What was taken away, and what stands in its place.
        models: On which it is tried.
        name: Of the figure, with its unit.
        figure: Measures it on the server as it is.
        without: Measures it on the server without the idea; where it is the same, ``None``.
        patch: Of ``benchmarks.serving.ablated``, where there is no switch.
        options: Options of the server where there is.
        more_is_better: Whether the figure should be large.
    """

    idea: str
    models: tuple[str, ...]
    name: str
    figure: Figure
    without: Figure | None = None
    patch: str = ""
    options: tuple[str, ...] = ()
    more_is_better: bool = False


def cpu_ms(dialect: Dialect, clients: int) -> Figure:
    """Measure CPU milliseconds per request."""

    def measure(server: RunningServer, material: Material, seconds: float) -> float:
        outcome = offer(server, _requests(material, dialect), clients, seconds, seconds / 4)
        return outcome.server_cpu_s * 1e3 / len(outcome.latencies_ms)

    return measure


def rows_per_s(dialect: Dialect, clients: int) -> Figure:
    """Measure requests per second."""

    def measure(server: RunningServer, material: Material, seconds: float) -> float:
        outcome = offer(server, _requests(material, dialect), clients, seconds, seconds / 4)
        return len(outcome.latencies_ms) / outcome.seconds

    return measure


def p50_ms(dialect: Dialect, clients: int) -> Figure:
    """Measure the median latency."""

    def measure(server: RunningServer, material: Material, seconds: float) -> float:
        return percentile(offer(server, _requests(material, dialect), clients, seconds, seconds / 4).latencies_ms, 0.5)

    return measure


def goodput(way: str) -> Figure:
    """Measure answers in time per second of those due at twice the peak, as a share of the peak.

    Args:
        way: How requests tell their deadline; empty if they do not.
    """

    def measure(server: RunningServer, material: Material, seconds: float) -> float:
        requests = _requests(material, PROTOCOL_BINARY)
        closed = offer(server, requests, 64, seconds, seconds / 4)
        peak = len(closed.latencies_ms) / closed.seconds
        rate = Rate(material.name, SLIPSTREAM, "binary", 1, OVERLOAD, OVERLOAD * peak, material.slo_ms)
        request = with_deadline(PROTOCOL_BINARY.request, way, material.slo_ms)
        due = [request(material.workload, row) for row in material.workload.rows]
        recovers(server, requests[0], material.slo_ms)
        return offered(rate, offer_open(server, open_load(rate, due, seconds * material.open_scale))).goodput / peak

    return measure


ABLATIONS = (
    Ablation(
        "batching; every request runs alone",
        ("tiny",),
        "CPU ms/request, binary, 64 clients",
        cpu_ms(PROTOCOL_BINARY, 64),
        patch="batching",
    ),
    Ablation(
        "batching; every request runs alone",
        ("minilm-l6", "efficientnet-lite0"),
        "requests/s, binary, 16 clients",
        rows_per_s(PROTOCOL_BINARY, 16),
        patch="batching",
        more_is_better=True,
    ),
    Ablation(
        "no delay; idle lanes wait 5 ms for a fuller batch",
        ("tiny",),
        "p50 ms, binary, 1 client",
        p50_ms(PROTOCOL_BINARY, 1),
        options=("--max-queue-delay-s", "0.005"),
    ),
    Ablation(
        "no delay; idle lanes wait 5 ms for a fuller batch",
        ("tiny",),
        "CPU ms/request, binary, 16 clients",
        cpu_ms(PROTOCOL_BINARY, 16),
        options=("--max-queue-delay-s", "0.005"),
    ),
    Ablation(
        "deadlines and admission by prediction; order of arrival, and a queue of 1,024 rows",
        ("tiny", "minilm-l6", "efficientnet-lite0"),
        "goodput at twice the peak, of the peak",
        goodput("header"),
        without=goodput(""),
        options=("--max-queue-s", "0"),
        more_is_better=True,
    ),
    Ablation(
        "infer requests past ASGI and the router; a route of FastAPI",
        ("tiny",),
        "CPU ms/request, binary, 16 clients",
        cpu_ms(PROTOCOL_BINARY, 16),
        patch="raw-branch",
    ),
    Ablation(
        "numbers in JSON in slices, without an object each; orjson and numpy",
        ("wide",),
        "CPU ms/request, JSON, 16 clients",
        cpu_ms(PROTOCOL_JSON, 16),
        patch="json-slices",
    ),
    Ablation(
        "a lane of one thread per core; one lane with all threads",
        ("minilm-l6", "efficientnet-lite0"),
        "requests/s, binary, 16 clients",
        rows_per_s(PROTOCOL_BINARY, 16),
        patch="lanes",
        more_is_better=True,
    ),
    Ablation(
        "a lane of one thread per core; one lane with all threads",
        ("minilm-l6", "efficientnet-lite0"),
        "p50 ms, binary, 1 client",
        p50_ms(PROTOCOL_BINARY, 1),
        patch="lanes",
    ),
)


@contextlib.contextmanager
def ablated(material: Material, patch: str, options: tuple[str, ...]) -> Iterator[RunningServer]:
    """Serve the original file without one idea, or as it is if nothing is given.

    Raises:
        ServerFailed: If it does not answer, or gives a wrong answer.
    """
    port = free_port()
    command = slipstream_command(material.workload.repository, port, *options)
    if patch:
        command = [sys.executable, "-m", "benchmarks.serving.ablated", patch, *command[command.index("serve") :]]
    with running(command, port, lambda: is_right(_OURS, material.workload, PROTOCOL_JSON, port)) as server:
        yield server


def ablate(ablation: Ablation, material: Material, rounds: int, seconds: float) -> Ablated:
    """Measure both servers in every round, the order reversed in every other one.

    Raises:
        ServerFailed: If one of them does not answer.
    """
    sides: Mapping[bool, tuple[str, tuple[str, ...], Figure]] = {
        True: ("", (), ablation.figure),
        False: (ablation.patch, ablation.options, ablation.without or ablation.figure),
    }
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for side in (True, False) if number % 2 == 0 else (False, True):
            patch, options, figure = sides[side]
            with ablated(material, patch, options) as server:
                found[side].append(figure(server, material, seconds * material.closed_scale))
    return Ablated(
        ablation.idea, material.name, ablation.name, found[True], found[False], more_is_better=ablation.more_is_better
    )


def _requests(material: Material, dialect: Dialect) -> list[bytes]:
    return [dialect.request(material.workload, row) for row in material.workload.rows]
