"""The same model over HTTP: ``slipstream serve`` in a process of its own, and a load generator in another."""

from pathlib import Path

import msgspec

from benchmarks.gpu.served import CLIENTS
from benchmarks.gpu.subjects import Subject
from benchmarks.servers import offer, slipstream
from benchmarks.workloads import REQUESTS, binary_request, check_answers, open_workload


class OverHttp(msgspec.Struct, frozen=True):
    """A closed loop of 64 connections with binary tensors.

    Attributes:
        requests_per_s: Throughput.
        p50_ms: Median latency.
        p99_ms: 99th percentile.
        failed: Answers with a status other than 200.
        wrong: Answers that lie nearer to another request's expected one.
        variants: Variant -> requests that it answered.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    wrong: int
    variants: dict[str, int]


def measure_http(repository: Path, subject: Subject, gpu: str, seconds: float) -> OverHttp:
    """Serve a repository and ask it.

    Args:
        repository: Holds the subject's artifact.
        subject: The model and its requests.
        gpu: The server's setting.
        seconds: How long.

    Raises:
        ServerFailed: If the server does not get ready, or the generator fails.
    """
    rows = [{name: array[i : i + 1] for name, array in subject.samples.items()} for i in range(REQUESTS)]
    workload = open_workload(repository, subject.name, rows)
    with slipstream(repository, "--gpu", gpu) as server:
        outcome = offer(server, [binary_request(workload, row) for row in rows], CLIENTS, seconds, seconds / 4)
    checked = check_answers(outcome.answers, workload.expected)
    times = sorted(outcome.latencies_ms)
    return OverHttp(
        len(times) / outcome.seconds,
        times[len(times) // 2],
        times[int(0.99 * (len(times) - 1))],
        checked.failed,
        checked.wrong,
        outcome.variants,
    )
