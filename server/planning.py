"""``slipstream plan``: how many replicas a load needs, from the latency tables of an artifact."""

import json
import math
from pathlib import Path
from typing import Any

import click
import msgspec

from server.artifact import Artifact, Variant, read_artifact
from server.capacity import Replica, Service, capacity, serve
from server.cores import usable_cores
from server.errors import SlipstreamError, StartupError

GPU_LANES = 2
"""Runs at a time on a GPU: one computes while the next one is copied."""
_SHARES = (0.25, 0.5, 0.7, 0.9, 1.0, 1.1)


class Wanted(msgspec.Struct, frozen=True):
    """What is asked of the plan; the command's help says what each means."""

    rps: float
    slo_ms: float
    rows: int
    variant: str
    cores: int
    lanes: int | None
    headroom: float
    spare: int
    overhead_ms: float


class Plan(msgspec.Struct, frozen=True):
    """How many replicas, and why.

    Attributes:
        model: NAME/VERSION.
        variant: What the figures are of.
        lanes: Runs at a time on one replica.
        most_rows: Of a batch.
        capacity_per_s: Requests per second at which one replica just keeps the objective.
        planned_per_s: What is left of it after the headroom.
        replicas: With the spare ones.
        curve: One replica at rates around its capacity.
    """

    model: str
    variant: str
    lanes: int
    most_rows: int
    capacity_per_s: float
    planned_per_s: float
    replicas: int
    curve: list[Service]


@click.command()
@click.argument("version", type=click.Path(path_type=Path))
@click.option("--rps", type=click.FloatRange(0, min_open=True), required=True, help="Requests per second at the peak.")
@click.option("--slo-ms", type=click.FloatRange(0, min_open=True), required=True, help="Limit of the p99.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Rows of a request.")
@click.option("--variant", default="", help="Plan with this one; with the one that is served first otherwise.")
@click.option("--cores", type=click.IntRange(1), help="Of a replica; those of this machine otherwise.")
@click.option("--lanes", type=click.IntRange(1), help="Runs at a time; cores / threads of the variant otherwise.")
@click.option("--headroom", type=click.FloatRange(0, 0.95), default=0.3, show_default=True, help="Share to keep free.")
@click.option("--spare", type=click.IntRange(0), default=1, show_default=True, help="Replicas that may be away.")
@click.option(
    "--overhead-ms",
    type=click.FloatRange(0),
    default=0.3,
    show_default=True,
    help="CPU time of a request around its run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(version: Path, as_json: bool, cores: int | None, **options: Any) -> None:
    """Say how many replicas serve a load within an objective, for the model in VERSION, such as models/NAME/1.

    Plays random arrivals against the latency tables that the optimizer measured, on the kind of host that it ran on:
    optimize there first. Measure one replica before you trust the product: slipstream bench. Exits with 1 when no
    number of replicas keeps the objective.
    """
    wanted = Wanted(cores=cores or usable_cores(), **options)
    try:
        answer = make_plan(read_artifact(version.resolve()), wanted)
    except SlipstreamError as exc:
        raise click.ClickException(str(exc)) from exc
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(answer), indent=1))
    else:
        click.echo(_text(answer, wanted))


def make_plan(artifact: Artifact, wanted: Wanted) -> Plan:
    """Plan a load.

    Raises:
        StartupError: If the artifact has no latency table of that variant, or if even an idle replica is too slow.
    """
    title = f"{artifact.name}/{artifact.version}"
    chosen = _chosen(artifact, wanted.variant)
    replica = replica_of(artifact, chosen, wanted).capped(wanted.slo_ms / 1e3, wanted.rows)
    highest_per_s = capacity(replica, wanted.slo_ms / 1e3, wanted.rows)
    if not highest_per_s:
        idle_ms = serve(replica, replica.most_per_s(wanted.rows) * 1e-3, wanted.rows).p99_s * 1e3
        raise StartupError(
            f"{title}, {chosen.name}: even on an idle replica, requests of {wanted.rows} rows have a p99 of "
            f"{idle_ms:.3g} ms; no number of replicas keeps {wanted.slo_ms:g} ms"
        )
    planned_per_s = highest_per_s * (1 - wanted.headroom)
    replicas = math.ceil(wanted.rps / planned_per_s) + wanted.spare
    curve = [serve(replica, share * highest_per_s, wanted.rows) for share in _SHARES]
    return Plan(title, chosen.name, replica.lanes, replica.most_rows, highest_per_s, planned_per_s, replicas, curve)


def replica_of(artifact: Artifact, variant: Variant, wanted: Wanted) -> Replica:
    """Describe one replica that serves a variant, and its variant for large batches if it has one."""
    bulk = [each for each in artifact.variants if each.from_rows and each.provider == variant.provider]
    tables = [(0, variant), *((each.from_rows, each) for each in bulk if not wanted.variant)]
    on_cpu = variant.provider == "cpu"
    threads = variant.options.intra_op_threads or wanted.cores
    batching = artifact.manifest.batching if artifact.manifest else None
    return Replica(
        tables=tuple((start, each.latency) for start, each in tables if each.latency is not None),
        lanes=wanted.lanes or (max(1, wanted.cores // threads) if on_cpu else GPU_LANES),
        most_rows=batching.max_rows if batching and batching.batchable else wanted.rows,
        cores=wanted.cores,
        overhead_s=wanted.overhead_ms / 1e3,
        shares_cores=on_cpu,
    )


def _chosen(artifact: Artifact, name: str) -> Variant:
    measured = [variant for variant in artifact.variants if variant.latency is not None]
    for variant in measured:
        if variant.name == name or not name:
            return variant
    title, known = f"{artifact.name}/{artifact.version}", ", ".join(variant.name for variant in measured)
    if not known:
        raise StartupError(f"{title} has no latency table; make one on the host that serves: slipstream optimize")
    raise StartupError(f"{title} has no variant {name!r} with a latency table; it has {known}")


def _text(plan: Plan, wanted: Wanted) -> str:
    lines = [
        f"{plan.model}, {plan.variant}: {plan.lanes} lane{'s' * (plan.lanes > 1)} on {wanted.cores} cores, "
        f"batches of up to {plan.most_rows} rows",
        "",
        f"{'of capacity':>11}  {'requests/s':>10}  {'p50 ms':>7}  {'p99 ms':>7}  {'lanes busy':>10}  {'batch':>6}",
    ]
    for share, service in zip(_SHARES, plan.curve, strict=True):
        lines.append(
            f"{share:>11.0%}  {service.rate_per_s:>10.1f}  {service.p50_s * 1e3:>7.3g}  {service.p99_s * 1e3:>7.3g}  "
            f"{service.busy:>10.0%}  {service.batch:>6.1f}"
        )
    lines += [
        "",
        f"one replica keeps a p99 of {wanted.slo_ms:g} ms up to {plan.capacity_per_s:.1f} requests/s; with "
        f"{wanted.headroom:.0%} kept free, {plan.planned_per_s:.1f}",
        f"{wanted.rps:g} requests/s need {plan.replicas} replica{'s' * (plan.replicas > 1)}, {wanted.spare} spare",
    ]
    return "\n".join(lines)
