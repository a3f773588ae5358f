"""The command ``serve``: settings from the command line, one process, one exit code."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from server.app import create_app
from server.errors import SlipstreamError, StartupError
from server.listener import Listener, bind
from server.logs import configure
from server.metrics import Metrics
from server.providers import check_environment
from server.repository import Repository
from server.settings import PREFIX, Settings, read_settings
from server.supervisor import Supervisor, require_linux

logger = logging.getLogger(__name__)

_HELP = {
    "host": "Address to listen on; 0.0.0.0 listens on every interface.",
    "port": "TCP port; 0 picks a free one, which the log names.",
    "workers": "Front-end processes that read and write HTTP for one engine process with the models; with 1, one "
    "process does it all. More than 1 needs Linux.",
    "slab_bytes": "Memory that each front-end process shares with the engine for requests under way, in each "
    "direction; only what is used is taken from the system.",
    "gpu": "Serve on the GPU where it really works, else on the CPU (prefer); refuse to start without it (require); "
    "never look for it (off).",
    "gpu_memory_bytes": "Most memory that each session may take on a GPU, in bytes; 0 sets no limit.",
    "engines": "Build TensorRT engines for the models in service where such a device works, and swap them in (build); "
    "build none (off).",
    "engine_cache": "Folder where engines are kept for the next start.",
    "engine_builder": "Command that builds an engine; empty means slipstream build-engine of this environment.",
    "cpu_instances": "Lanes for the preferred CPU variant of a model; 0 splits the cores as measured.",
    "max_queue_rows": "Rows that may wait per model; more are refused with 429 and Retry-After.",
    "max_queue_delay_s": "Seconds that an idle lane may wait for a fuller batch. 0 runs at once: batches still grow "
    "whenever all lanes are busy.",
    "max_queue_s": "Seconds of predicted work that may wait per model, beside the limit of rows; 0 sets none.",
    "brownout": "Serve the most faithful variant, and the fastest one only under overload.",
    "default_timeout_s": "Deadline of requests that name none, in seconds; 0 means no deadline.",
    "max_body_bytes": "Largest request body, also after decompression; larger ones are refused with 413.",
    "body_timeout_s": "Seconds that the headers of a request may take to come, and its body again; then it is answered "
    "with 408 and the connection is closed.",
    "cache_bytes": "Memory for answers that are kept for requests with the same inputs, in bytes; 0 keeps none.",
    "shutdown_grace_s": "Seconds between SIGTERM, when /v2/health/ready turns 503, and the closing of the socket; in "
    "Kubernetes longer than the endpoints take to follow.",
    "drain_timeout_s": "Seconds that queued and running requests may take after that.",
    "watch_interval_s": "Seconds between two looks at the repository for new versions, which are then loaded and "
    "swapped in; 0 looks only once.",
    "keep_versions": "Versions of each model that serve, the newest ones; requests that name none get the newest.",
    "model_control": "Who may load, unload and roll back models over HTTP: clients of this machine (local), everyone "
    "(on), nobody (off).",
    "shadow_share": "Share of the live requests, 0 to 1, on which a new version is tried and compared before it "
    "serves; 0 compares none.",
    "shadow_s": "Seconds that this comparison lasts.",
    "shadow_max_disagreement": "Mean disagreement, 0 to 1, beyond which the new version is refused; 1 refuses none.",
    "console": "Show browsers a page at / with the models, live figures, evidence and a playground.",
    "otlp_endpoint": "URL that takes traces as OTLP over HTTP, such as http://collector:4318/v1/traces; empty traces "
    "nothing.",
    "trace_share": "Share of the requests without a trace of their own that are traced, 0 to 1; those with a sampled "
    "traceparent always are.",
    "log_format": "Log lines for people (plain) or for machines (json), on stderr.",
    "log_level": "Least level that is logged.",
    "server_name": "Name in GET /v2; some clients insist on triton.",
}
_CHOICES = {
    "gpu": ("prefer", "require", "off"),
    "engines": ("build", "off"),
    "model_control": ("local", "on", "off"),
    "log_format": ("plain", "json"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}


def _setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option for each field of ``Settings`` that has a help text; not given means the environment's value."""
    for field in reversed(msgspec.structs.fields(Settings)):
        if field.name in _HELP:
            choices = _CHOICES.get(field.name)
            option = field.name.replace("_", "-")
            command = click.option(
                # What is on by default is switched off by --no-NAME.
                f"--{option}/--no-{option}" if field.default is True else f"--{option}",
                type=click.Choice(choices, case_sensitive=False) if choices else field.type,
                default=None,
                help=f"{_HELP[field.name]}  [default: {field.default}; {PREFIX}{field.name.upper()}]",
            )(command)
    return command


@click.command()
@click.argument("repository", type=click.Path(path_type=Path), required=False)
@_setting_options
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def serve(repository: Path | None, debug: bool, **options: object) -> None:
    """Serve the models of the folder REPOSITORY over HTTP until SIGTERM or Ctrl+C.

    REPOSITORY holds <name>/<version>/ folders, written by `slipstream optimize`, or with a plain model.onnx in them; by
    default it is the folder models. Every option can also be given as the environment variable in brackets.
    """
    try:
        settings = read_settings({"repository": repository, **options})
    except StartupError as exc:
        raise click.UsageError(str(exc)) from exc
    if not settings.repository.is_dir():
        raise click.UsageError(f"{settings.repository} is not a folder; REPOSITORY must hold <name>/<version>/ folders")
    sys.exit(run(settings, debug=debug))


def run(settings: Settings, *, debug: bool = False) -> int:
    """Serve until told to stop; return the exit code.

    Args:
        settings: What to serve and how.
        debug: Let the exception that ended the process through instead of printing one line.
    """
    try:
        configure(settings.log_format, settings.log_level)
        logger.info("%s, settings: %s", check_environment(), settings)
        with bind(settings.host, settings.port) as listening:
            if settings.workers > 1:
                require_linux()
                Supervisor(settings, listening).serve_forever()
            else:
                metrics = Metrics()
                app = create_app(settings, Repository(settings, metrics), metrics)
                Listener(app, listening).serve_forever()
    except Exception as exc:
        if debug:
            raise
        text = str(exc) if isinstance(exc, SlipstreamError) else f"{type(exc).__name__}: {exc} (see --debug)"
        click.echo(f"Error: {text}", err=True)
        return 1
    return 0
