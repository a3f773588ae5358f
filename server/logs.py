"""Logging to stderr, as plain lines or as one JSON object a line.

Nothing here happens at import; ``configure`` is called once by the command line.
"""

import json
import logging
import time
from typing import Final

from server.errors import StartupError

# They bring handlers of their own; taken away, their lines travel to the root logger and look like all others.
_FOREIGN: Final = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "fastapi")
_HANDLER: Final = "slipstream"


def configure(log_format: str, level: str) -> None:
    """Send every log line of the process to stderr in one form; a second call replaces the first.

    uvicorn configures its own loggers when it starts: run it with ``log_config=None``, or it undoes this.

    Args:
        log_format: ``plain``: time (UTC), level, logger and message on a line; ``json``: the same as an object.
        level: Name of a logging level, in any case.

    Raises:
        StartupError: If there is no such format or level.
    """
    if log_format not in ("plain", "json"):
        raise StartupError(f"log format is {log_format!r}; allowed: plain or json")
    if level.upper() not in logging.getLevelNamesMapping():
        raise StartupError(f"log level is {level!r}; allowed: {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler()
    handler.name = _HANDLER
    handler.setFormatter(JsonFormatter() if log_format == "json" else PlainFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.name == _HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _FOREIGN:
        foreign = logging.getLogger(name)
        foreign.handlers.clear()
        foreign.propagate = True


class PlainFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO server.model: message``, and a traceback on the lines below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        """Return the line of one record; line breaks in the message are escaped, so that nobody can forge a line."""
        message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return f"{_iso_time(record.created)} {record.levelname:<7} {record.name}: {message}"


class JsonFormatter(logging.Formatter):
    """An object a line: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, and ``exception`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object of one record."""
        line = {
            "time": _iso_time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # The standard library's encoder: it alone takes every string, also one with lone surrogates.
        return json.dumps(line)


def _iso_time(seconds: float) -> str:
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1e3):03d}Z"
