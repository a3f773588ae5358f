"""Options of the load test, beside those of Locust."""

import argparse
from typing import Any

from loadtests.objectives import Objective
from loadtests.shapes import SHAPES, Course
from loadtests.traffic import Kind, make_kind, read_kinds

# Seconds, where -t does not say; 0: until the server is saturated.
_SECONDS = {"closed-loop": 30.0, "arrival-rate": 30.0, "steps": 0.0, "spike": 60.0, "soak": 600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    add = parser.add_argument_group("what is sent").add_argument
    add("--model", default="", help="Name of the served model")
    add("--model-version", default="", help="Its version; the server's default otherwise")
    add("--pin", default="", help="Variant that must answer; the router chooses otherwise")
    add("--wire", choices=["binary", "json"], default="binary", help="Form of the tensors, both ways")
    add("--rows", type=int, default=1, help="Rows per request")
    add("--variable-size", type=int, default=16, help="Size of other variable axes, e.g. the sequence length")
    add("--max-integer", type=int, default=1, help="Integer inputs are drawn from 0 to this")
    add("--priority", type=int, default=0, help="1 (first) to 9 (last)")
    add("--timeout-ms", type=float, default=0.0, help="Deadline of each request; it is refused when that cannot be met")
    add("--mix", default="", help="TOML file with several kinds of requests; the options above fill what it leaves out")
    add("--bodies", type=int, default=8, help="Different bodies of each kind, each built once")
    add("--seed", type=int, default=0, help="Seed of the first body")
    add("--tolerance", type=float, default=0.05, help="Allowed deviation of an answer, as a share of its magnitude")
    add = parser.add_argument_group("shape of the load").add_argument
    add("--shape", choices=["", *SHAPES], default="", help="Without it: arrival-rate with a --rate, else closed-loop")
    add("--rate", type=float, default=0.0, help="Requests per second over all users; the first one of steps")
    add("--factor", type=float, default=1.5, help="Rate of each next step, and of a spike, as a multiple")
    add("--step-seconds", type=int, default=5, help="Length of a step")
    add("--warm-up", type=int, default=2, help="Seconds at the first rate before the test, not judged")
    add = parser.add_argument_group("objective: missed, the exit code is 1").add_argument
    add("--max-p99-ms", type=float, default=0.0, help="Highest 99th percentile of good answers; 0 is no limit")
    add("--max-error-rate", type=float, default=0.0, help="Highest share of errors and wrong answers")
    add("--max-refused-share", type=float, default=0.01, help="Highest share of refusals (429, 503, 504)")
    add("--min-goodput", type=float, default=0.0, help="Good answers in time per second that the best phase must reach")
    add(
        "--slo-ms",
        type=float,
        default=0.0,
        help="An answer after this, or its --timeout-ms, is no good; else --max-p99-ms",
    )
    add("--out", default="", help="Prefix of the files of the result: .json, -phases.csv, -timeline.csv, .svg")


def course_of(options: Any) -> Course:
    """Return what the options say of the shape."""
    shape = options.shape or ("arrival-rate" if options.rate > 0 else "closed-loop")
    seconds = float(options.seconds) if options.seconds is not None else _SECONDS[shape]
    return Course(shape, seconds, options.rate, options.factor, options.step_seconds, options.warm_up)


def objective_of(options: Any) -> Objective:
    """Return the thresholds."""
    return Objective(
        options.max_p99_ms, options.max_error_rate, options.max_refused_share, options.min_goodput, options.slo_ms
    )


def kinds_of(options: Any) -> list[Kind]:
    """Return the kinds of requests.

    Raises:
        PayloadError: If they are none.
    """
    values = {
        "model": options.model,
        "version": options.model_version,
        "variant": options.pin,
        "wire": options.wire,
        "rows": options.rows,
        "variable_size": options.variable_size,
        "max_integer": options.max_integer,
        "priority": options.priority,
        "timeout_ms": options.timeout_ms,
    }
    return read_kinds(options.mix_text, values) if options.mix_text else [make_kind(values)]
