"""The script that makes the virtual environment: what it says when something is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that the script needs, in a folder of their own."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "setup_venv.sh", tmp_path / "deploy")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "slipstream-server"\nversion = "0"\n')
    (tmp_path / "constraints.txt").write_text("")
    return tmp_path


def save_python(folder: Path, name: str, *, version: str, is_new: bool, has_venv: bool = True) -> Path:
    """A stand-in for an interpreter of some machine."""
    path = folder / name
    path.write_text(
        f"""#!/bin/sh
case "$*" in
    *print*) echo {version} ;;
    *ensurepip*) exit {0 if has_venv else 1} ;;
    *version_info*) exit {0 if is_new else 1} ;;
    *) echo "asked to run $*" >&2; exit 3 ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def set_up(project: Path, purpose: str, *pythons: Path | str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": " ".join(map(str, pythons)), "PIP_NO_INDEX": "1"}
    command = [str(project / "deploy" / "setup_venv.sh"), purpose]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_missing_python_names_the_packages_to_install(project: Path) -> None:
    outcome = set_up(project, "run", "no-such-python")
    assert outcome.returncode == 1
    assert "needs Python 3.11 or newer with venv. There is no Python here" in outcome.stderr
    assert "apt-get install python3 python3-venv" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_old_python_and_missing_venv_are_named(project: Path) -> None:
    old = save_python(project, "old", version="3.9", is_new=False)
    bare = save_python(project, "bare", version="3.12", is_new=True, has_venv=False)
    outcome = set_up(project, "run", old, bare)
    assert outcome.returncode == 1
    assert f"{old} is 3.9; {bare} is 3.12 without the module venv or ensurepip;" in outcome.stderr
    assert not (project / ".venv").exists()


def test_command_that_does_not_run_is_passed_over(project: Path) -> None:
    broken = project / "broken"
    broken.write_text("#!/bin/sh\necho not installed >&2\nexit 127\n")
    broken.chmod(0o755)
    good = save_python(project, "good", version="3.12", is_new=True)
    outcome = set_up(project, "run", broken, good)
    assert f"making .venv with {good}" in outcome.stdout
    assert f"{good} could not make a virtual environment" in outcome.stderr


def test_unknown_purpose_is_wrong_usage(project: Path) -> None:
    outcome = set_up(project, "deploy", sys.executable)
    assert outcome.returncode == 2
    assert "run|test" in outcome.stderr


def test_unreachable_index_is_told_and_tried_again_next_time(project: Path) -> None:
    for _ in range(2):
        outcome = set_up(project, "run", sys.executable)
        assert outcome.returncode == 1
        assert "installing slipstream-server[cpu,optimize,quickstart]" in outcome.stdout
        assert "check the network and pip's settings" in outcome.stderr
    assert not list((project / ".venv").glob("installed-*"))


def test_nothing_happens_when_all_is_installed(project: Path) -> None:
    set_up(project, "run", sys.executable)
    key = subprocess.run(
        "(pwd; cat pyproject.toml constraints.txt deploy/setup_venv.sh) | cksum",
        shell=True,
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (project / ".venv" / "installed-test").write_text(key)
    # What tests need holds what running needs.
    for purpose in ("test", "run"):
        outcome = set_up(project, purpose, "no-such-python")
        assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    (project / "constraints.txt").write_text("click==8.5.1\n")
    assert "installing" in set_up(project, "run", sys.executable).stdout
