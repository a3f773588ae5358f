"""The commands ``optimize``, ``inspect`` and ``verify``."""

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from optimizers import pipeline
from optimizers.errors import OptimizerError
from optimizers.fidelity import describe, describe_accuracy
from optimizers.recipe import DECISIONS, Compression, Objective, Precision, Recipe, Target, read_recipe
from optimizers.report import ORIGINAL, REPORT_HTML, REPORT_JSON, UNTOUCHED, CandidateRecord, Report, read_report
from optimizers.request import OptimizeRequest
from server.artifact import Artifact, Fidelity, Variant, read_artifact, read_golden
from server.errors import SlipstreamError, StartupError
from server.golden import require_golden
from server.host import read_host
from server.providers import Device, check_environment, usable_devices
from server.staged import open_variant

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DECIDING_ROWS = (1, 8)
_TABLE_COLUMNS = 120  # more than any table has: a number that is cut says nothing


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one line on stderr and exit code 1; ``--debug`` shows the traceback."""

    @wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        try:
            check_environment()
            command(*args, **options)
        except (OptimizerError, SlipstreamError) as exc:
            if debug:
                raise
            raise click.ClickException(str(exc)) from exc

    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(run)


def _listed(_context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    known = get_args({"precisions": Precision, "compressions": Compression}.get(str(parameter.name), Target))
    wanted = tuple(item.strip() for item in value.split(",") if item.strip())
    if value == "none" and parameter.name == "compressions":
        return ()
    unknown = [item for item in wanted if item not in known]
    if unknown or not wanted:
        raise click.BadParameter(f"{value!r}; it is a list of {', '.join(known)}, separated by commas")
    return wanted


def _decisions(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    found = {}
    for value in values:
        output, _, kind = value.rpartition("=")
        if not output or kind not in DECISIONS:
            raise click.BadParameter(f"{value!r}; it is OUTPUT=KIND, a kind is one of {', '.join(DECISIONS)}")
        found[output] = kind
    return found or None


def _seconds(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:  # which click.FloatRange cannot say: it lets NaN through
        raise click.BadParameter(f"{value:g}; it is a number of seconds, at least 0")
    return value


@click.command("optimize")
@click.argument("model", type=FILE)
@click.option("--repository", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of models.")
@click.option("--name", required=True, help="Name to serve the model under.")
@click.option("--version", type=click.IntRange(min=1), help="Version number.  [default: the next one]")
@click.option("--calibration", type=FILE, help="DATA.npz; without it only exact variants are made.")
@click.option("--labels", type=FILE, help="LABELS.npz, to judge by accuracy as well; needs --calibration.")
@click.option("--min-agreement", type=float, help="Least share of equal decisions, 0 to 1.  [default: 0.99]")
@click.option("--max-accuracy-drop", type=float, help="Largest loss of accuracy on labels, 0 to 1.  [default: 0.01]")
@click.option("--devices", callback=_listed, help="List of cpu, cuda, tensorrt.  [default: cpu,cuda]")
@click.option("--precisions", callback=_listed, help="List of fp32, fp16, bf16, int8, int4.  [default: all]")
@click.option(
    "--compressions",
    callback=_listed,
    help="List of low-rank, prune-channels, sparsity-2-4, or none.  [default: low-rank,prune-channels]",
)
@click.option("--portable", is_flag=True, default=None, help="No variant that opens on this kind of CPU only.")
@click.option("--objective", type=click.Choice(get_args(Objective)), help="What counts.  [default: latency]")
@click.option(
    "--decision",
    "decisions",
    multiple=True,
    callback=_decisions,
    metavar="OUTPUT=KIND",
    help=f"How two answers of an output are compared: {', '.join(DECISIONS)}. May be repeated.  [default: by shape]",
)
@click.option("--slo-ms", type=float, help="Wanted p99 of a run: a variant and its batches stay within it.")
@click.option("--stages", type=int, help="Cut the first choice into stages for as many devices.  [default: 1, whole]")
@click.option("--stage-bytes", type=int, help="Weights that a device holds, with --stages.  [default: no limit]")
@click.option("--evaluator", default="", help="MODULE:FUNCTION(outputs, labels) -> metric, higher is better.")
@click.option("--recipe", "recipe_file", type=FILE, help="RECIPE.toml; options given here win over it.")
@click.option("--time-budget", default=300.0, show_default=True, callback=_seconds, help="Seconds for the whole run.")
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Finished work.  [default: REPO/.cache]"
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json on stdout, and nothing else there.")
@reports_errors
def optimize(model: Path, recipe_file: Path | None, time_budget: float, *, as_json: bool, **options: Any) -> None:
    """Optimize MODEL.onnx, prove every variant against it on this host, and write a servable artifact.

    The model passes through clean-up and operator fusion, then through quantization and compression, with repair where
    it pays. A variant is served only if it agrees with the original on held-out samples and is better than it; the
    report says why each other one was refused. The same input twice does nothing the second time, and an interrupted
    run goes on where it was. Every artifact holds recipe.toml, which makes the same variants again with --recipe.

    DATA.npz holds one array per model input, keyed by the input's name; the first axis counts the samples (128 for
    calibration, 256 for the search and 512 held out make a good proof). LABELS.npz holds 'labels', one class per
    sample.

    \b
    Example:
      slipstream optimize model.onnx --repository models --name mine --calibration data.npz
      slipstream serve models
    """  # noqa: D301  (click needs the control character, not its name)
    keys = ("repository", "name", "version", "calibration", "labels", "evaluator", "cache")
    given = {key: options.pop(key) for key in keys}
    if given["labels"] is not None and given["calibration"] is None:
        raise click.UsageError("--labels needs --calibration: labels belong to samples")
    command = shlex.join(["slipstream", *sys.argv[1:]])
    recipe = _recipe(recipe_file, options)
    request = OptimizeRequest(model=model, recipe=recipe, time_budget_s=time_budget, command=command, **given)
    found = pipeline.existing(request)
    artifact = found
    if artifact is None:
        with progress() as observe:
            artifact = pipeline.optimize(request, observe)
    _print_result(artifact, is_new=found is None, as_json=as_json)


@click.command("inspect")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print report.json on stdout, and nothing else there.")
@reports_errors
def inspect(folder: Path, *, as_json: bool) -> None:
    """Show what is in the artifact FOLDER (models/NAME/VERSION): its variants, and why each was kept or refused."""
    _print_result(read_artifact(folder), is_new=False, as_json=as_json)


@click.command("verify")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@reports_errors
def verify(folder: Path) -> None:
    """Prove the artifact FOLDER (models/NAME/VERSION) again on this host.

    Checks every digest, opens every variant on its device, and compares it with the original's golden outputs. Exits
    with 1 if a variant fails or cannot be opened here.
    """
    artifact = read_artifact(folder)
    if artifact.manifest is None:
        raise OptimizerError(f"{folder} holds a plain model without golden outputs; run slipstream optimize on it")
    console = Console()
    if artifact.manifest.host.get("fingerprint") != read_host().fingerprint:
        console.print("note: measured on another kind of host; its latencies do not hold here", highlight=False)
    devices = {device.kind: device for device in reversed(usable_devices("prefer"))}
    failed = [variant.name for variant in artifact.variants if not _verify(console, artifact, variant, devices)]
    if failed:
        raise OptimizerError(f"{len(failed)} of {len(artifact.variants)} variants failed: {', '.join(failed)}")


def _verify(console: Console, artifact: Artifact, variant: Variant, devices: dict[Any, Device]) -> bool:
    device = devices.get(variant.provider)
    try:
        if variant.host_bound and variant.host != read_host().fingerprint:
            raise StartupError("it was built for another kind of host; optimize the model here")
        if device is None:
            raise StartupError(f"no {variant.provider} device is usable here")
        signature = artifact.manifest.signature if artifact.manifest is not None else None
        session = open_variant(artifact.folder, variant, [device], variant.options, signature)
        try:
            decibel = require_golden(session, variant, read_golden(artifact.folder))
        finally:
            session.close()
    except SlipstreamError as exc:
        console.print(f"FAILED {variant.name}: {exc}", highlight=False, markup=False)
        return False
    console.print(
        f"ok     {variant.name} on {device.name}: {decibel:.1f} dB, needed {variant.golden_min_sqnr_db:.1f} dB",
        highlight=False,
    )
    return True


def _recipe(file: Path | None, options: dict[str, Any]) -> Recipe:
    recipe = read_recipe(file) if file is not None else Recipe()
    return msgspec.structs.replace(recipe, **{key: value for key, value in options.items() if value is not None})


@contextmanager
def progress() -> Iterator[pipeline.Observe]:
    """Show a bar with the current stage on stderr; plain lines when that is no terminal.

    Yields a function of the stage and the share that is done, 0 to 1, for any thread.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        seen: list[str] = []

        def log(stage: str, share: float) -> None:
            if stage not in seen[-1:]:
                seen.append(stage)
                console.print(f"{share:4.0%} {stage}", highlight=False, markup=False)

        yield log
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("load", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


def _print_result(artifact: Artifact, *, is_new: bool, as_json: bool) -> None:
    if artifact.manifest is None:
        raise OptimizerError(f"{artifact.folder} holds a plain model: unoptimized, without any evidence")
    try:
        report = read_report(artifact.folder)
    except (OSError, msgspec.MsgspecError) as exc:
        raise OptimizerError(f"cannot read {artifact.folder / REPORT_JSON}: {exc}") from exc
    if as_json:
        click.echo((artifact.folder / REPORT_JSON).read_bytes(), nl=False)
        return
    console = Console(highlight=False, markup=False, soft_wrap=True, width=_TABLE_COLUMNS)
    console.print(_table(report))
    for record in report.candidates:
        found = record.fidelity
        evidence = (describe(found), describe_accuracy(found)) if found is not None else ()
        console.print(f"{record.name} is {record.verdict}: {'; '.join(filter(None, (record.reason, *evidence)))}")
        if record.verdict == "served" and record.passes:
            console.print(f"    made by {' > '.join(record.passes)}")
    console.print(f"\n{report.headline}")
    console.print("~ on the search samples only, which decide what is tried; the others on held-out samples.")
    if report.promise:
        console.print(report.promise)
    state = "written" if is_new else "up to date"
    click.echo(f"{state}: {artifact.folder}\nreport: {artifact.folder / REPORT_HTML}")


def _table(report: Report) -> Table:
    table = Table(title=f"{report.name}/{report.version}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    accuracies = _accuracies(report)
    metric = ("acc",) if accuracies else ()
    numbers = ("MB", "agree", "dB", *metric, *(f"ms at {rows}" for rows in _DECIDING_ROWS))
    for column in ("variant", "verdict", *numbers):
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for record in report.candidates:
        accuracy = (accuracies.get(record.name, ""),) if accuracies else ()
        table.add_row(*_cells(record, accuracy))
    return table


def _evidence(record: CandidateRecord) -> tuple[Fidelity | None, str]:
    """Return a candidate's evidence, and the mark of one on the search samples only."""
    if record.fidelity is None and record.search_fidelity is not None:
        return record.search_fidelity, "~"
    return record.fidelity, ""


def _accuracies(report: Report) -> dict[str, str]:
    """Return the accuracy, or the user's metric, of each candidate and of the untouched file; empty without any."""
    found: dict[str, str] = {}
    for record in sorted(report.candidates, key=lambda record: record.fidelity is None):
        fidelity, mark = _evidence(record)
        if fidelity is None or fidelity.accuracy is None:
            continue
        found[record.name] = f"{mark}{fidelity.accuracy:.3f}"
        for untouched in (ORIGINAL, UNTOUCHED):
            found.setdefault(untouched, f"{mark}{fidelity.accuracy_original:.3f}")
    return found


def _cells(record: CandidateRecord, accuracy: tuple[str, ...]) -> tuple[str, ...]:
    fidelity, mark = _evidence(record)
    latency = record.latency
    times = dict(zip(latency.rows, latency.p50_ms, strict=True)) if latency is not None else {}
    return (
        record.name,
        record.verdict,
        f"{record.size_bytes / 1e6:.3g}" if record.size_bytes else "",
        f"{mark}{fidelity.agreement:.3f}" if fidelity is not None else "",
        f"{mark}{fidelity.sqnr_db:.0f}" if fidelity is not None else "",
        *accuracy,
        *(f"{times[rows]:.3g}" if rows in times else "" for rows in _DECIDING_ROWS),
    )
