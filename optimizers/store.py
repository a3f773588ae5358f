"""A content-addressed cache of finished work: what was made once from the same inputs is not made again.

::

    <folder>/<key[:2]>/<key>/     the files of one entry; in place as a whole, or not at all

A key is the digest of everything that the result follows from; who stores something names all of it. An interrupted run
leaves whole entries and, at most, hidden drafts that the next run removes. Entries that were not used for longest go
first when the cache outgrows its limit.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from server.artifact import digest_of

MOST_BYTES = 10_000_000_000
_DRAFT = ".draft-"


def key_of(*parts: object) -> str:
    """Return the SHA-256 of values that msgspec can write as JSON, in this order, in hexadecimal.

    Sets and dictionaries count by content, not by order.
    """
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def joint_digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of one file as it is, of several the digest of their digests, in hexadecimal."""
    digests = [digest_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def sweep(folder: Path, prefix: str) -> None:
    """Remove folders named ``<prefix><process id>-...`` whose process is gone: an interrupted run left them."""
    for left in folder.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)


class Store:
    """The cache in one folder.

    Several processes may use one store at a time: entries are immutable and appear by a rename.

    Args:
        folder: Made when missing.
        most_bytes: Size beyond which ``trim`` removes entries.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self._most_bytes = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Path | None:
        """Return the folder of an entry, or nothing; counts as a use of it."""
        place = self._place(key)
        if not place.is_dir():
            return None
        os.utime(place)
        return place

    def draft(self) -> Path:
        """Return a new empty folder on the store's file system, to be filled and then kept."""
        return Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{os.getpid()}-", dir=self.folder))

    def keep(self, key: str, draft: Path) -> Path:
        """Make a draft the entry of a key; an entry that is there already wins. Returns the entry's folder."""
        place = self._place(key)
        place.parent.mkdir(exist_ok=True)
        try:
            draft.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(draft)  # another process was faster
        return place

    def read(self, key: str, name: str) -> bytes | None:
        """Return one file of an entry, or nothing."""
        place = self.find(key)
        return (place / name).read_bytes() if place is not None else None

    def write(self, key: str, name: str, content: bytes) -> None:
        """Keep an entry of a single file; it takes the place of one that is there."""
        draft = self.draft()
        (draft / name).write_bytes(content)
        place = self._place(key)
        if place.is_dir():
            (draft / name).replace(place / name)
            shutil.rmtree(draft)
        else:
            self.keep(key, draft)

    def trim(self) -> int:
        """Remove the longest unused entries beyond the limit; return the bytes removed."""
        entries = sorted(self._entries(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        total = removed = 0
        for entry in entries:
            size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            total += size
            if total > self._most_bytes:
                shutil.rmtree(entry)
                removed += size
        return removed

    def sweep(self) -> None:
        """Remove drafts of processes that are gone."""
        sweep(self.folder, _DRAFT)

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _entries(self) -> Iterator[Path]:
        for group in self.folder.iterdir():
            if group.is_dir() and not group.name.startswith("."):
                yield from group.iterdir()
