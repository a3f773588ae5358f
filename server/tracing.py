"""Traces of infer requests for OpenTelemetry: what a request waited for, as spans under the caller's own trace.

::

    POST /v2/models/NAME/infer      from the first byte that was handled to the answer
    ├── decode                      body to arrays, admission
    ├── queue                       until its batch began
    ├── assemble                    arrays of its batch put together
    ├── compute                     batch run, split
    └── encode                      answer to bytes

Spans are made once the answer is there, of times that are taken anyway, so a request that is not traced pays one
comparison. One that comes with a sampled ``traceparent`` is traced; of those without one, the share that the settings
name. Spans leave in batches, from a thread of their own.

Source: W3C Trace Context; OpenTelemetry's specification of OTLP over HTTP.
"""

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from server.errors import StartupError
from server.settings import Settings
from server.tensors import InferResponse

_MISSING = ""
try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
except ImportError as exc:  # an extra; only whoever sets an endpoint needs it
    _MISSING = str(exc)

_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1
_BATCH = 64  # spans encoded at a go: more would hold the interpreter for long
_TIMEOUT_S = 3.0


class Tracer:
    """Makes and exports spans.

    Args:
        endpoint: URL that takes OTLP over HTTP, e.g. ``http://collector:4318/v1/traces``.
        share: Of the requests without a trace of their own, 0 to 1.
        service: Name of the service in the traces.
        pick: Returns a number from 0 to 1 for each such request.
    """

    def __init__(self, endpoint: str, share: float, service: str, pick: Callable[[], float] = random.random) -> None:
        if _MISSING:
            raise StartupError(
                f"traces need OpenTelemetry ({_MISSING}); run: pip install 'slipstream-server[otel]', or set no "
                "otlp_endpoint"
            )
        self._share, self._pick = share, pick
        resource = Resource.create({"service.name": service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # ``close`` does that
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_export_batch_size=_BATCH))
        self.otel = self._provider.get_tracer("slipstream")

    def begin(self, headers: Mapping[bytes, bytes]) -> "Trace | None":
        """Begin to trace a request that has just arrived; ``None`` if it is not to be traced."""
        parent = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        if parent is None:
            return Trace(self, None) if self._pick() < self._share else None
        trace_id, span_id, flags = (int(part, 16) for part in parent.groups())
        if not flags & _SAMPLED or not trace_id or not span_id:
            return None
        context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        return Trace(self, trace.set_span_in_context(NonRecordingSpan(context)))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.shutdown()


class Trace:
    """One request that is traced, from its arrival on.

    Attributes:
        id: Of the trace in hexadecimal, once it has ended.
        ran_s: When its run had ended.
    """

    __slots__ = ("_parent", "_started_ns", "_started_s", "_tracer", "id", "ran_s")

    def __init__(self, tracer: Tracer, parent: Any) -> None:
        self._tracer, self._parent = tracer, parent
        self._started_s, self._started_ns = time.perf_counter(), time.time_ns()
        self.id, self.ran_s = "", 0.0

    def ran(self) -> None:
        """Note that the run has just ended."""
        self.ran_s = time.perf_counter()

    def end(self, model: str, version: str, code: str, response: InferResponse | None = None) -> None:
        """Note the answer, and hand the spans over.

        Args:
            model: Its name.
            version: Its version.
            code: ``ok``, ``cancelled``, or an error's code.
            response: Of a request that was answered.
        """
        otel, ended_s = self._tracer.otel, time.perf_counter()
        attributes: dict[str, str | int] = {"slipstream.model": model, "slipstream.version": version}
        if response is not None:
            attributes |= {
                "slipstream.variant": response.variant,
                "slipstream.device": response.device,
                "slipstream.batch_rows": response.batch_rows,
            }
        root = otel.start_span(
            "POST /v2/models/{name}/infer",
            context=self._parent,
            kind=SpanKind.SERVER,
            attributes={**attributes, "slipstream.code": code},
            start_time=self._started_ns,
        )
        self.id = f"{root.get_span_context().trace_id:032x}"
        if response is not None and self.ran_s:
            began_s = self.ran_s - response.compute_s
            waited_s = max(began_s - response.queue_s, self._started_s)
            inside = trace.set_span_in_context(root)
            for name, start_s, end_s in (
                ("decode", self._started_s, waited_s),
                ("queue", waited_s, began_s),
                ("assemble", began_s, began_s + response.assemble_s),
                ("compute", began_s + response.assemble_s, self.ran_s),
                ("encode", self.ran_s, ended_s),
            ):
                otel.start_span(name, context=inside, start_time=self._at(start_s)).end(self._at(end_s))
        if code != "ok":
            root.set_status(Status(StatusCode.ERROR, code))
        root.end(self._at(ended_s))

    def _at(self, seconds: float) -> int:
        """Return a moment of the performance counter as nanoseconds since 1970."""
        return self._started_ns + round((seconds - self._started_s) * 1e9)


def tracer_of(settings: Settings) -> Tracer:
    """Return a tracer for the endpoint of the settings.

    Raises:
        StartupError: If OpenTelemetry is not installed.
    """
    return Tracer(settings.otlp_endpoint, settings.trace_share, settings.server_name)
