"""Timing caches of TensorRT: the tactics measured by one build are not measured again by the next.

A file holds the measurements of one builder version on one kind of GPU with one driver, and its name says so: what was
measured elsewhere is never read. A file that the builder refuses is left aside, and the build measures anew.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from optimizers.gpu import GpuFacts
from optimizers.store import key_of

logger = logging.getLogger(__name__)


def timing_file(folder: Path, builder: str, gpu: GpuFacts | None) -> Path:
    """Return the file for a builder and a GPU.

    Args:
        folder: Where the files are.
        builder: Flavour and version of the builder.
        gpu: The GPU that tactics are measured on; ``None`` when it is not known.
    """
    return folder / f"{key_of(builder, gpu)[:32]}.timings"


def load_timings(config: Any, file: Path) -> None:
    """Give a builder configuration the measurements of a file, or an empty set of them for the build to fill.

    Args:
        config: ``IBuilderConfig``.
        file: It need not exist, and may be damaged.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as exc:
        logger.warning("cannot read the timing cache %s: %s; tactics are measured anew", file, exc)
        content = b""
    # The second argument: a cache of another builder or GPU is refused and not used all the same.
    if content and config.set_timing_cache(config.create_timing_cache(content), False):
        return
    if content:
        logger.warning("the builder refuses the timing cache %s; tactics are measured anew", file)
    config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: Any, file: Path) -> None:
    """Write a configuration's measurements, so that readers see the old file or the new one, never a part.

    Of two builds at a time, the last one to write wins. A file that cannot be written costs the next build time, and
    this one nothing.

    Args:
        config: ``IBuilderConfig`` after its build.
        file: Where to write; its folder is created.
    """
    timings = config.get_timing_cache()
    if timings is None:
        return
    try:
        write_whole(file, bytes(timings.serialize()))
    except OSError as exc:
        logger.warning("cannot write the timing cache %s: %s", file, exc)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file in one step, so that no reader sees a part of it; its folder is created.

    Raises:
        OSError: If it cannot be written; an older file is then as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        draft = Path(folder) / file.name
        draft.write_bytes(content)
        draft.replace(file)
