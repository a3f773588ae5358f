"""What to optimize, what the artifact follows from, and whether a version of the repository already holds it."""

import hashlib
import re
from pathlib import Path

import msgspec

from optimizers.errors import OptimizerError
from optimizers.graph import files_of
from optimizers.passes import Pass
from optimizers.recipe import Recipe
from optimizers.store import joint_digest
from server.artifact import Artifact, digest_of, read_artifact
from server.errors import ArtifactError
from server.host import HostFacts

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class OptimizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to optimize, with what, and where to put it.

    Attributes:
        model: The ONNX file.
        repository: Folder of models; created when missing.
        name: Name to serve under.
        version: Version number; ``None`` takes the one that holds the same already, or else the next one.
        calibration: DATA.npz; without it only exact variants are made.
        labels: LABELS.npz.
        recipe: What to build and what to require.
        evaluator: ``module:function`` that judges outputs, see ``evaluator``.
        time_budget_s: Seconds for the whole run. The original's answers, the exact forms and their proof are never cut.
        cache: Folder of finished work; ``None`` means ``.cache`` in the repository.
        pass_timeout_s: Seconds after which one pass is stopped.
        command: The command line, for the report.
    """

    model: Path
    repository: Path
    name: str
    version: int | None = None
    calibration: Path | None = None
    labels: Path | None = None
    recipe: Recipe = Recipe()
    evaluator: str = ""
    time_budget_s: float = 300.0
    cache: Path | None = None
    pass_timeout_s: float = 600.0
    command: str = ""


class Digests(msgspec.Struct, frozen=True):
    """What an artifact follows from: equal digests and tools mean that the same was asked for.

    Attributes:
        source: SHA-256 of the model file and of its external weights.
        recipe: SHA-256 of the recipe, the evaluator, the time budget and the passes' versions.
        inputs: SHA-256 of the samples and labels; empty without any.
        host: Fingerprint of the machine.
        tools: Installed distributions and their versions.
    """

    source: str
    recipe: str
    inputs: str
    host: str
    tools: dict[str, str]


def digests_of(request: OptimizeRequest, host: HostFacts, passes: list[Pass]) -> Digests:
    """Read every file of a request and digest it.

    Raises:
        OptimizerError: If the name cannot be served, or if a file cannot be read.
    """
    if not _NAME.fullmatch(request.name):
        raise OptimizerError(
            f"the name {request.name!r} is not one of letters, digits, '.', '_', '-' (no '.' in front)"
        )
    versions = sorted(f"{step.spec.name} {step.spec.version}" for step in passes)
    asked = [request.recipe.digest(), _evaluator(request.evaluator), f"{request.time_budget_s:g} s"]
    recipe = "\n".join([*asked, *versions])
    data = [path for path in (request.calibration, request.labels) if path is not None]
    try:
        source, inputs = joint_digest(files_of(request.model)), joint_digest(data) if data else ""
    except OSError as exc:
        raise OptimizerError(f"cannot read {exc.filename}: {exc.strerror}") from exc
    return Digests(source, hashlib.sha256(recipe.encode()).hexdigest(), inputs, host.fingerprint, host.tools)


def find_existing(request: OptimizeRequest, digests: Digests) -> Artifact | None:
    """Return the newest version that the same request made, if there is one.

    Raises:
        ArtifactError: If ``request.version`` names a version of other content, or one that is damaged.
    """
    folder = request.repository / request.name
    if request.version is not None:
        target = folder / str(request.version)
        if not target.exists():
            return None
        artifact = read_artifact(target)
        if not _is_same(artifact, digests):
            raise ArtifactError(
                f"{target} holds something else, and versions never change; choose another --version, or leave it out"
            )
        return artifact
    for number in reversed(versions_in(folder)):
        try:
            artifact = read_artifact(folder / str(number))
        except ArtifactError:
            continue  # damaged, or of another format: the next version replaces it
        if _is_same(artifact, digests):
            return artifact
    return None


def versions_in(folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, ascending; none when it does not exist."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _is_same(artifact: Artifact, digests: Digests) -> bool:
    manifest = artifact.manifest
    if manifest is None:
        return False
    host = manifest.host.get("fingerprint", "")
    made = Digests(manifest.source.sha256, manifest.recipe_sha256, manifest.inputs_sha256, host, manifest.tools)
    return made == digests


def _evaluator(reference: str) -> str:
    """Return the evaluator with the digest of its module's file, since a changed metric is another one."""
    module = reference.partition(":")[0]
    file = Path(f"{module.replace('.', '/')}.py")
    return f"{reference} {digest_of(file)}" if file.is_file() else reference
