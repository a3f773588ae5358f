from pathlib import Path

import msgspec
import pytest

from server.errors import StartupError
from server.settings import PREFIX, Settings, read_settings


def test_defaults():
    assert read_settings({}, {}) == Settings()


def test_environment_overrides_defaults_and_arguments_override_it():
    environment = {"SLIPSTREAM_PORT": "9000", "SLIPSTREAM_HOST": "0.0.0.0", "PATH": "/bin"}
    settings = read_settings({"port": 9001, "gpu": None}, environment)
    assert (settings.host, settings.port, settings.gpu) == ("0.0.0.0", 9001, "prefer")


def test_values_of_the_environment_get_their_types():
    environment = {
        "SLIPSTREAM_REPOSITORY": "/models",
        "SLIPSTREAM_CPU_INSTANCES": "3",
        "SLIPSTREAM_MAX_QUEUE_DELAY_S": "0.25",
    }
    settings = read_settings({}, environment)
    assert (settings.repository, settings.cpu_instances, settings.max_queue_delay_s) == (Path("/models"), 3, 0.25)


def test_every_field_has_its_variable():
    values = {field.name: str(getattr(Settings(), field.name)) for field in msgspec.structs.fields(Settings)}
    assert read_settings({}, {PREFIX + name.upper(): value for name, value in values.items()}) == Settings()


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_PORT", "1234")
    assert read_settings({}).port == 1234


def test_unknown_variable_is_an_error_that_lists_the_known_ones():
    with pytest.raises(StartupError, match=r"unknown environment variable SLIPSTREAM_PROT; .*SLIPSTREAM_PORT"):
        read_settings({}, {"SLIPSTREAM_PROT": "1"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "http", "port"),
        ("PORT", "65536", r"port is 65536; allowed: 0 to 65535"),
        ("PORT", "-1", "port is -1"),
        ("GPU", "yes", "gpu is 'yes'; allowed: prefer, require or off"),
        ("LOG_FORMAT", "xml", "log_format is 'xml'"),
        ("CPU_INSTANCES", "-1", "cpu_instances is -1"),
        ("MAX_QUEUE_ROWS", "0", "max_queue_rows is 0; allowed: 1 or more"),
        ("MAX_BODY_BYTES", "0", "max_body_bytes is 0"),
        ("BODY_TIMEOUT_S", "0", "body_timeout_s is 0.0; allowed: more than 0 seconds"),
        ("CACHE_BYTES", "-1", "cache_bytes is -1; allowed: 0 or more"),
        ("MAX_QUEUE_DELAY_S", "-0.1", "max_queue_delay_s is -0.1; allowed: 0 or more seconds"),
        ("DEFAULT_TIMEOUT_S", "-1", "default_timeout_s"),
        ("DEFAULT_TIMEOUT_S", "nan", "default_timeout_s"),
        ("DRAIN_TIMEOUT_S", "-1", "drain_timeout_s"),
        ("SHUTDOWN_GRACE_S", "soon", "shutdown_grace_s"),
        ("KEEP_VERSIONS", "0", "keep_versions is 0; allowed: 1 or more"),
        ("MODEL_CONTROL", "yes", "model_control is 'yes'; allowed: local, on or off"),
        ("WATCH_INTERVAL_S", "-1", "watch_interval_s is -1"),
        ("SHADOW_S", "-1", "shadow_s is -1"),
        ("SHADOW_SHARE", "1.5", "shadow_share is 1.5; allowed: 0 to 1"),
        ("SHADOW_MAX_DISAGREEMENT", "-0.1", "shadow_max_disagreement is -0.1"),
    ],
)
def test_wrong_value_names_the_setting_and_what_is_allowed(name: str, value: str, message: str):
    with pytest.raises(StartupError, match=rf"invalid settings: .*{message}"):
        read_settings({}, {PREFIX + name: value})


def test_wrong_type_of_an_argument_is_an_error():
    with pytest.raises(StartupError, match="invalid settings"):
        read_settings({"port": [1]}, {})
