"""The store: whole entries or none, keys of everything that matters, the oldest entries leave first."""

import os
from pathlib import Path

import pytest

from optimizers.store import Store, joint_digest, key_of


def entry(store: Store, key: str, content: bytes = b"content") -> Path:
    draft = store.draft()
    (draft / "file").write_bytes(content)
    return store.keep(key, draft)


def test_what_was_kept_is_found_by_another_store_on_the_same_folder(tmp_path: Path) -> None:
    entry(Store(tmp_path), "abc")
    found = Store(tmp_path).find("abc")
    assert found is not None
    assert (found / "file").read_bytes() == b"content"
    assert Store(tmp_path).read("abc", "file") == b"content"


def test_unknown_key_finds_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path).find("abc") is None
    assert Store(tmp_path).read("abc", "file") is None


def test_draft_is_no_entry_until_it_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    draft = store.draft()
    (draft / "file").write_bytes(b"half")
    assert Store(tmp_path).find("abc") is None
    store.keep("abc", draft)
    assert not draft.exists()


def test_entry_that_is_there_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = entry(store, "abc", b"first")
    assert entry(store, "abc", b"second") == first
    assert store.read("abc", "file") == b"first"
    assert not list(tmp_path.glob(".draft*"))


def test_written_value_replaces_an_older_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("abc", "race.json", b"old")
    store.write("abc", "race.json", b"new")
    assert store.read("abc", "race.json") == b"new"
    assert not list(tmp_path.glob(".draft*"))


def test_trim_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = Store(tmp_path, most_bytes=250)
    for age, key in enumerate(("newest", "middle", "oldest")):
        place = entry(store, key, b"x" * 100)
        os.utime(place, (1e9 - age * 1e6, 1e9 - age * 1e6))
    assert store.trim() == 100
    assert [store.find(key) is not None for key in ("newest", "middle", "oldest")] == [True, True, False]


def test_use_makes_an_entry_young(tmp_path: Path) -> None:
    store = Store(tmp_path, most_bytes=150)
    for key in ("used", "unused"):
        os.utime(entry(store, key, b"x" * 100), (1e9, 1e9))
    store.find("used")
    store.trim()
    assert store.find("used") is not None
    assert store.find("unused") is None


def test_drafts_of_processes_that_are_gone_are_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine = store.draft()
    (tmp_path / ".draft-999999999-abc").mkdir()
    store.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


@pytest.mark.parametrize("other", [("pass", {"a": 2}), ("pass", {"b": 1}), ("race", {"a": 1}), ("pass",)])
def test_key_depends_on_every_part(other: tuple) -> None:
    assert key_of("pass", {"a": 1}) != key_of(*other)


def test_key_does_not_depend_on_order_in_dictionaries() -> None:
    assert key_of({"a": 1, "b": frozenset({"x", "y"})}) == key_of({"b": frozenset({"y", "x"}), "a": 1})


def test_digest_of_a_model_with_external_weights_changes_with_the_weights(tmp_path: Path) -> None:
    model, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    model.write_bytes(b"graph")
    weights.write_bytes(b"one")
    before = joint_digest([model, weights])
    weights.write_bytes(b"two")
    assert joint_digest([model, weights]) != before
    assert joint_digest([model]) != before
