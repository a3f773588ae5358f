"""Which requests are traced, and what is said where OpenTelemetry is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from server import tracing
from server.errors import StartupError
from server.settings import Settings
from server.tracing import Tracer, tracer_of

ROOT = Path(__file__).parents[2]
ENDPOINT = "http://127.0.0.1:9/v1/traces"
TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"


@pytest.fixture
def tracer() -> Tracer:
    """Traces half of the requests that come without a trace: every other one."""
    numbers = iter([0.2, 0.9] * 100)
    return Tracer(ENDPOINT, 0.5, "slipstream", lambda: next(numbers))


@pytest.mark.parametrize(
    ("header", "is_traced"),
    [
        (b"00-%s-%s-01" % (TRACE, SPAN), True),
        (b"00-%s-%s-03" % (TRACE, SPAN), True),
        (b"00-%s-%s-00" % (TRACE, SPAN), False),
        (b"00-%s-%s-01" % (b"0" * 32, SPAN), False),
        (b"00-%s-%s-01" % (TRACE, b"0" * 16), False),
    ],
)
def test_caller_decides(tracer: Tracer, header: bytes, is_traced: bool):
    for _ in range(3):
        assert (tracer.begin({b"traceparent": header}) is not None) == is_traced


@pytest.mark.parametrize(
    "header", [b"", b"garbage", b"00-%s-%s" % (TRACE, SPAN), b"00-%s-%s-01" % (TRACE.upper(), SPAN)]
)
def test_without_a_valid_trace_the_share_decides(tracer: Tracer, header: bytes):
    headers = {b"traceparent": header} if header else {}
    assert [tracer.begin(headers) is not None for _ in range(6)] == [True, False] * 3


def test_sdk_and_exporter_are_not_even_imported_without_an_endpoint():  # FastAPI imports the interface
    heavy = ("opentelemetry.sdk", "opentelemetry.exporter")
    code = f"import sys, server.cli; print([name for name in sys.modules if name.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "_MISSING", "No module named 'opentelemetry'")
    told = r"No module named 'opentelemetry'.*pip install 'slipstream-server\[otel\]'"
    with pytest.raises(StartupError, match=told):
        tracer_of(Settings(otlp_endpoint=ENDPOINT))
