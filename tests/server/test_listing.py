import os
from pathlib import Path

import pytest

from server.listing import newest, rollback_target, scan, stamp, wanted


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    return folder


def test_scan_tells_complete_from_present_and_ignored(tmp_path: Path):
    for version in ("a/2", "a/10", "b/1"):
        complete(tmp_path / version)
    (tmp_path / "a/11").mkdir()
    (tmp_path / "a/latest").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").touch()
    listing = scan(tmp_path)
    assert {name: list(found) for name, found in listing.models.items()} == {"a": ["2", "10"], "b": ["1"]}
    assert listing.versions("a")["10"] == tmp_path / "a/10"
    assert listing.versions("ghost") == {}
    assert listing.present == {("a", "2"), ("a", "10"), ("a", "11"), ("b", "1")}
    assert listing.ignored == ("a/11", "a/latest", "empty")
    assert listing.unreadable == frozenset()


def test_scan_of_a_folder_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    complete(tmp_path / "a/1")
    complete(tmp_path / "b/1")
    iterdir = Path.iterdir

    def failing(path: Path):
        if path.name == "b":
            raise OSError("stale file handle")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", failing)
    listing = scan(tmp_path)
    assert (list(listing.models), listing.unreadable) == (["a"], {"b"})
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "missing")


def test_stamp_changes_with_any_file(tmp_path: Path):
    folder = complete(tmp_path / "a/1")
    (folder / "fp32").mkdir()
    (folder / "fp32/model.onnx").write_bytes(b"1")
    before = stamp(folder)
    assert stamp(folder) == before
    os.utime(folder / "fp32/model.onnx", ns=(0, 0))
    assert stamp(folder) != before
    assert stamp(tmp_path / "missing") == ()


@pytest.mark.parametrize(
    ("excluded", "keep", "expected"), [((), 1, ["10"]), ((), 2, ["10", "9"]), (("10",), 2, ["9", "2"]), ((), 9, 3)]
)
def test_the_newest_versions_are_wanted(excluded: tuple[str, ...], keep: int, expected: list[str] | int):
    found = wanted(["2", "9", "10"], excluded, keep)
    assert (found if isinstance(expected, list) else len(found)) == expected


def test_newest_of_none():
    assert newest([]) is None
    assert newest(["9", "10"]) == "10"


@pytest.mark.parametrize(
    ("default", "history", "failed", "expected"),
    [
        ("4", ["1", "2"], (), "2"),  # served before
        ("4", ["9"], (), "3"),  # that one is higher: the next lower one
        ("4", [], ("3",), "2"),
        ("4", ["2"], ("2",), "3"),
        ("1", [], (), None),
    ],
)
def test_rollback_target(default: str, history: list[str], failed: tuple[str, ...], expected: str | None):
    assert rollback_target(default, history, ["1", "2", "3", "4"], failed) == expected
