"""The command ``build-engine``."""

import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import click

from optimizers import engine
from optimizers.calibration import read_samples
from optimizers.cli import FILE, progress, reports_errors
from optimizers.engine import RTX_CAPABILITIES, EngineBuild, EngineOptions, Flavour, HardwareCompatibility, Observe
from optimizers.errors import EngineBuildError
from optimizers.graph import load_model, signature_of
from optimizers.plans import PlanCache
from optimizers.profiles import parse_profiles, profiles_of, profiles_of_traffic
from server.artifact import Profile

_BYTES_PER_MB = 1_000_000
_TIMEOUT_S = 30.0


@click.command("build-engine")
@click.argument("model", type=FILE)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The plan to write.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="INPUT=MIN:BEST:MAX",
    help="Shapes of an input, e.g. x=1x64:8x64:32x64. Once per input; again for another profile of the same engine.",
)
@click.option("--calibration", type=FILE, help="DATA.npz: its shapes make the profiles, with --rows.")
@click.option(
    "--traffic",
    metavar="URL|FILE",
    help="Shapes of real requests make the profiles, with --rows: http://HOST:PORT/v2/models/NAME/shapes of a server "
    "in use, or its answer in a file.",
)
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(min=1),
    help="Largest batch of a profile from data or traffic; repeatable.",
)
@click.option("--flavour", type=click.Choice(["auto", *get_args(Flavour)]), default="auto", show_default=True)
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help=f"Compute capability to build for, repeatable; TensorRT-RTX only.  [default: {', '.join(RTX_CAPABILITIES)}]",
)
@click.option("--level", type=int, help="Effort, 0 (fast build) to 5 (fast engine); TensorRT only.  [default: 3]")
@click.option(
    "--hardware-compatibility",
    type=click.Choice(get_args(HardwareCompatibility)),
    help="Other GPUs that the plan runs on; TensorRT only.  [default: none]",
)
@click.option("--version-compatible", is_flag=True, help="Later runtimes read the plan; TensorRT only.")
@click.option("--tf32", is_flag=True, help="Round the inputs of FP32 products to TF32.")
@click.option("--sparse-weights", is_flag=True, help="Use sparse tensor cores for weights with a 2:4 pattern.")
@click.option("--workspace-mb", type=click.IntRange(min=1), help="Most memory of a tactic.  [default: 1074]")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Folder of finished plans.")
@reports_errors
def build_engine(model: Path, out: Path, cache: Path | None, **options: Any) -> None:
    """Build a TensorRT engine of MODEL.onnx and write it as a plan.

    Precision is what the file says: FP32, FP16 or BF16 tensors, INT8 and FP8 as symmetric pairs of QuantizeLinear and
    DequantizeLinear. TensorRT builds for the GPU that is present; TensorRT-RTX needs none. Ctrl-C cancels and leaves
    nothing behind.

    \b
    Example:
      slipstream build-engine model.onnx --out model.plan --profile x=1x64:8x64:32x64 --capability 8.9
    """  # noqa: D301  (click needs the control character, not its name)
    sources = (options.pop("profiles"), options.pop("calibration"), options.pop("traffic"))
    profiles = _profiles(model, *sources, options.pop("rows"))
    if (megabytes := options.pop("workspace_mb")) is not None:
        options["workspace_bytes"] = megabytes * _BYTES_PER_MB
    wanted = EngineOptions(**{key: value for key, value in options.items() if value not in (None, ())})
    build = engine.build_engine if cache is None else PlanCache(cache).get_or_build
    with progress() as show:
        made = _cancellable(lambda observe: build(model, profiles, out, wanted, observe), show)
    state = "from the cache" if made.cached else f"built in {made.seconds:.1f} s"
    target = ", ".join(made.capabilities) or "the GPU of this machine"
    click.echo(f"{out}: {made.plan_bytes} bytes for {target}, {made.flavour} {made.version}, {state}")


def _profiles(
    model: Path, texts: tuple[str, ...], data: Path | None, traffic: str | None, rows: tuple[int, ...]
) -> tuple[Profile, ...]:
    if sum(map(bool, (texts, data, traffic))) > 1:
        raise click.UsageError("--profile, --calibration and --traffic are ways to say the same; give one")
    if rows and not (data or traffic):
        raise click.UsageError("--rows needs --calibration or --traffic")
    if data is not None:
        if not rows:
            raise click.UsageError("--calibration needs --rows")
        return profiles_of(read_samples(data, signature_of(load_model(model))), rows)
    if traffic is not None:
        return profiles_of_traffic(_read(traffic), rows)
    return parse_profiles(texts)


def _read(source: str) -> bytes:
    """Read a URL, or a file."""
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=_TIMEOUT_S) as answer:  # noqa: S310  (one of the two)
                body: bytes = answer.read()
                return body
        return Path(source).read_bytes()
    except OSError as exc:
        raise EngineBuildError(f"{source}: {exc}") from exc


def _cancellable(build: Callable[[Observe], EngineBuild], show: Callable[[str, float], None]) -> EngineBuild:
    """Run a build in a thread, because the builder's own code hears no Ctrl-C: the next step of its progress does."""
    stopped = threading.Event()

    def goes_on(phase: str, share: float) -> bool:
        show(phase, share)
        return not stopped.is_set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build, goes_on)
        try:
            return future.result()
        except KeyboardInterrupt:
            stopped.set()
            raise
