"""Completion of commands in a shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_asks_the_command_itself(shell: str):
    command = [sys.executable, ROOT / "slipstream.py", "completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"_SLIPSTREAM_COMPLETE={shell}_complete" in done.stdout


def test_what_the_script_asks_is_answered():
    script = Path(sys.executable).parent / "slipstream"
    asked = {**os.environ, "_SLIPSTREAM_COMPLETE": "bash_complete", "COMP_WORDS": "slipstream ser", "COMP_CWORD": "1"}
    done = subprocess.run([script], env=asked, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,serve\n"


def test_unknown_shell_names_the_known_ones():
    command = [sys.executable, ROOT / "slipstream.py", "completion", "tcsh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr
