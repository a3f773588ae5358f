"""Traces of a real server, received by a collector that reads the real protocol."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.artifacts import write_artifact
from tests.end_to_end.process import Server

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"inputs": [{"name": "x", "shape": [2, 64], "datatype": "FP32", "data": [0.5] * 128}]}
PATIENCE_S = 20


class Collector:
    """Receives OTLP over HTTP.

    Attributes:
        services: Names of the services that sent spans.
    """

    def __init__(self) -> None:
        self._spans: Queue[Span] = Queue()
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                collector.take(ExportTraceServiceRequest.FromString(raw))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, message: ExportTraceServiceRequest) -> None:
        for resource in message.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._spans.put(span)

    def spans(self, count: int) -> dict[str, Span]:
        """Wait for so many spans; return them by name."""
        found = [self._spans.get(timeout=PATIENCE_S) for _ in range(count)]
        return {span.name: span for span in found}

    def is_empty(self) -> bool:
        try:
            self._spans.get_nowait()
        except Empty:
            return True
        return False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers send spans every tenth of a second, not every five seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path, mlp: Path) -> Path:
    write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp})
    return tmp_path / "models"


def asked(server: Server, path: str = "/v2/models/mlp/infer", flags: str | None = "01", body: object = BODY) -> int:
    headers = {} if flags is None else {"traceparent": f"00-{TRACE}-{CALLER}-{flags}"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=PATIENCE_S).status_code


def attributes_of(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sampled_request_becomes_spans_under_its_callers_trace(collector: Collector, folder: Path, workers: str):
    with Server(folder, "--otlp-endpoint", collector.url, "--trace-share", "0", "--workers", workers) as server:
        assert asked(server) == 200
        spans = collector.spans(6)
    root = spans.pop("POST /v2/models/{name}/infer")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, CALLER)
    assert root.kind == Span.SPAN_KIND_SERVER
    seen = attributes_of(root)
    assert seen == {
        "slipstream.model": "mlp",
        "slipstream.version": "1",
        "slipstream.variant": "fp32",
        "slipstream.device": "cpu",
        "slipstream.batch_rows": 2,
        "slipstream.code": "ok",
    }
    order = [spans[name] for name in ("decode", "queue", "assemble", "compute", "encode")]
    assert len(spans) == 5
    for span, after in zip(order, [*order[1:], None], strict=True):
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
        assert after is None or span.end_time_unix_nano == after.start_time_unix_nano
    assert collector.services == {"slipstream"}


def test_errors_are_traced_with_their_code(collector: Collector, folder: Path):
    with Server(folder, "--otlp-endpoint", collector.url, "--trace-share", "0") as server:
        assert asked(server, body={"inputs": []}) == 400
        (wrong,) = collector.spans(1).values()
        assert asked(server, "/v2/models/none/infer") == 404
        (unknown,) = collector.spans(1).values()
    assert attributes_of(wrong)["slipstream.code"] == "signature_mismatch"
    assert wrong.status.code == 2
    assert attributes_of(unknown) == {
        "slipstream.model": "none",
        "slipstream.version": "",
        "slipstream.code": "unknown_model",
    }


def test_share_counts_for_requests_without_a_trace_only(collector: Collector, folder: Path):
    with Server(folder, "--otlp-endpoint", collector.url, "--trace-share", "1") as server:
        assert asked(server, flags="00") == 200, "its caller does not want it"
        assert asked(server, flags=None) == 200
        server.terminate()
        assert server.wait() == 0
    spans = collector.spans(6)  # sent before the server had ended
    root = spans["POST /v2/models/{name}/infer"]
    assert root.parent_span_id == b""
    assert root.trace_id.hex() != TRACE
    assert collector.is_empty()


def test_collector_that_is_gone_harms_nobody(collector: Collector, folder: Path):
    collector.close()
    with Server(folder, "--otlp-endpoint", collector.url, "--trace-share", "1") as server:
        for _ in range(20):
            assert asked(server) == 200
        server.terminate()
        assert server.wait() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_latency_buckets_name_a_trace_where_openmetrics_is_asked_for(collector: Collector, folder: Path, workers: str):
    with Server(folder, "--otlp-endpoint", collector.url, "--trace-share", "0", "--workers", workers) as server:
        assert asked(server) == 200
        assert asked(server, flags=None) == 200
        server.wait_for_metric(2, "slipstream_request_seconds_count", model="mlp")
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        answer = httpx.get(f"{server.url}/metrics", headers={"Accept": accept}, timeout=PATIENCE_S)
        plain = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    seen = [sample.exemplar for sample in families["slipstream_request_seconds"].samples if sample.exemplar]
    assert [exemplar.labels for exemplar in seen] == [{"trace_id": TRACE}]
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert TRACE not in plain.text
