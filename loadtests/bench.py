"""``slipstream bench``: how many requests a server answers, and how fast, at a few loads."""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import click
import uvloop

from loadtests.generator import Generator, Target
from loadtests.objectives import Objective
from loadtests.payloads import PayloadError
from loadtests.report import Line, generator_line, lines_of, record, table
from loadtests.shapes import WARM_UP, Phase
from loadtests.traffic import Kind, make_kind, prepare, ready_models

URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Levels:
    """The loads to try, one after the other.

    Attributes:
        clients: Of closed loops.
        rates: Of open ones, in requests per second.
        seconds: How long each is measured.
        warm_up_s: How long it is sent before.
    """

    clients: tuple[int, ...]
    rates: tuple[float, ...]
    seconds: int
    warm_up_s: int

    def phases(self) -> list[tuple[Phase, int]]:
        """Return phases, each with its clients, an unjudged one before each to warm up."""
        loads = [(f"{n} client{'s' * (n > 1)}", 0.0, n) for n in self.clients]
        loads += [(f"{rate:g}/s", rate, 0) for rate in self.rates]
        phases, at_s = [], 0
        for name, rate, clients in loads:
            for phase, length, judged in ((WARM_UP, self.warm_up_s, False), (name, self.seconds, True)):
                if length:
                    phases.append((Phase(phase, at_s, at_s + length, rate, judged, may_refuse=not judged), clients))
                    at_s += length
        return phases


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Positive numbers, parted by commas."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind
        self.name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) <= 0:
            self.fail(f"{value!r} is no list of positive numbers such as 1,4,16", param, ctx)
        return numbers


@click.command(epilog="More shapes of load, mixes and several machines: loadtests/README.md.")
@click.argument("url", default=URL)
@click.option("--model", default="", help="Which to ask; needless where only one is served.")
@click.option("--version", default="", help="Of the model; the server's default otherwise.")
@click.option("--clients", type=_Numbers(int), help="Closed loops, each client with one request under way.  [1,4,16]")
@click.option("--rate", "rates", type=_Numbers(float), help="Open loops: requests per second at random times instead.")
@click.option("--seconds", type=click.IntRange(1), default=5, show_default=True, help="How long each load is measured.")
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Seconds before that.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Rows per request.")
@click.option("--variable-size", type=click.IntRange(1), default=16, show_default=True, help="Of other variable axes.")
@click.option("--max-integer", type=click.IntRange(0), default=1, show_default=True, help="Integers are 0 to this.")
@click.option("--wire", type=click.Choice(["binary", "json"]), default="binary", show_default=True, help="Of tensors.")
@click.option("--timeout-ms", type=float, default=0.0, help="Deadline of each request; refused when it cannot be met.")
@click.option("--slo-ms", type=float, default=0.0, help="An answer after this, or its --timeout-ms, is no good.")
@click.option("--max-p99-ms", type=float, default=0.0, help="Exit with 1 above this.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(url: str, as_json: bool, **options: Any) -> None:
    """Measure a server at URL: throughput and latency of one model, with requests made from its signature.

    Works with any server of the Open Inference Protocol. Exits with 1 when a request fails, when nothing is answered,
    or when the p99 is above --max-p99-ms; refusals (429, 503, 504) are counted apart.
    """
    clients, rates = options["clients"] or (), options["rates"] or ()
    levels = Levels(clients or (() if rates else (1, 4, 16)), rates, options["seconds"], options["warm_up"])
    objective = Objective(max_p99_ms=options["max_p99_ms"], max_refused_share=1.0, slo_ms=options["slo_ms"])
    url = url if "://" in url else f"http://{url}"
    try:
        target = Target.of(url)
        kind = _kind(url, options)
        (prepared,) = prepare(url, [kind], bodies=8, seed=0)
        generator = Generator(target, prepared, objective)
        cpu = _run(generator, levels)
    except (OSError, PayloadError) as exc:
        raise click.ClickException(str(exc)) from exc
    counted = [
        (phase, generator.recording.between(phase.start_s, phase.end_s)) for phase, _ in levels.phases() if phase.judged
    ]
    missed = objective.missed(counted) + sorted(generator.wrong)
    _print(lines_of(counted), kind, missed, cpu, as_json=as_json)
    sys.exit(1 if missed else 0)


def _kind(url: str, options: dict[str, Any]) -> Kind:
    model = options["model"]
    if not model:
        served = ready_models(url)
        if len(served) != 1:
            raise PayloadError(f"the server has {', '.join(served) or 'no model'}; name one with --model")
        (model,) = served
    names = ("version", "wire", "rows", "variable_size", "max_integer", "timeout_ms")
    return make_kind({"model": model, **{name: options[name] for name in names}})


def _run(generator: Generator, levels: Levels) -> float:
    """Send all of it; return the share of a core that the generator took."""
    phases = levels.phases()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()

    async def run() -> None:
        with click.progressbar(phases, label="bench", file=sys.stderr, item_show_func=_named) as bar:
            for phase, clients in bar:
                await generator.run(phase, clients)

    uvloop.run(run())
    return (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)


def _named(item: tuple[Phase, int] | None) -> str:
    return item[0].name if item else ""


def _print(lines: list[Line], kind: Kind, missed: list[str], cpu: float, *, as_json: bool) -> None:
    if as_json:
        figures = {"request": kind.title, "loads": [record(line) for line in lines]}
        click.echo(json.dumps({**figures, "missed": missed, "generator_cpu": round(cpu, 3)}, indent=1))
        return
    click.echo(f"{kind.title}\n\n{table(lines, 'load')}\n\n{generator_line([cpu])}")
    for text in missed:
        click.echo(f"FAILED: {text}", err=True)
