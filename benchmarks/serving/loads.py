"""The loads that one started server gets."""

import time
from collections.abc import Iterator, Sequence

import msgspec

from benchmarks.cpu import idle_cpu_s, tree_memory
from benchmarks.open_loop import OpenLoad, connections_for
from benchmarks.servers import HOST, RunningServer, ServerFailed, ask, offer, offer_open
from benchmarks.serving.dialects import Dialect, with_deadline
from benchmarks.serving.material import Material
from benchmarks.serving.results import Rate, Start, offered
from benchmarks.serving.systems import System, workload_of
from benchmarks.summary import Case, Measurement
from benchmarks.workloads import check_answers

CONNECTIONS = (1, 16, 64)
POISSON_SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
BURST, BURST_SHARES = 8, (0.5, 1.5)
IDLE_S = 1.0
RECOVERY_S = 10.0
MOST_RATE = 25_000.0
"""Beyond this the generator itself takes what is left of two cores."""

_HOPELESS = 0.02
"""A server that answers less than this share of a rate in time is not offered a higher one."""


def dialects_of(system: System, material: Material) -> Sequence[Dialect]:
    """Return what a system is measured with: everything, or the last one, which is binary where it has that."""
    return system.dialects if material.every_kind else system.dialects[-1:]


def closed_loops(
    system: System, material: Material, server: RunningServer, seconds: float
) -> Iterator[tuple[Case, Measurement]]:
    """Measure a server with every number of clients and every kind of messages.

    Raises:
        ServerFailed: If it closes connections or answers nothing.
    """
    workload = workload_of(system, material)
    for dialect in dialects_of(system, material):
        requests = [dialect.request(workload, row) for row in workload.rows]
        for connections in CONNECTIONS:
            outcome = offer(server, requests, connections, seconds, warm_up_s=min(0.5, seconds / 4))
            check = check_answers(outcome.answers, workload.expected, dialect.read) if system.answers else None
            yield (
                Case(material.name, system.name, dialect.kind, connections),
                Measurement(
                    len(outcome.latencies_ms),
                    outcome.seconds,
                    outcome.server_cpu_s,
                    outcome.client_cpu_s,
                    outcome.latencies_ms,
                    check,
                    outcome.variants,
                ),
            )


def at_rest(system: System, material: Material, server: RunningServer) -> Start:
    """Read memory and idle CPU of a server that has worked."""
    time.sleep(IDLE_S / 2)
    before_s = idle_cpu_s(server.pid)
    time.sleep(IDLE_S)
    idle_cores = (idle_cpu_s(server.pid) - before_s) / IDLE_S
    memory = tree_memory(server.pid)
    return Start(material.name, system.name, server.start_s, memory.rss, memory.pss, idle_cores)


def open_loops(
    system: System, material: Material, server: RunningServer, reference: float, seconds: float
) -> Iterator[Rate]:
    """Offer rising rates, then bursts. The rest of a sweep is skipped once a server is beyond hope or does not recover.

    Args:
        system: Which.
        material: What it serves.
        server: Where.
        reference: Requests per second of share 1.
        seconds: Of each rate.

    Yields:
        Every rate, in that order; one at which the generator fails says so.
    """
    workload, dialect = workload_of(system, material), dialects_of(system, material)[-1]
    plain = [dialect.request(workload, row) for row in workload.rows]
    request = with_deadline(dialect.request, system.deadline, material.slo_ms)
    due = [request(workload, row) for row in workload.rows]
    for burst, shares in ((1, POISSON_SHARES), (BURST, BURST_SHARES)):
        skipped = ""
        for share in shares:
            rate = Rate(material.name, system.name, dialect.kind, burst, share, share * reference, material.slo_ms)
            if rate.rate > MOST_RATE:
                skipped = f"the generator sends at most {MOST_RATE:.0f}/s"
            elif not skipped and not recovers(server, plain[0], material.slo_ms):
                skipped = f"did not recover in {RECOVERY_S:g} s from the rate before"
            if skipped:
                yield msgspec.structs.replace(rate, skipped=skipped)
                continue
            try:
                seen = offered(rate, offer_open(server, open_load(rate, due, seconds)))
            except ServerFailed as exc:
                yield msgspec.structs.replace(rate, skipped=str(exc))
                continue
            if seen.in_time < _HOPELESS:
                skipped = "almost nothing was in time at a lower rate"
            yield seen


def open_load(rate: Rate, requests: list[bytes], seconds: float) -> OpenLoad:
    """Return the load of a rate."""
    connections = connections_for(rate.rate, rate.slo_ms / 1e3)
    drain_s = 2 * rate.slo_ms / 1e3
    return OpenLoad(HOST, 0, 0, rate.rate, seconds, connections, requests, rate.burst, drain_s=drain_s)


def recovers(server: RunningServer, request: bytes, slo_ms: float) -> bool:
    """Wait until a server answers a single request in time."""
    until_s = time.monotonic() + RECOVERY_S
    while (now := time.monotonic()) < until_s:
        answer = ask(server.port, request, timeout_s=until_s - now)
        if answer is not None and answer.status == 200 and time.monotonic() - now < slo_ms / 1e3:
            return True
        time.sleep(0.05)
    return False
