"""The version folders of a repository, and which of them should serve. Pure but for ``scan`` and ``stamp``.

::

    models/<name>/<version>/        the version is a number without leading zeros; ``artifact`` says what is inside

Hidden entries and plain files are ignored, other folders are ignored and named.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from server.artifact import is_complete

_VERSION = re.compile(r"[1-9][0-9]*")

Key = tuple[str, str]
"""Name and version of a model."""

Stamp = tuple[tuple[str, int, int], ...]
"""Path, size in bytes and time of change in nanoseconds of each file of a version folder."""


class Listing(msgspec.Struct, frozen=True):
    """What one scan of a repository saw.

    Attributes:
        models: Name -> version -> folder, of the versions that may be opened, by name and ascending.
        present: All version folders, also those that are not complete yet.
        unreadable: Names of folders that could not be listed just now; nothing is known about them.
        ignored: Folders that are no version of a model.
    """

    models: dict[str, dict[str, Path]]
    present: frozenset[Key]
    unreadable: frozenset[str]
    ignored: tuple[str, ...]

    def versions(self, name: str) -> dict[str, Path]:
        """Return the complete versions of a model; empty when there are none."""
        return self.models.get(name, {})


def scan(repository: Path) -> Listing:
    """List the version folders; one pass over two levels of folders, which reads no file.

    Raises:
        OSError: If the repository folder itself cannot be listed.
    """
    models: dict[str, dict[str, Path]] = {}
    present: set[Key] = set()
    unreadable: set[str] = set()
    ignored: list[str] = []
    for model in _folders(repository):
        try:
            folders = _folders(model)
            numbered = [folder for folder in folders if _VERSION.fullmatch(folder.name)]
            complete = {folder.name: folder for folder in numbered if is_complete(folder)}
        except (FileNotFoundError, NotADirectoryError):  # removed just now
            continue
        except OSError:  # closed to us, as lost+found is, or a file system that fails now
            unreadable.add(model.name)
            ignored.append(model.name)
            continue
        if complete:
            models[model.name] = {version: complete[version] for version in sorted(complete, key=int)}
        present.update((model.name, folder.name) for folder in numbered)
        ignored += [f"{model.name}/{folder.name}" for folder in folders if folder.name not in complete]
        ignored += [] if folders else [model.name]
    return Listing(models, frozenset(present), frozenset(unreadable), tuple(ignored))


def stamp(folder: Path) -> Stamp:
    """Describe the files of a version folder: equal stamps mean that nothing was changed."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            facts = path.stat()
        except OSError:  # gone while we look
            continue
        found.append((str(path.relative_to(folder)), facts.st_size, facts.st_mtime_ns))
    return tuple(found)


def wanted(complete: Iterable[str], excluded: Collection[str], keep: int) -> list[str]:
    """Return the versions that should serve, the newest first.

    Args:
        complete: Versions that may be opened.
        excluded: Versions that failed, or that were rolled back.
        keep: How many should serve.
    """
    return sorted((version for version in complete if version not in excluded), key=int, reverse=True)[:keep]


def newest(versions: Iterable[str]) -> str | None:
    """Return the highest version, ``None`` of none."""
    return max(versions, key=int, default=None)


def rollback_target(
    default: str, history: Iterable[str], complete: Iterable[str], failed: Collection[str]
) -> str | None:
    """Return the version to go back to: the last one that served before, else the next lower one of the folder.

    Args:
        default: The version that serves by default now.
        history: Versions that served by default before, the last one at the end.
        complete: Versions that may be opened.
        failed: Versions that cannot be served.
    """
    possible = [version for version in complete if int(version) < int(default) and version not in failed]
    served_before = [version for version in history if version in possible]
    return served_before[-1] if served_before else newest(possible)


def _folders(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
