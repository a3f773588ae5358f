"""The models that are served in the comparison, with their requests and what is expected of an answer's time."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks.workloads import Row, Workload, open_workload, read_rows, save_tiny, save_wide
from benchmarks.zoo.models import EFFICIENTNET
from benchmarks.zoo.models import ensure as ensure_model
from deploy.quickstart.models import MINILM

ROOT = Path(__file__).resolve().parents[2]
ZOO, QUICKSTART, OPTIMIZED = ROOT / ".cache" / "zoo", ROOT / ".cache" / "quickstart", ROOT / ".cache" / "optimized"
PICTURES = 8
"""Different pictures in requests: each takes three megabytes as JSON."""

SENTENCES = 32


class Material(msgspec.Struct, frozen=True):
    """One model of the comparison.

    Attributes:
        name: Of the model.
        about: What it is.
        workload: The original file with its requests.
        optimized: The repository that ``slipstream optimize`` made of it, with the same requests; ``None`` without one.
        every_kind: Whether a system is measured with all kinds of messages, or only with its best one.
        slo_ms: Within which an answer counts in an open loop; 0 leaves the open loop out.
        closed_scale: How many times as long as asked for a closed loop lasts: slow models need more time for as many
            answers.
        open_scale: The same for a rate of an open loop.
    """

    name: str
    about: str
    workload: Workload
    optimized: Workload | None
    every_kind: bool
    slo_ms: float
    closed_scale: float
    open_scale: float


def tiny(scratch: Path) -> Material:
    """Two layers: the model costs nothing."""
    return Material("tiny", "two dense layers, 64 floats in", save_tiny(scratch), None, True, 50.0, 1.0, 1.5)


def wide(scratch: Path) -> Material:
    """Many numbers: reading them is the cost."""
    return Material("wide", "means of 12,288 floats", save_wide(scratch), None, True, 0.0, 1.0, 1.0)


def cnn(scratch: Path) -> Material:
    """EfficientNet-Lite0 at 224 x 224."""
    folder = ensure_model(EFFICIENTNET, ZOO, _say)
    rows = read_rows(folder / "data.npz", PICTURES)
    about = "EfficientNet-Lite0, 3 x 224 x 224 floats in"
    return _real(scratch, EFFICIENTNET.name, about, folder, OPTIMIZED, rows)


def minilm(scratch: Path) -> Material:
    """MiniLM-L6 with 64 tokens."""
    folder = ensure_model(MINILM, QUICKSTART, _say)
    rows = read_rows(folder / "data.npz", SENTENCES)
    return _real(scratch, MINILM.name, "a sentence encoder, 3 x 64 tokens in", folder, ROOT / "models", rows)


MODELS: dict[str, Callable[[Path], Material]] = {"tiny": tiny, "wide": wide, "cnn": cnn, "minilm": minilm}


def open_materials(names: Sequence[str], scratch: Path) -> Iterator[Material]:
    """Yield the chosen models.

    Raises:
        QuickstartError: If a model is not there and cannot be downloaded.
    """
    for name in names:
        yield MODELS[name](scratch / name)


def _real(scratch: Path, name: str, about: str, folder: Path, optimized: Path, rows: list[Row]) -> Material:
    original = scratch / "original" / name / "1"
    original.mkdir(parents=True)
    (original / "model.onnx").symlink_to((folder / "model.onnx").resolve())
    workload = open_workload(original.parents[1], name, rows)
    found = None
    if (optimized / name).is_dir():
        # A repository of its own, so that no other model is served beside it.
        (scratch / "optimized").mkdir()
        (scratch / "optimized" / name).symlink_to((optimized / name).resolve())
        found = open_workload(scratch / "optimized", name, rows)
    return Material(name, about, workload, found, every_kind=False, slo_ms=250.0, closed_scale=2.0, open_scale=2.0)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
