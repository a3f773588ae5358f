"""TensorRT engines of a run's candidates: built beside the artifact, recorded, and never the end of a run."""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from optimizers.calibration import Samples
from optimizers.engine import EngineBuild, build_engine
from optimizers.errors import EngineBuildError
from optimizers.records import EngineRecord
from server.artifact import Profile


def build_engines(
    models: Mapping[str, Path], samples: Samples, max_rows: int, folder: Path, timeout_s: float
) -> tuple[EngineRecord, ...]:
    """Build one engine per model, each in a process of its own, which a crash or a hang of the builder ends alone.

    Args:
        models: Candidate -> ONNX file.
        samples: Their shapes become the profile.
        max_rows: Largest batch of the profile.
        folder: Where the plans go, as ``<candidate>.plan``.
        timeout_s: Seconds for one build.
    """
    profile = profile_of(samples, max_rows)
    return tuple(_record(name, model, profile, folder / f"{name}.plan", timeout_s) for name, model in models.items())


def profile_of(samples: Samples, max_rows: int) -> Profile:
    """Return shapes from one row to ``max_rows`` rows, best at ``max_rows``; other axes are those of the samples."""
    rows = max_rows if samples.batched else 1
    one = {name: array.shape for name, array in samples.batch(0, 1).items()}
    many = {name: (rows, *shape[1:]) if samples.batched else shape for name, shape in one.items()}
    return Profile(one, many, many)


def _record(name: str, model: Path, profile: Profile, plan: Path, timeout_s: float) -> EngineRecord:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        built: EngineBuild = pool.submit(build_engine, model, profile, plan).result(timeout_s)
    except EngineBuildError as exc:
        return EngineRecord(f"{name}: refused", str(exc))
    except BrokenProcessPool:
        return EngineRecord(f"{name}: refused", "the builder's process ended without an answer")
    except TimeoutError:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        return EngineRecord(f"{name}: refused", f"stopped after {timeout_s:g} s")
    except Exception as exc:  # noqa: BLE001  (the stage's isolation: any failure of a builder is a refusal)
        return EngineRecord(f"{name}: refused", f"{type(exc).__name__}: {exc}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    facts = {
        "builder": f"{built.flavour} {built.version}",
        "compute capabilities": ", ".join(built.capabilities) or "of the GPU that was present",
        "plan": f"engines/{plan.name}, {built.plan_bytes} bytes",
        "seconds": f"{built.seconds:.1f}",
    }
    return EngineRecord(f"{name}: built", "built, not served: no lane runs bare engines yet", facts)
