"""Load test of one served model: ``locust -f loadtests/locustfile.py --headless -u 8 -t 10s -H URL --model NAME``.

Closed loop by default: each user sends its next request when the last one was answered. With ``--rate`` the users
instead send at a given rate together, at random (Poisson) times. See README.md beside this file.
"""

import itertools
import json
import logging
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.stats import StatsEntry
from payloads import LENGTH_HEADER, Filling, Payload, PayloadError, build_payload, difference, read_outputs

logger = logging.getLogger("loadtest")

ANSWERED = "infer"
REFUSED = "infer, refused with 429"
_SETUP_TIMEOUT_S = 30.0


Outputs = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Plan:
    """What every user of this process sends, and the answers that the server gave to it once before.

    Attributes:
        path: Path of the infer endpoint.
        exchanges: Payloads with their expected outputs.
    """

    path: str
    exchanges: list[tuple[Payload, Outputs]]


def make_plan(host: str, options: Any) -> Plan:
    """Read the model's metadata, build the bodies, and record one answer to each.

    Raises:
        PayloadError: If no body can be made, or if the server answers with an error or with no infer response.
        OSError: If the server cannot be reached.
    """
    version = f"/versions/{options.model_version}" if options.model_version else ""
    model = f"/v2/models/{options.model}{version}"
    url = host.rstrip("/") + model
    metadata = json.loads(_fetch(url)[0])
    exchanges = []
    for seed in range(options.seed, options.seed + options.bodies):
        filling = Filling(options.rows, options.variable_size, options.max_integer, seed)
        payload = build_payload(metadata, filling, binary=options.wire == "binary")
        payload.headers["Accept-Encoding"] = "identity"
        if options.pin:
            payload.headers["slipstream-variant"] = options.pin
        exchanges.append((payload, read_outputs(*_fetch(f"{url}/infer", payload))))
    return Plan(f"{model}/infer", exchanges)


class _InferUser(FastHttpUser):
    abstract = True
    plan: ClassVar[Plan]

    def on_start(self) -> None:
        """Begin at a random body, so that the users do not send equal ones at the same time."""
        start = random.randrange(len(self.plan.exchanges))
        self.exchanges = itertools.cycle(self.plan.exchanges[start:] + self.plan.exchanges[:start])

    def late_s(self) -> float:
        """Seconds between the moment for which the request was planned and now."""
        return 0.0

    @task
    def infer(self) -> None:
        """Send the next body and check the answer."""
        payload, expected = next(self.exchanges)
        late_s = self.late_s()
        with self.client.post(
            self.plan.path, data=payload.body, headers=payload.headers, name=ANSWERED, catch_response=True
        ) as response:
            response.request_meta["response_time"] += late_s * 1e3
            if response.status_code == 429:
                response.request_meta["name"] = REFUSED
                response.success()
            elif response.status_code != 200:
                response.failure(f"status {response.status_code}: {(response.text or str(response.error))[:200]}")
            elif wrong := self._wrong(response, expected):
                response.failure(wrong)
            else:
                response.success()

    def _wrong(self, response: Any, expected: Outputs) -> str:
        try:
            seen = read_outputs(response.content, response.headers.get(LENGTH_HEADER))
        except PayloadError as exc:
            return str(exc)
        return difference(expected, seen, self.environment.parsed_options.tolerance)


class ClosedLoopUser(_InferUser):
    """Send the next request as soon as the last one was answered: finds the throughput at a given concurrency."""

    def wait_time(self) -> float:
        """Return 0: no think time."""
        return 0.0


class ArrivalRateUser(_InferUser):
    """Send at random times, ``--rate`` requests per second over all users, whether or not the server keeps up.

    A user waits for its answer before it sends again, so arrivals are independent of answers only while users are
    free: give at least rate x latency of them. A request that starts late, because its user was still waiting, is not
    forgotten: its response time counts from the moment for which it was planned.
    """

    def on_start(self) -> None:
        """Plan the first arrival."""
        super().on_start()
        options = self.environment.parsed_options
        self._rate_per_s = options.rate / max(options.num_users or 1, 1)
        self._planned_s = time.perf_counter()
        time.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Plan the next arrival and return the seconds until then; 0 if it is already late."""
        self._planned_s += random.expovariate(self._rate_per_s)
        return max(0.0, self._planned_s - time.perf_counter())

    def late_s(self) -> float:
        """Seconds since the planned arrival."""
        return max(0.0, time.perf_counter() - self._planned_s)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add this test's own options to Locust's command line."""
    group = parser.add_argument_group("inference")
    add = group.add_argument
    add("--model", default="", help="Name of the served model; required")
    add("--model-version", default="", help="Its version; the server's default otherwise")
    add("--pin", default="", help="Variant that must answer; the router chooses otherwise")
    add("--wire", choices=["binary", "json"], default="binary", help="Form of the tensors, both ways")
    add("--rows", type=int, default=1, help="Rows per request")
    add("--variable-size", type=int, default=16, help="Size of other variable axes, e.g. the sequence length")
    add("--max-integer", type=int, default=1, help="Integer inputs are drawn from 0 to this")
    add("--bodies", type=int, default=8, help="Different bodies, each built once")
    add("--seed", type=int, default=0, help="Seed of the first body")
    add("--rate", type=float, default=0.0, help="Requests per second over all users; 0 is a closed loop")
    add("--tolerance", type=float, default=0.05, help="Allowed deviation of an answer, as a share of its magnitude")
    add("--max-p99-ms", type=float, default=0.0, help="Fail if the 99th percentile is higher; 0 is no limit")
    add("--max-error-rate", type=float, default=0.0, help="Fail if a greater share fails; refusals (429) do not count")


@events.init.add_listener
def choose_users(environment: Environment, **_: Any) -> None:
    """Keep only the kind of user that ``--rate`` asks for."""
    wanted = ArrivalRateUser if environment.parsed_options.rate > 0 else ClosedLoopUser
    environment.user_classes[:] = [wanted]


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Build the bodies of this process; stop the test if that is impossible."""
    options = environment.parsed_options
    try:
        if not options.model:
            raise PayloadError("give the name of the served model with --model")
        if not environment.host:
            raise PayloadError("give the server's address with -H, e.g. -H http://127.0.0.1:8000")
        _InferUser.plan = make_plan(environment.host, options)
    except (OSError, PayloadError, ValueError) as exc:
        logger.error("cannot start: %s", exc)
        environment.process_exit_code = 1
        environment.runner.quit()


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Compare the result with the thresholds, print the verdict, and set the exit code."""
    if isinstance(environment.runner, WorkerRunner) or environment.process_exit_code:
        return
    options = environment.parsed_options
    answered = environment.stats.get(ANSWERED, "POST")
    refused = environment.stats.entries.get((REFUSED, "POST"))
    failures = _broken_thresholds(answered, options)
    print(
        f"\n{answered.num_requests - answered.num_failures} answered, {answered.num_failures} failed, "
        f"{refused.num_requests if refused else 0} refused with 429; {answered.total_rps:.1f} requests/s, "
        f"p50 {answered.get_response_time_percentile(0.5)} ms, p99 {answered.get_response_time_percentile(0.99)} ms"
    )
    print(f"FAILED: {'; '.join(failures)}" if failures else "PASSED: every threshold is kept")
    environment.process_exit_code = 1 if failures else 0


def _broken_thresholds(answered: StatsEntry, options: Any) -> list[str]:
    failures = []
    if answered.num_requests == answered.num_failures:
        failures.append("no request was answered")
    if answered.fail_ratio > options.max_error_rate:
        failures.append(f"error rate {answered.fail_ratio:.4f} is above --max-error-rate {options.max_error_rate}")
    p99_ms = answered.get_response_time_percentile(0.99)
    if options.max_p99_ms and p99_ms > options.max_p99_ms:
        failures.append(f"p99 {p99_ms} ms is above --max-p99-ms {options.max_p99_ms}")
    return failures


def _fetch(url: str, payload: Payload | None = None) -> tuple[bytes, str | None]:
    """Send one request before the test; return the body and the length of its JSON part."""
    request = urllib.request.Request(url, payload.body if payload else None, payload.headers if payload else {})
    try:
        with urllib.request.urlopen(request, timeout=_SETUP_TIMEOUT_S) as response:
            return response.read(), response.headers.get(LENGTH_HEADER)
    except urllib.error.HTTPError as exc:
        text = exc.read()[:300].decode("utf-8", "replace")
        raise PayloadError(f"{url} answers with {exc.code}: {text}") from exc
