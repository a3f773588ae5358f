"""Files and features of the file type model."""

from pathlib import Path

import numpy as np

from deploy.quickstart.magika import choose, featurize, read_ends, walk


def test_features_are_both_ends_with_padding_between() -> None:
    features = featurize(b" \n abc", b"abc \t")
    assert features.shape == (2048,)
    assert features.dtype == np.int32
    assert features[:3].tolist() == features[-3:].tolist() == list(b"abc")
    assert set(features[3:-3].tolist()) == {256}


def test_features_of_a_long_file_are_full() -> None:
    features = featurize(bytes(range(256)) * 16, b"x" * 4095 + b"y")
    assert 256 not in features
    assert features[-1] == ord("y")
    assert features[0] == 0


def test_white_space_is_cut_before_the_length(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    path.write_bytes(b" " * 1000 + b"a" * 5000 + b"b" * 1000 + b"\n" * 500)
    features = featurize(*read_ends(path))
    assert set(features[:1024].tolist()) == {ord("a")}
    assert features[-1000:].tolist() == [ord("b")] * 1000
    assert features[1024:1048].tolist() == [ord("a")] * 24


def test_ends_of_a_short_file_overlap(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"short")
    assert read_ends(tmp_path / "f") == (b"short", b"short")


def test_walk_is_ordered_and_leaves_out_links_and_compiled_python(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "z/c.txt", "__pycache__/d.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "none")
    assert [str(path.relative_to(tmp_path)) for path in walk([tmp_path])] == ["a.txt", "b.txt", "z/c.txt"]


def save_files(folder: Path, counts: dict[str, int]) -> list[Path]:
    paths = [folder / f"{i:03}{suffix}" for suffix, count in counts.items() for i in range(count)]
    for path in paths:
        path.write_text("some content")
    return paths


def test_choice_takes_every_extension_in_turn(tmp_path: Path) -> None:
    paths = save_files(tmp_path, {".py": 50, ".txt": 20, ".rare": 2})
    chosen = choose(paths, 12)
    assert [sum(path.suffix == suffix for path in chosen) for suffix in (".py", ".txt", ".rare")] == [5, 5, 2]
    assert len(set(chosen)) == 12
    assert choose(paths, 12) == chosen


def test_choice_is_spread_over_the_files(tmp_path: Path) -> None:
    chosen = choose(save_files(tmp_path, {".py": 50}), 5)
    assert [path.name for path in chosen] == ["000.py", "010.py", "020.py", "030.py", "040.py"]


def test_choice_leaves_out_rare_extensions_tiny_files_and_bare_names(tmp_path: Path) -> None:
    paths = save_files(tmp_path, {".py": 5, ".txt": 4, ".rare": 1, "": 3})
    (tmp_path / "000.py").write_text("tiny")
    chosen = choose(paths, 100, extensions=2)
    assert sorted(path.suffix for path in chosen) == [".py"] * 4 + [".txt"] * 4
