"""TensorRT engines for models in service: built in a process of their own, proven, and swapped in.

A build takes seconds to minutes, and nobody waits for it: the model serves on what opens at once, the CUDA provider or
the CPU. When the engine is there it is opened, checked against the golden outputs and measured as every variant is; if
it is faster than what serves, its lane comes first from then on. The lanes that were there stay, for overflow, for
shapes that the engine was not built for, and for failures.

An engine that lies in the artifact, built on another machine for this kind of GPU, is tried first.

The builder is a command, because it needs the optimizer, which a server goes without. It keeps the plans that it has
built, so the next start gets them in the time that the command takes to start.
"""

import asyncio
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from server.artifact import Golden, Manifest, Profile, SessionOptions, Variant, read_golden
from server.background import NICENESS, Background
from server.errors import Draining, SlipstreamError, StartupError
from server.metrics import Metrics
from server.model import Model
from server.providers import Device
from server.scheduler import LaneSpec
from server.settings import Settings

logger = logging.getLogger(__name__)

_BUILDER = f"{shlex.quote(sys.executable)} -m slipstream build-engine"
_TIMEOUT_S = 3600.0
_TOLD_LINES = 3  # of the builder's last words, in the error


class Building:
    """Builds engines, one at a time.

    Use it on the event loop.

    Args:
        settings: Whether to build, with what, and where plans are kept.
        metrics: The process's metrics.
        background: Where engines are opened.
    """

    def __init__(self, settings: Settings, metrics: Metrics, background: Background) -> None:
        self._settings, self._metrics, self._background = settings, metrics, background
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, model: Model, devices: tuple[Device, ...]) -> None:
        """Begin to build what a model that has just come into service could use; return at once.

        Args:
            model: The model.
            devices: The devices that really work.
        """
        places = [device for device in devices if device.kind == "tensorrt"]
        if self._settings.engines == "off" or not places:
            return
        if model.artifact.manifest is None:
            logger.info("%s/%s: no engine, since nothing could prove it: optimize the model", model.name, model.version)
            return
        task = asyncio.create_task(self._build_all(model, model.artifact.manifest, places))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End the build that runs, and begin no other."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _build_all(self, model: Model, manifest: Manifest, places: Sequence[Device]) -> None:
        for source in sources(manifest, model.variants):
            for device in places:
                async with self._turn:
                    if not model.ready:
                        return
                    result = await self._build(model, manifest, source, device)
                self._metrics.engine_builds.labels(model.name, result).inc()

    async def _build(self, model: Model, manifest: Manifest, source: Variant, device: Device) -> str:
        """Build one engine and bring it into service; return the result that is counted."""
        title = f"{model.name}/{model.version}: the engine of {source.name} on {device.name}"
        try:
            lanes = await self._open_own(title, model, source, device)
            if lanes is None:
                engine = await self._run_builder(model.artifact.folder, manifest, source, device)
                lanes = await self._open(model, engine, source, device)
            if not _is_faster(lanes[0], [other for other in model.lanes if other.variant != lanes[0].variant]):
                logger.warning("%s is no faster than what serves and is not used", title)
                model.discard(lanes)
                return "slower"
            model.adopt(lanes)
        except Draining:
            return "late"
        except Exception as exc:  # Whatever a builder makes fail must not harm what serves.
            is_known = isinstance(exc, (SlipstreamError, OSError))
            logger.warning("%s is not used: %s", title, exc, exc_info=None if is_known else exc)
            return "failed"
        logger.info("%s serves", title)
        return "served"

    async def _open_own(self, title: str, model: Model, source: Variant, device: Device) -> list[LaneSpec] | None:
        """Open the engine that the artifact has; ``None`` if it has none that fits here."""
        if not source.engine or source.profile is None:
            return None
        try:
            return await self._open(model, _engine_of(source, source.engine, source.profile, device), source, device)
        except StartupError as exc:
            logger.info("%s is built, that of the artifact does not fit: %s", title, exc)
            return None

    async def _open(self, model: Model, engine: Variant, source: Variant, device: Device) -> list[LaneSpec]:
        # Threads of a GPU driver inherit the priority of the thread that opens it.
        return await self._background.run(model.open_engine, engine, source, device, low=False)

    async def _run_builder(self, folder: Path, manifest: Manifest, source: Variant, device: Device) -> Variant:
        profile = source.profile or profile_of(manifest, await asyncio.to_thread(read_golden, folder))
        kept = self._settings.engine_cache.absolute()
        plan = kept / manifest.name / manifest.version / f"{source.name}-{device.index}.plan"
        command = [*shlex.split(self._settings.engine_builder or _BUILDER), str(folder / source.file)]
        command += ["--out", str(plan), "--cache", str(kept / "plans")]
        for text in _profile_texts(profile):
            command += ["--profile", text]
        await _run(command, _only(device, os.environ))
        return _engine_of(source, str(plan), profile, device)


def sources(manifest: Manifest, served: Sequence[str]) -> list[Variant]:
    """Return the variants of which engines are made: those for CUDA, or the first in full precision; and for TensorRT.

    INT8 variants for the CPU are none: TensorRT refuses their asymmetric ranges.

    Args:
        manifest: The model's.
        served: Names of its variants in service.
    """
    whole = [variant for variant in manifest.variants if not variant.stages]
    made_for = [variant for variant in whole if variant.provider == "tensorrt"]
    there = [variant for variant in whole if variant.name in served]
    on_gpu = [variant for variant in there if variant.provider == "cuda"]
    return [*(on_gpu or [variant for variant in there if variant.precision == "fp32"][:1]), *made_for]


def profile_of(manifest: Manifest, golden: Golden) -> Profile:
    """Return shapes from one row to the largest batch; other variable axes go from 1 to the golden inputs' size.

    Inputs of a fixed shape need none.
    """
    minimum: dict[str, tuple[int, ...]] = {}
    maximum: dict[str, tuple[int, ...]] = {}
    for spec in manifest.signature.inputs:
        if all(isinstance(size, int) for size in spec.shape):
            continue
        seen = golden.inputs[spec.name].shape
        rows = manifest.batching.max_rows if manifest.batching.batchable else seen[0]
        largest = [rows if axis == 0 else size for axis, size in enumerate(seen)]
        minimum[spec.name] = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
        maximum[spec.name] = tuple(
            size if isinstance(size, int) else most for size, most in zip(spec.shape, largest, strict=True)
        )
    return Profile(minimum, maximum, maximum)


def _engine_of(source: Variant, plan: str, profile: Profile, device: Device) -> Variant:
    return msgspec.structs.replace(
        source,
        name=source.name if source.provider == "tensorrt" else f"{source.name}-engine",
        file=plan,
        provider=device.kind,
        options=SessionOptions(),
        latency=None,
        profile=profile,
        from_rows=0,
    )


def _profile_texts(profile: Profile) -> list[str]:
    """Spell a profile as the builder's command takes it, ``x=1x64:8x64:32x64``."""
    shapes = (profile.minimum, profile.optimum, profile.maximum)
    return [f"{name}={':'.join('x'.join(map(str, each[name])) for each in shapes)}" for name in profile.minimum]


def _only(device: Device, environment: Mapping[str, str]) -> dict[str, str]:
    """Let a process see one GPU: engines are built for the first one that there is."""
    seen = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    visible = seen[device.index] if device.index < len(seen) else str(device.index)
    return {**environment, "CUDA_VISIBLE_DEVICES": visible}


def _is_faster(lane: LaneSpec, others: Sequence[LaneSpec]) -> bool:
    """Whether a lane is faster than the first one of the others, in the mean over the measured batch sizes."""
    new, old = lane.latency, others[0].latency
    if new is None or old is None:
        return True
    gains = [math.log(max(old.predict_s(rows), 1e-9) / max(new.predict_s(rows), 1e-9)) for rows in new.rows]
    return sum(gains) > 0


async def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command at low priority to its end.

    Raises:
        StartupError: If it fails, with its last words, or takes too long.
        OSError: If it cannot be started.
    """
    logger.info("running %s", shlex.join(command))
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # so that its own processes can be ended with it
    )
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        async with asyncio.timeout(_TIMEOUT_S):
            _, told = await process.communicate()
    except TimeoutError as exc:
        raise StartupError(f"the builder did not end within {_TIMEOUT_S:g} s") from exc
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        last = told.decode(errors="replace").strip().splitlines()[-_TOLD_LINES:]
        raise StartupError(f"the builder ended with exit code {process.returncode}: {' '.join(last) or 'no message'}")
