"""``make gpu-check``: check and measure this machine's GPU.

::

    python -m benchmarks.gpu [--seconds 1] [--out docs/measurements] [--rehearse]

Optimizes a transformer and a CNN for the GPU, which proves each precision against the original; measures latency tables
beside the floor that the device's own ceilings set; serves them in this process and over HTTP; lets the device fail and
a version change under load; and writes gpu-NAME.json and gpu-NAME.md. Without a GPU it says why and ends with exit code
3; --rehearse then runs the same on the CPU and writes to the folder for throw-away results, to try the check itself.
"""

import argparse
import asyncio
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import served, tables
from benchmarks.gpu.floor import Ceilings, measure_ceilings, work_of
from benchmarks.gpu.over_http import measure_http
from benchmarks.gpu.report import Candidate, Checked, ModelResult, write_report
from benchmarks.gpu.served import Disturbed, Served
from benchmarks.gpu.subjects import Subject, find_subjects
from optimizers import Recipe, Task, optimize
from optimizers.errors import OptimizerError
from optimizers.recipe import Target
from server.errors import ProviderUnavailable, SlipstreamError
from server.host import read_host
from server.providers import CPU, Device, check_environment, usable_devices

PREPARED = Path(".cache", "quickstart")
_OPTIMIZE_S = 120.0
_NO_GPU = 3


def main() -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="make gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs", "measurements"), help="folder of the report")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU; the report goes to benchmarks/results")
    options = parser.parse_args()
    try:
        check_environment()
        device = CPU if options.rehearse else usable_devices("require")[0]
    except ProviderUnavailable as exc:
        sys.stderr.write(f"Error: {exc}\nTo try the check itself on the CPU: python -m benchmarks.gpu --rehearse\n")
        return _NO_GPU
    except (SlipstreamError, OptimizerError) as exc:
        sys.stderr.write(f"Error: {exc}\n")
        return 1
    out = Path("benchmarks", "results") if options.rehearse else options.out
    with tempfile.TemporaryDirectory() as folder:
        checked = check(device, Path(folder), options.seconds)
    for path in write_report(checked, out):
        _say(f"wrote {path}")
    for failure in checked.failures:
        sys.stderr.write(f"FAILED: {failure}\n")
    return 1 if checked.failures else 0


def check(device: Device, folder: Path, seconds: float) -> Checked:
    """Run everything on one device.

    Args:
        device: The device.
        folder: Where models and the repository go.
        seconds: For each measurement.
    """
    _say(f"ceilings of {device.name}")
    ceilings = measure_ceilings(device, seconds)
    results = []
    for subject in find_subjects(PREPARED, folder):
        _say(f"{subject.name}: optimizing")
        results.append(_check_model(subject, device, folder / "repository", seconds, ceilings))
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return Checked(device.name, read_host(), command, ceilings, tuple(results))


def _check_model(subject: Subject, device: Device, repository: Path, seconds: float, ceilings: Ceilings) -> ModelResult:
    kinds: tuple[Target, ...] = ("cpu",) if device.kind == "cpu" else ("cpu", "cuda")
    recipe = Recipe(precisions=("fp32", "fp16"), compressions=(), devices=kinds)
    made = optimize(
        Task(
            model=subject.model,
            repository=repository,
            name=subject.name,
            calibration=subject.samples,
            recipe=recipe,
            time_budget_s=_OPTIMIZE_S,
        )
    )
    _say(f"{subject.name}: latency tables")
    work = work_of(subject.model, subject.batch(1))
    timings = tuple(tables.measure(subject, made.artifact, device, work, ceilings, seconds))
    gpu = "off" if device.kind == "cpu" else "require"
    _say(f"{subject.name}: over HTTP")
    http = measure_http(repository, subject, gpu, 4 * seconds)
    _say(f"{subject.name}: in process, fail-over, swap")
    in_process, failover, swap = asyncio.run(_serve(repository, subject, gpu, seconds))
    candidates = tuple(
        Candidate(c.name, c.verdict, c.fidelity.agreement if c.fidelity is not None else None, c.reason)
        for c in made.report.candidates
    )
    return ModelResult(subject.name, subject.origin, work, candidates, timings, in_process, http, failover, swap)


async def _serve(
    repository: Path, subject: Subject, gpu: str, seconds: float
) -> tuple[Served, Disturbed | None, Disturbed]:
    async with served.serving(repository, gpu) as opened:
        in_process = await served.throughput(opened, subject, 4 * seconds)
        failover = await served.failover(opened, subject, seconds)
        return in_process, failover, await served.swap(opened, repository, subject, seconds)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
