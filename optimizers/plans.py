"""A cache of plans: the same model is not built again for the same GPU by the same builder.

An entry is a folder of a ``store.Store`` with two files: ``model.plan``, and ``build.json`` with the facts of the build
and the digest of the plan. An entry that does not fit its digest is built again.
"""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from optimizers.engine import EngineBuild, EngineOptions, Flavour, Observe, build_engine, import_builder, write_plan
from optimizers.errors import EngineBuildError
from optimizers.gpu import GpuFacts, read_gpu
from optimizers.graph import files_of
from optimizers.store import MOST_BYTES, Store, joint_digest, key_of
from server.artifact import Profile

_FORMAT = 1  # of the key: raise it when a build changes in a way that the options do not tell
_PLAN, _FACTS = "model.plan", "build.json"
_TIMINGS = "timings"

logger = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    """What lies beside a plan."""

    build: EngineBuild
    sha256: str


def plan_key(
    model: Path, profiles: Sequence[Profile], options: EngineOptions, builder: tuple[Flavour, str], gpu: GpuFacts | None
) -> str:
    """Return the SHA-256, in hexadecimal, of everything that a plan follows from.

    That is the model file and every file of external weights (so the precision, which is in the file), the profiles in
    their order, the options, the builder's flavour and version, and what it builds for: TensorRT for the GPU that is
    present, by name, compute capability, CUDA version and driver; TensorRT-RTX for the chosen capabilities, wherever
    it runs.

    Args:
        model: An ONNX file.
        profiles: Shapes for the inputs.
        options: How to build; the folder of timing caches does not count.
        builder: Flavour and version of the builder.
        gpu: The GPU that is present; does not count for TensorRT-RTX.

    Raises:
        EngineBuildError: If a file of the model is missing.
        ModelError: If the model cannot be read.
    """
    flavour, version = builder
    try:
        digest = joint_digest(files_of(model))
    except OSError as exc:
        raise EngineBuildError(f"{model} has weights in a file that cannot be read: {exc}") from exc
    counted = msgspec.structs.replace(
        options,
        flavour=flavour,
        timings=None,
        capabilities=options.capabilities if flavour == "tensorrt-rtx" else (),
    )
    return key_of(_FORMAT, digest, profiles, counted, version, gpu if flavour == "tensorrt" else None)


class PlanCache:
    """The cache in one folder. Several processes may use it at a time: an entry appears as a whole, by a rename.

    Args:
        folder: Made when missing.
        most_bytes: Size beyond which the plans that were not used for longest are removed.

    Raises:
        EngineBuildError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        try:
            self._store = Store(folder / "plans", most_bytes)
        except OSError as exc:
            raise self._refusal(exc) from exc
        self._store.sweep()

    def get_or_build(
        self,
        model: Path,
        profiles: Profile | Sequence[Profile],
        plan: Path,
        options: EngineOptions | None = None,
        observe: Observe = lambda _phase, _share: True,
    ) -> EngineBuild:
        """Write a plan: a copy of the one in the cache, after a check of its digest, else one that is built and kept.

        Of two processes that build the same plan at a time, the first one's is kept. Takes the arguments of
        ``engine.build_engine``; timing caches are kept in the cache's folder unless the options name another.

        Raises:
            EngineBuildError: As ``build_engine`` does; also if a file of weights is missing, or if the cache's folder
                cannot be written.
            ModelError: If the model cannot be read.
        """
        options = options or EngineOptions()
        wanted = (profiles,) if isinstance(profiles, Profile) else tuple(profiles)
        flavour, trt = import_builder(options.flavour)
        gpu = read_gpu() if flavour == "tensorrt" else None
        key = plan_key(model, wanted, options, (flavour, trt.__version__), gpu)
        if (found := self._find(key)) is not None:
            build, content = found
            write_plan(plan, content)
            return build
        if options.timings is None:
            options = msgspec.structs.replace(options, timings=self.folder / _TIMINGS)
        try:
            return self._build(key, plan, lambda draft: build_engine(model, wanted, draft, options, observe))
        except OSError as exc:
            raise self._refusal(exc) from exc

    def _build(self, key: str, plan: Path, build: Callable[[Path], EngineBuild]) -> EngineBuild:
        """Build into a draft, write the plan, and make the draft an entry."""
        draft = self._store.draft()
        try:
            built = build(draft / _PLAN)
            content = (draft / _PLAN).read_bytes()
            write_plan(plan, content)
            (draft / _FACTS).write_bytes(msgspec.json.encode(_Entry(built, _digest(content))))
            self._store.keep(key, draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # a draft that was kept has another name by now
        with contextlib.suppress(FileNotFoundError):  # another process trims, too
            self._store.trim()
        return built

    def _refusal(self, exc: OSError) -> EngineBuildError:
        return EngineBuildError(f"cannot keep plans in {self.folder}: {exc.strerror or exc}; choose another folder")

    def _find(self, key: str) -> tuple[EngineBuild, bytes] | None:
        """Return the facts and the plan of an entry; nothing without an entry that is whole."""
        place = None
        with contextlib.suppress(FileNotFoundError):  # another process removes it right now
            place = self._store.find(key)
        if place is None:
            return None
        try:
            entry = msgspec.json.decode((place / _FACTS).read_bytes(), type=_Entry)
            content = (place / _PLAN).read_bytes()
        except (OSError, msgspec.MsgspecError) as exc:
            damage = str(exc)
        else:
            if _digest(content) == entry.sha256:
                return msgspec.structs.replace(entry.build, cached=True), content
            damage = "its digest is another"
        logger.warning("the cached plan %s is damaged (%s); it is built again", place, damage)
        self._drop(place)
        return None

    def _drop(self, place: Path) -> None:
        """Move an entry out of the way in one step, then remove it."""
        draft = self._store.draft()
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            place.rename(draft / place.name)
        shutil.rmtree(draft)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
