"""Copy the versions of a model repository that a folder lacks out of object storage.

fetch_models.py URI FOLDER. A version is immutable, so one that is there already is kept; a new one is copied aside and
renamed into place when it is whole. Needs fsspec, and for s3:// s3fs, for gs:// gcsfs, for abfs:// adlfs.
"""

import shutil
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

import fsspec


def fetch(uri: str, folder: Path) -> tuple[int, int]:
    """Copy what is missing.

    Args:
        uri: The repository, NAME/VERSION/... below it, in fsspec's form, such as s3://bucket/models.
        folder: The repository on this machine; made if missing.

    Returns:
        Number of versions copied, and of versions that were there.

    Raises:
        FileNotFoundError: If there is no NAME/VERSION/... below the URI.
    """
    storage, root = fsspec.core.url_to_fs(uri)
    versions: dict[PurePosixPath, list[str]] = defaultdict(list)
    settings: list[tuple[PurePosixPath, str]] = []
    for path in storage.find(root):
        inside = PurePosixPath(path).relative_to(PurePosixPath(root))
        if any(part.startswith(".") for part in inside.parts):
            continue
        if len(inside.parts) > 2:
            versions[PurePosixPath(*inside.parts[:2])].append(path)
        elif len(inside.parts) == 2:
            settings.append((inside, path))
    if not versions:
        raise FileNotFoundError(f"no NAME/VERSION/... below {uri}")
    missing = {version: files for version, files in versions.items() if not (folder / version).exists()}
    incoming = folder / ".incoming"
    # What an interrupted copy left.
    shutil.rmtree(incoming, ignore_errors=True)
    for version, files in missing.items():
        for path in files:
            target = incoming / PurePosixPath(path).relative_to(PurePosixPath(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(path, str(target))
        (folder / version).parent.mkdir(parents=True, exist_ok=True)
        (incoming / version).rename(folder / version)
    # Beside the versions, such as config.pbtxt: these may change.
    for inside, path in settings:
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        storage.get_file(path, str(folder / inside))
    shutil.rmtree(incoming, ignore_errors=True)
    return len(missing), len(versions) - len(missing)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: fetch_models.py URI FOLDER")
    copied, kept = fetch(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(f"{copied} versions copied, {kept} were there\n")
