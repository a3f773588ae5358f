"""Load on the models of a Slipstream server; the exit code says whether the objective was met.

Each user sends its next request when the last one was answered, so refusals (429) are answers: they are counted apart
and are no failures up to --max-refused-share.
"""

import logging
import math
from array import array
from typing import Any, ClassVar

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from probe import call, ready_models, request_for

ANSWERED, REFUSED = "infer", "refused"
logger = logging.getLogger("loadtest")
# Of the answered requests, as they were measured: Locust's own statistics round to whole milliseconds.
times_ms = array("f")


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add this test's options to Locust's."""
    parser.add_argument("--model", default="", help="Model to ask; without it the first one that is ready.")
    parser.add_argument("--max-p99-ms", type=float, default=0.0, help="Fail above this; 0: no limit.")
    parser.add_argument("--max-refused-share", type=float, default=0.01, help="Fail above this share of refusals.")


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Build the request from the model's own metadata."""
    url = str(environment.host).rstrip("/")
    name = environment.parsed_options.model or ready_models(url)[0]
    Client.path = f"/v2/models/{name}/infer"
    Client.body = request_for(call(f"{url}/v2/models/{name}"))


class Client(FastHttpUser):
    """A client that always has one request under way."""

    path: ClassVar[str]
    body: ClassVar[dict[str, Any]]

    @task
    def infer(self) -> None:
        """Send one request."""
        with self.client.post(self.path, json=self.body, name=ANSWERED, catch_response=True) as answer:
            if answer.status_code == 429:
                answer.request_meta["name"] = REFUSED
                answer.success()
            elif answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text}")


@events.request.add_listener
def note(name: str, response_time: float, **_: Any) -> None:
    """Keep the time of an answer."""
    if name == ANSWERED:
        times_ms.append(response_time)


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Set the exit code."""
    options, stats = environment.parsed_options, environment.stats
    answered, refused = stats.get(ANSWERED, "POST"), stats.get(REFUSED, "POST")
    p99_ms = sorted(times_ms)[math.ceil(0.99 * len(times_ms)) - 1] if times_ms else 0.0
    share = refused.num_requests / max(1, answered.num_requests + refused.num_requests)
    faults = []
    if not answered.num_requests:
        faults.append("nothing was answered")
    if answered.num_failures:
        faults.append(f"{answered.num_failures} requests failed")
    if options.max_p99_ms and p99_ms > options.max_p99_ms:
        faults.append(f"p99 is {p99_ms:.4g} ms, allowed are {options.max_p99_ms:g}")
    if share > options.max_refused_share:
        faults.append(f"{share:.1%} were refused, allowed are {options.max_refused_share:.1%}")
    logger.info("%d answered, p99 %.4g ms, %.1f%% refused", answered.num_requests, p99_ms, 100 * share)
    for fault in faults:
        logger.error("objective missed: %s", fault)
    environment.process_exit_code = 1 if faults else 0
