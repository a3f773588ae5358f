"""Every setting of the server in one frozen value; the only reader of the environment."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from server.errors import StartupError

PREFIX = "SLIPSTREAM_"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the server was told.

    Attributes:
        repository: Folder of models.
        host: Address to listen on.
        port: TCP port; 0 picks a free one.
        workers: Front-end processes that read and write HTTP for one engine process; with 1, one process does it all.
        slab_bytes: Memory that each front end, and the engine for it, shares for requests under way; with workers.
        gpu: ``prefer`` serves on the GPU where it really works and on the CPU otherwise, and says so; ``require``
            refuses to become ready without it; ``off`` never looks.
        gpu_memory_bytes: Most memory that each session may take on a GPU; 0 sets no limit.
        engines: ``build`` builds TensorRT engines for the models in service where such a device works, and swaps them
            in; ``off`` builds none.
        engine_cache: Folder where engines are kept for the next start.
        engine_builder: Command that builds one; empty means ``slipstream build-engine`` of this environment.
        cpu_instances: Lanes of the preferred CPU variant; 0 splits the usable cores as measured, see
            ``server.split``.
        max_queue_rows: Rows that may wait per model before requests are refused with 429.
        max_queue_delay_s: Seconds that an idle lane may wait for a fuller batch; 0 dispatches at once.
        max_queue_s: Seconds of predicted work that may wait per model before requests are refused with 429; 0 sets no
            such limit.
        brownout: Serve the variant that agrees best with the original, and the fastest one only under overload.
        default_timeout_s: Deadline of requests that name none; 0 means no deadline.
        max_body_bytes: Largest request body, also after decompression.
        body_timeout_s: Seconds that the headers of a request may take to come, and its body again.
        cache_bytes: Memory for answers that are kept for requests with the same inputs; 0 keeps none.
        shutdown_grace_s: Seconds between the moment ``ready`` turns 503 and the moment the listening socket closes.
        drain_timeout_s: Seconds that queued work may take after that.
        watch_interval_s: Seconds between two looks at the repository folder for new versions; 0 never looks again.
        keep_versions: Versions of a model that serve, the newest ones.
        model_control: Who may load, unload and roll back models: ``local`` is clients of this machine, ``on`` is
            everyone, ``off`` is nobody.
        shadow_share: Share of the live requests that a new version is tried on before it serves, 0 to 1.
        shadow_s: Seconds that this lasts.
        shadow_max_disagreement: Mean disagreement beyond which the new version is refused, 0 to 1; 1 refuses none.
        console: Whether browsers get a page at ``/``.
        otlp_endpoint: URL that takes traces, OTLP over HTTP; empty traces nothing.
        trace_share: Share of the requests without a trace of their own that are traced, 0 to 1.
        log_format: ``plain`` or ``json``.
        log_level: Name of a logging level.
        server_name: Reported by ``GET /v2``; set it to ``triton`` for clients that insist.
    """

    repository: Path = Path("models")
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    slab_bytes: int = 64 * 1024 * 1024
    gpu: str = "prefer"
    gpu_memory_bytes: int = 0
    engines: str = "build"
    engine_cache: Path = Path(".slipstream") / "engines"
    engine_builder: str = ""
    cpu_instances: int = 0
    max_queue_rows: int = 1024
    max_queue_delay_s: float = 0.0
    max_queue_s: float = 30.0
    brownout: bool = False
    default_timeout_s: float = 0.0
    max_body_bytes: int = 64 * 1024 * 1024
    body_timeout_s: float = 60.0
    cache_bytes: int = 0
    shutdown_grace_s: float = 0.5
    drain_timeout_s: float = 30.0
    watch_interval_s: float = 5.0
    keep_versions: int = 1
    model_control: str = "local"
    shadow_share: float = 0.0
    shadow_s: float = 60.0
    shadow_max_disagreement: float = 1.0
    console: bool = True
    otlp_endpoint: str = ""
    trace_share: float = 0.01
    log_format: str = "plain"
    log_level: str = "INFO"
    server_name: str = "slipstream"

    def __post_init__(self) -> None:
        _require(self.gpu in ("prefer", "require", "off"), "gpu", self.gpu, "prefer, require or off")
        _require(self.gpu_memory_bytes >= 0, "gpu_memory_bytes", self.gpu_memory_bytes, "0 or more")
        _require(self.engines in ("build", "off"), "engines", self.engines, "build or off")
        _require(self.log_format in ("plain", "json"), "log_format", self.log_format, "plain or json")
        _require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        _require(0 < self.workers <= 256, "workers", self.workers, "1 to 256")
        _require(self.slab_bytes >= 64 * 1024, "slab_bytes", self.slab_bytes, "65536 or more")
        _require(self.cpu_instances >= 0, "cpu_instances", self.cpu_instances, "0 or more")
        _require(self.max_queue_rows > 0, "max_queue_rows", self.max_queue_rows, "1 or more")
        _require(self.max_body_bytes > 0, "max_body_bytes", self.max_body_bytes, "1 or more")
        _require(self.body_timeout_s > 0, "body_timeout_s", self.body_timeout_s, "more than 0 seconds")
        _require(self.cache_bytes >= 0, "cache_bytes", self.cache_bytes, "0 or more")
        _require(self.keep_versions > 0, "keep_versions", self.keep_versions, "1 or more")
        _require(self.model_control in ("local", "on", "off"), "model_control", self.model_control, "local, on or off")
        for name in ("shadow_share", "shadow_max_disagreement", "trace_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        for name in (
            "max_queue_delay_s",
            "max_queue_s",
            "default_timeout_s",
            "shutdown_grace_s",
            "drain_timeout_s",
            "watch_interval_s",
            "shadow_s",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more seconds")


def read_settings(overrides: Mapping[str, object], environment: Mapping[str, str] | None = None) -> Settings:
    """Join defaults, ``SLIPSTREAM_*`` variables and command-line overrides, the later ones winning.

    Args:
        overrides: Field -> value; a value of ``None`` means not given.
        environment: Variables to read; the process environment by default.

    Raises:
        StartupError: If a variable is unknown, or if a value is of the wrong type or out of its range.
    """
    environment = os.environ if environment is None else environment
    fields = {field.name for field in msgspec.structs.fields(Settings)}
    given: dict[str, object] = {}
    for key, value in environment.items():
        if key.startswith(PREFIX):
            field = key.removeprefix(PREFIX).lower()
            if field not in fields:
                known = sorted(PREFIX + name.upper() for name in fields)
                raise StartupError(f"unknown environment variable {key}; known are {', '.join(known)}")
            given[field] = value
    given.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return msgspec.convert(given, Settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as exc:
        raise StartupError(f"invalid settings: {exc}") from exc


def settings_to_text(settings: Settings) -> str:
    """Write settings for another process of the server."""
    return msgspec.json.encode(settings, enc_hook=str).decode()


def settings_from_text(text: str) -> Settings:
    """Read what ``settings_to_text`` wrote."""
    return msgspec.json.decode(text, type=Settings, dec_hook=_decode)


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise NotImplementedError(kind)


def _require(holds: bool, name: str, seen: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {seen!r}; allowed: {allowed}")
