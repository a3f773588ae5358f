"""Load test of served models: ``locust -f loadtests/locustfile.py --headless -u 8 -t 10s -H URL --model NAME``.

Closed loop by default: each user sends its next request when the last one was answered. The other shapes send at given
rates, at random (Poisson) times, whether or not the server keeps up. See README.md beside this file.
"""

import itertools
import logging
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gevent
from gevent import GreenletExit
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.rpc import Message
from locust.runners import STATE_CLEANUP, STATE_STOPPED, STATE_STOPPING, MasterRunner, Runner, WorkerRunner

from loadtests.options import add_arguments, course_of, kinds_of, objective_of
from loadtests.payloads import LENGTH_HEADER, PayloadError, difference, read_outputs
from loadtests.plots import draw
from loadtests.report import save, summary
from loadtests.running import LoadTest
from loadtests.shapes import WARM_UP, ShapeError, is_saturated, phases_of, users_for
from loadtests.tallies import FAILED, OK, UNANSWERED, outcome_of
from loadtests.traffic import Exchange, Outputs, prepare

logger = logging.getLogger("loadtest")

DRAIN_S = 10.0
"""How long the last answers are waited for."""
_END, _LAST = "load-test-end", "load-test-last"
"""Messages of the master, with the second at which it ends, and of a worker, with what it counted last."""
_WATCH_S = 0.2
# Workers report every three seconds.
_LAG_S = {True: 4.0, False: 0.5}
_OVER = (STATE_STOPPING, STATE_STOPPED, STATE_CLEANUP)


class Client(FastHttpUser):
    """One request under way at a time.

    A user that is free takes the next request that is due. Arrivals are independent of answers only while users are
    free: there must be at least rate x latency of them. A request that starts late, because all users were waiting, is
    not forgotten: its time counts from when it was due.
    """

    test: ClassVar[LoadTest]

    def on_start(self) -> None:
        """Begin at a random body, so that users do not send equal ones at the same time, and with a first arrival."""
        test = self.test
        self._bodies = [itertools.cycle(random.sample(each.exchanges, len(each.exchanges))) for each in test.prepared]
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Plan the next request and return the seconds until then; 0 if it is already late, or the test is over."""
        test = self.test
        self._due_s = test.next_due_s() if test.paced else test.elapsed_s()
        return 0.0 if self._due_s >= test.over_s else max(0.0, self._due_s - test.elapsed_s())

    @task
    def infer(self) -> None:
        """Send the next body and check the answer.

        Raises:
            StopUser: If the test is over before it is due.
        """
        test = self.test
        if self._due_s >= test.over_s:
            raise StopUser
        number = test.draw_kind()
        prepared, exchange = test.prepared[number], next(self._bodies[number])
        try:
            with self.client.post(
                f"{prepared.kind.path}/infer",
                data=exchange.payload.body,
                headers=exchange.payload.headers,
                name=prepared.kind.title,
                catch_response=True,
            ) as response:
                latency_ms = (test.elapsed_s() - self._due_s) * 1e3
                response.request_meta["response_time"] = latency_ms
                outcome = outcome_of(response.status_code)
                if outcome == OK and (wrong := self._wrong(response, exchange)):
                    outcome = FAILED
                    response.failure(wrong)
                elif outcome == FAILED:
                    text = response.text or str(response.error)
                    response.failure(f"status {response.status_code}: {text[:200]}")
                else:
                    if outcome != OK:
                        response.request_meta["name"] = f"{prepared.kind.title}: {outcome}"
                    response.success()
                self._count(number, outcome, latency_ms, response.headers)
        except GreenletExit:
            if test.is_drained:
                self._count(number, UNANSWERED, 0.0)
            raise

    def _wrong(self, response: Any, exchange: Exchange) -> str:
        try:
            seen: Outputs = read_outputs(response.content, response.headers.get(LENGTH_HEADER))
        except PayloadError as exc:
            return str(exc)
        return difference(exchange.expected, seen, self.environment.parsed_options.tolerance)

    def _count(self, number: int, outcome: str, latency_ms: float, headers: Any = None) -> None:
        tally = self.test.recording.at(self._due_s, number)
        timeout_ms = self.test.prepared[number].kind.timeout_ms
        tally.add(outcome, latency_ms, in_time=self.test.objective.is_in_time(latency_ms, timeout_ms))
        if outcome == OK and headers is not None:
            tally.queue_ms += float(headers.get("slipstream-queue-ms") or 0.0)
            tally.compute_ms += float(headers.get("slipstream-compute-ms") or 0.0)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add this test's own options to Locust's command line."""
    add_arguments(parser)


@events.init.add_listener
def plan(environment: Environment, runner: Runner, **_: Any) -> None:
    """Fill in what the shape decides: length, number of users. Workers are told by the master."""
    if isinstance(runner, WorkerRunner):
        runner.register_message(_END, lambda msg, **_: Client.test.end(msg.data))
        return
    if isinstance(runner, MasterRunner):
        runner.register_message(_LAST, collect_last)
    options = environment.parsed_options
    options.seconds = options.run_time
    try:
        options.mix_text = Path(options.mix).read_text() if options.mix else ""
        phases, kinds = phases_of(course_of(options)), kinds_of(options)
        if options.headless:
            prepare(host_of(environment), kinds, 1, options.seed)
    except (OSError, ShapeError, PayloadError) as exc:
        logger.error("cannot start: %s", exc)
        sys.exit(2)
    if options.num_users is None and phases[0].rate_per_s:
        patience_s = objective_of(options).deadline_ms / 1e3
        options.num_users = users_for(phases, min(2 * patience_s, DRAIN_S))
    if options.spawn_rate is None:
        options.spawn_rate = options.num_users
    # ``conduct`` ends the test; this only in case that it cannot.
    options.run_time = round(phases[-1].end_s + 3 * DRAIN_S)
    options.load_processes = 1


def host_of(environment: Environment) -> str:
    """Return the server's address.

    Raises:
        PayloadError: If there is none.
    """
    if not environment.host:
        raise PayloadError("give the server's address with -H, e.g. -H http://127.0.0.1:8000")
    return str(environment.host)


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Build the bodies of this process; stop the test if that is impossible."""
    options, runner = environment.parsed_options, environment.runner
    try:
        prepared = prepare(host_of(environment), kinds_of(options), options.bodies, options.seed)
        if isinstance(runner, MasterRunner):
            options.load_processes = runner.worker_count  # the workers learn it from their orders, which come later
        test = LoadTest(course_of(options), objective_of(options), prepared, options.load_processes)
    except (ShapeError, PayloadError) as exc:
        logger.error("cannot start: %s", exc)
        environment.process_exit_code = 1
        runner.quit()
        return
    Client.test = test
    gevent.spawn(attend if isinstance(runner, WorkerRunner) else conduct, environment, test)


def conduct(environment: Environment, test: LoadTest) -> None:
    """Tell of each phase when it is over; end the test after the last one, or when steps have reached saturation."""
    runner = environment.runner
    is_master = isinstance(runner, MasterRunner)
    told, steps = 0, []
    while runner.state not in _OVER and test.elapsed_s() < test.over_s:
        gevent.sleep(_WATCH_S)
        phase = test.phases[told]
        if test.elapsed_s() < phase.end_s + _LAG_S[is_master]:
            continue
        told += 1
        tally = test.recording.between(phase.start_s, phase.end_s)
        logger.info("%s: %.1f good/s, p99 %.4g ms", phase.name, tally.good / phase.seconds, tally.percentile_ms(0.99))
        if test.course.shape == "steps" and phase.name != WARM_UP:
            if is_saturated(tally, steps):
                test.end(test.elapsed_s())
            steps.append(tally)
    if runner.state in _OVER:
        return
    if is_master:
        runner.send_message(_END, test.over_s)
        wait_until(lambda: len(test.ended) >= runner.worker_count, 2 * DRAIN_S)
    else:
        drain(runner, test)
    if environment.parsed_options.headless:
        runner.quit()
    elif is_master:
        runner.stop()


def attend(environment: Environment, test: LoadTest) -> None:
    """Wait for the end of the test in a worker, then report what came last."""
    while test.elapsed_s() < test.over_s:
        gevent.sleep(_WATCH_S)
    drain(environment.runner, test)
    environment.runner.send_message(_LAST, counted_by(test))


def drain(runner: Runner, test: LoadTest) -> None:
    """Wait for the last answers, and stop the users that have none."""
    wait_until(lambda: runner.user_count == 0, DRAIN_S)
    test.is_drained = True
    runner.stop()
    test.count_unsent()


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for something, but no longer than so many seconds."""
    until_s = time.monotonic() + seconds
    while not holds() and time.monotonic() < until_s:
        gevent.sleep(_WATCH_S)


@events.test_stopping.add_listener
def end(**_: Any) -> None:
    """Keep when no more requests were sent, whoever stops the test."""
    if hasattr(Client, "test"):
        Client.test.end(Client.test.elapsed_s())


def counted_by(test: LoadTest) -> dict[str, Any]:
    """Return what a worker counted since its last report."""
    return {"rows": test.recording.take(), "cpu": test.cpu_share()}


@events.report_to_master.add_listener
def report(data: dict[str, Any], **_: Any) -> None:
    """Give the master what this worker counted."""
    if hasattr(Client, "test"):
        data["inference"] = counted_by(Client.test)


@events.worker_report.add_listener
def collect(client_id: str, data: dict[str, Any], **_: Any) -> None:
    """Add what a worker counted."""
    if hasattr(Client, "test") and "inference" in data:
        Client.test.add(client_id, data["inference"]["rows"], data["inference"]["cpu"])


def collect_last(msg: Message, **_: Any) -> None:
    """Add what a worker counted last."""
    Client.test.add(msg.node_id, msg.data["rows"], msg.data["cpu"])
    Client.test.ended.add(msg.node_id)


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Compare the result with the thresholds, print and keep it, and set the exit code."""
    if isinstance(environment.runner, WorkerRunner) or environment.process_exit_code:
        return
    if not hasattr(Client, "test"):
        environment.process_exit_code = 1
        return
    options, test = environment.parsed_options, Client.test
    result = test.result()
    print(f"\n{summary(result)}")
    if options.out:
        save(result, Path(options.out))
        deadline_ms = test.objective.deadline_ms
        draw(result, by_rate=test.course.shape == "steps", deadline_ms=deadline_ms, path=Path(f"{options.out}.svg"))
    environment.process_exit_code = 1 if result.missed else 0
