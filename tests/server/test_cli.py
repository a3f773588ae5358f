"""Options and exit codes of ``serve``; the process itself is tested end to end."""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from server import cli
from server.errors import ProviderUnavailable, StartupError
from server.listener import Listener
from server.settings import Settings


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which ``run`` was called, instead of serving."""
    calls: list[Settings] = []

    def run(settings: Settings, *, debug: bool) -> int:
        calls.append(settings)
        return 0

    monkeypatch.setattr(cli, "run", run)
    return calls


def serve(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(cli.serve, [str(argument) for argument in arguments], env=environment)


def test_every_setting_is_an_option_that_shows_its_default_and_variable() -> None:
    text = " ".join(serve("--help").output.split())
    for field in msgspec.structs.fields(Settings):
        if field.name != "repository":
            assert f"--{field.name.replace('_', '-')} " in text
            assert f"[default: {field.default}; SLIPSTREAM_{field.name.upper()}]" in text


def test_options_reach_the_settings(tmp_path: Path, seen: list[Settings]) -> None:
    result = serve(tmp_path, "--port", 0, "--gpu", "off", "--max-queue-delay-s", 0.5, "--server-name", "triton")
    assert result.exit_code == 0, result.output
    assert seen == [Settings(repository=tmp_path, port=0, gpu="off", max_queue_delay_s=0.5, server_name="triton")]


def test_environment_fills_in_what_is_not_given(tmp_path: Path, seen: list[Settings]) -> None:
    variables = {"SLIPSTREAM_REPOSITORY": str(tmp_path), "SLIPSTREAM_PORT": "81", "SLIPSTREAM_HOST": "::1"}
    assert serve("--port", 82, **variables).exit_code == 0
    assert seen == [Settings(repository=tmp_path, port=82, host="::1")]


@pytest.mark.parametrize("variables", [{"SLIPSTREAM_PORT": "http"}, {"SLIPSTREAM_COLOUR": "red"}])
def test_bad_variable_is_wrong_usage(tmp_path: Path, variables: dict[str, str]) -> None:
    result = serve(tmp_path, **variables)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_file_instead_of_a_folder_is_wrong_usage(mlp: Path) -> None:
    result = serve(mlp)
    assert result.exit_code == 2
    assert "is not a folder" in result.output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ProviderUnavailable("no GPU can be used"), "Error: no GPU can be used\n"),
        (OSError("disk on fire"), "Error: OSError: disk on fire (see --debug)\n"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(_: Listener) -> None:
        raise error

    monkeypatch.setattr(Listener, "serve_forever", fail)
    result = serve(tmp_path, "--port", 0, "--log-level", "error")
    assert (result.exit_code, result.stderr) == (1, line)


def test_debug_lets_the_exception_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Listener) -> None:
        raise StartupError("no model")

    monkeypatch.setattr(Listener, "serve_forever", fail)
    result = serve(tmp_path, "--port", 0, "--debug")
    assert isinstance(result.exception, StartupError)
