"""The front door: joins the commands of the two packages, which know nothing of each other.

``serve`` is the server's command, to which this module adds what needs both: a model file in place of a repository is
optimized first.
"""

import hashlib
import importlib
import inspect
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import click

# Command -> (module, one-line help). Modules load when their command is used: ``serve`` needs no optimizer, and an
# environment that only serves has none.
_COMMANDS = {
    "optimize": ("optimizers.cli", "Optimize an ONNX model and prove every variant on this host."),
    "serve": ("server.cli", "Serve a repository, or one model file, over HTTP."),
    "inspect": ("optimizers.cli", "Show what is in an artifact: variants, evidence, verdicts."),
    "verify": ("optimizers.cli", "Prove an artifact again on this host."),
    "build-engine": ("optimizers.engine_cli", "Build a TensorRT engine of an ONNX model."),
    "bench": ("loadtests.bench", "Measure a server: throughput and latency of one model."),
    "plan": ("server.planning", "Say how many replicas a load needs, from an artifact's latency tables."),
    "doctor": ("server.doctor", "Look at this machine as the server would, and say what to mend."),
    "completion": ("server.completion", "Print a script that completes commands in a shell."),
}
_CACHE = Path(".slipstream") / "models"


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  (click's)
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(_load(_COMMANDS[cmd_name][0], cmd_name), cmd_name.replace("-", "_"))
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is not a click command")
        return _with_model_file(command) if cmd_name == "serve" else command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  (click's)
        # Without this, --help would import both packages for one line of each command.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _load(module: str, command: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        missing = exc.name or ""
        if module.startswith("server") or missing.startswith("optimizers."):
            raise
        raise click.ClickException(
            f"{command} needs the package {missing}, run: pip install 'slipstream-server[optimize]'"
        ) from exc


def _with_model_file(serve: click.Command) -> click.Command:
    """Let ``serve`` take a model file, too: optimize it into a cache, then serve that."""
    calibration = click.Option(
        ["--calibration"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="DATA.npz with samples, for a MODEL.onnx; without it only exact variants are made.",
    )

    @click.pass_context
    def callback(context: click.Context, /, repository: Path | None, calibration: Path | None, **options: Any) -> Any:
        if repository is not None and repository.is_file():
            repository = _optimized(repository, calibration)
        elif calibration is not None:
            raise click.UsageError("--calibration goes with a model file, not with a repository")
        return context.invoke(serve, repository=repository, **options)

    text = inspect.cleandoc(serve.help or "")
    text += "\n\nREPOSITORY may also be a MODEL.onnx: it is optimized, once, and then served."
    return click.Command("serve", params=[*serve.params, calibration], callback=callback, help=text)


def _optimized(model: Path, calibration: Path | None) -> Path:
    """Optimize a model into a repository of its own and return that; a second call finds what the first one made.

    In a child process, so that the optimizer's packages take no memory from the server. The repository is keyed by
    content: a changed file never meets the versions of its former self.
    """
    files = [model] if calibration is None else [model, calibration]
    key = hashlib.sha256("".join(_digest_of(file) for file in files).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", model.stem)
    repository = _CACHE / f"{name}-{key}"
    command = [sys.executable, __file__, "optimize", str(model), "--repository", str(repository), "--name", name]
    if calibration is not None:
        command += ["--calibration", str(calibration)]
    # So that a stop ends the child, too: ``call`` kills it when an exception passes.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = subprocess.call(command, stdout=2)  # this command's stdout is not the place for a report
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise click.exceptions.Exit(code)
    return repository


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version() -> str:
    try:
        return version("slipstream-server")
    except PackageNotFoundError:
        return "unknown"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="slipstream")
def main() -> None:
    """Slipstream: optimize an ONNX model, prove it on this host, serve it with batching."""


if __name__ == "__main__":
    main()
