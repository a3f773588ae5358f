import json
import logging
import logging.config
import re
import time
from collections.abc import Iterator

import pytest
from uvicorn.config import LOGGING_CONFIG

from server.errors import StartupError
from server.logs import JsonFormatter, PlainFormatter, configure

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_plain_lines_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    configure("plain", "INFO")
    logging.getLogger("server.model").info("loaded %s", "m")
    assert re.fullmatch(TIME + r" INFO    server\.model: loaded m\n", capsys.readouterr().err)


def test_json_lines_are_objects(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "INFO")
    logging.getLogger("server.model").warning("two\nlines %s", "\ud800")
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "WARNING", "logger": "server.model", "message": "two\nlines \ud800"}


def test_times_are_utc_wherever_the_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.makeLogRecord({"created": 1.5})
    try:
        monkeypatch.setenv("TZ", "XXX+5")
        time.tzset()
        assert PlainFormatter().format(record).startswith("1970-01-01T00:00:01.500Z")
        assert json.loads(JsonFormatter().format(record))["time"] == "1970-01-01T00:00:01.500Z"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_an_exception_is_told_in_full(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure(log_format, "INFO")
    try:
        raise ValueError("seen 5")
    except ValueError:
        logging.getLogger("server.app").exception("failed")
    text = capsys.readouterr().err
    told = json.loads(text)["exception"] if log_format == "json" else text
    assert told.startswith("Traceback") or "failed\nTraceback" in told
    assert "ValueError: seen 5" in told
    assert log_format == "plain" or text.count("\n") == 1


def test_a_line_break_in_a_message_does_not_start_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("plain", "INFO")
    logging.getLogger("server.app").info("%s", "a\r\nforged")
    assert capsys.readouterr().err.endswith("a\\r\\nforged\n")


def test_the_lines_of_uvicorn_have_the_same_form_and_appear_once(capsys: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(LOGGING_CONFIG)
    configure("plain", "INFO")
    logging.getLogger("uvicorn.error").info("Started")
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/v2", "1.1", 200)
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.endswith(" INFO    uvicorn.error: Started")
    assert second.endswith(' INFO    uvicorn.access: 1.2.3.4:5 - "GET /v2 HTTP/1.1" 200')
    assert captured.out == ""


def test_configuring_again_replaces_form_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure("plain", "DEBUG")
    configure("json", "warning")
    logging.getLogger("server").info("hidden")
    logging.getLogger("server").warning("shown")
    assert json.loads(capsys.readouterr().err)["message"] == "shown"


@pytest.mark.parametrize(("log_format", "level"), [("yaml", "INFO"), ("plain", "LOUD")])
def test_unknown_formats_and_levels_are_refused(log_format: str, level: str) -> None:
    with pytest.raises(StartupError, match="allowed"):
        configure(log_format, level)
