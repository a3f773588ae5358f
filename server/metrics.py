"""Every metric, its labels and its buckets on one screen.

Labels are only ``model``, ``version``, ``variant``, ``device``, ``code``, ``state`` of versions, ``reason`` of a
missing GPU, ``result`` of swaps, of engine builds, of shadowed requests and of the response cache.
``code`` is ``ok`` or the code of an error in ``server.errors``, so every refusal is counted by its reason.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

from server.tallies import Tallies, Tally

# 100 us to 26 s, each bucket twice the one before.
SECONDS = tuple(1e-4 * 2**power for power in range(19))
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

_MODEL = ("model", "version")
_LANE = (*_MODEL, "variant", "device")


class Metrics:
    """The process's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "slipstream_requests", "Finished requests by result.", (*_MODEL, "code"), registry=registry
        )
        self.request_seconds = Tallies("slipstream_request_seconds", "Arrival to answer.", _MODEL, SECONDS, registry)
        self.queue_seconds = Tallies("slipstream_queue_seconds", "Admission to dispatch.", _MODEL, SECONDS, registry)
        self.queue_rows = Gauge("slipstream_queue_rows", "Rows that wait now.", _MODEL, registry=registry)
        self.model_ready = Gauge("slipstream_model_ready", "1 while the model serves.", _MODEL, registry=registry)
        self.model_versions = Gauge(
            "slipstream_model_versions",
            "Versions by state: ready, loading, shadowed, draining, failed, rolled_back, unloaded.",
            ("model", "state"),
            registry=registry,
        )
        self.model_swaps = Counter(
            "slipstream_model_swaps",
            "Ends of new versions: swapped, failed (to open), refused (by the comparison), rolled_back.",
            ("model", "result"),
            registry=registry,
        )
        self.gpu_fallback = Gauge(
            "slipstream_gpu_fallback",
            "1 where a GPU is preferred and the CPU serves, by reason: cpu_build, no_driver, old_driver, no_device, "
            "missing_library, failed.",
            ("reason",),
            registry=registry,
        )
        self.engine_builds = Counter(
            "slipstream_engine_builds",
            "Engines built for models in service: served, slower (than what serves), failed, late (the model left).",
            ("model", "result"),
            registry=registry,
        )
        self.shadow_requests = Counter(
            "slipstream_shadow_requests",
            "Live requests that a new version was tried on: same, differs, failed.",
            (*_MODEL, "result"),
            registry=registry,
        )
        self.variant_served = Gauge(
            "slipstream_variant_served",
            "1 where a variant of the artifact serves, 0 where this host refused it.",
            (*_MODEL, "variant"),
            registry=registry,
        )
        self.lane_up = Gauge("slipstream_lane_up", "1 while the lane takes work.", _LANE, registry=registry)
        self.batch_rows = Tallies("slipstream_batch_rows", "Rows per executed batch.", _LANE, ROWS, registry)
        self.compute_seconds = Tallies("slipstream_compute_seconds", "Run time per batch.", _LANE, SECONDS, registry)
        self.prediction_ratio = Tallies(
            "slipstream_prediction_ratio", "Run time by its prediction.", _LANE, RATIOS, registry
        )
        self.retries = Counter(
            "slipstream_retries", "Requests run once more after their batch failed.", _MODEL, registry=registry
        )
        self.out_of_memory = Counter(
            "slipstream_out_of_memory", "Batches for which there was no memory.", _LANE, registry=registry
        )
        self.brownout = Gauge(
            "slipstream_brownout", "1 while overload is served by the fastest variant.", _MODEL, registry=registry
        )
        self.cache_requests = Counter(
            "slipstream_cache_requests",
            "Requests by what the response cache did: hit, shared (joined a run under way), miss.",
            (*_MODEL, "result"),
            registry=registry,
        )
        self.cache_bytes = Gauge("slipstream_cache_bytes", "Memory of the kept answers.", registry=registry)

    def of_model(self, name: str, version: str) -> "ModelMetrics":
        """Return the metrics of one model version."""
        return ModelMetrics(self, name, version)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Render all metrics.

        Args:
            accept: The header of whoever asks. OpenMetrics has exemplars: traces of requests in each bucket.

        Returns:
            The text, and its media type.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class ModelMetrics:
    """The metrics of one model version with their labels already bound, for the hot path.

    Called on the event loop only.

    Attributes:
        waiting_rows: Rows that wait now.
    """

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self._labels = metrics, (model, version)
        self.waiting_rows = 0
        self._variants: set[str] = set()
        self._shown_lanes: set[tuple[str, str]] = set()
        self._request_seconds = metrics.request_seconds.labels(model, version)
        self._queue_seconds = metrics.queue_seconds.labels(model, version)
        self._queue_rows = metrics.queue_rows.labels(model, version)
        self._ready = metrics.model_ready.labels(model, version)
        self._retries = metrics.retries.labels(model, version)
        self._brownout = metrics.brownout.labels(model, version)
        self._results: dict[str, Counter] = {}
        self._lanes: dict[tuple[str, str], tuple[Tally, Tally, Tally]] = {}

    def request_finished(self, code: str, seconds: float, trace_id: str = "") -> None:
        """Count one answer: ``ok`` or an error's code, its time since arrival, and its trace if it has one."""
        result = self._results.get(code)
        if result is None:
            result = self._results[code] = self._metrics.requests.labels(*self._labels, code)
        result.inc()
        self._request_seconds.observe(seconds)
        if trace_id:
            self._request_seconds.exemplify(seconds, trace_id)

    def dispatched(self, queue_s: float) -> None:
        """Record how long one request waited."""
        self._queue_seconds.observe(queue_s)

    def batch_finished(self, variant: str, device: str, rows: int, compute_s: float, ratio: float | None) -> None:
        """Record one executed batch, and the ratio of its time to the predicted one, if there was a prediction."""
        lane = self._lanes.get((variant, device))
        if lane is None:
            labels = (*self._labels, variant, device)
            kinds = (self._metrics.batch_rows, self._metrics.compute_seconds, self._metrics.prediction_ratio)
            rows_of, seconds_of, ratios_of = (kind.labels(*labels) for kind in kinds)
            lane = (rows_of, seconds_of, ratios_of)
            self._lanes[variant, device] = lane
        lane[0].observe(rows)
        lane[1].observe(compute_s)
        if ratio is not None:
            lane[2].observe(ratio)

    def retried(self, count: int) -> None:
        """Count requests that run once more."""
        self._retries.inc(count)

    def out_of_memory(self, variant: str, device: str) -> None:
        """Count a batch for which there was no memory."""
        self._metrics.out_of_memory.labels(*self._labels, variant, device).inc()

    def brownout(self, begins: bool) -> None:
        """Set whether a brown-out is on."""
        self._brownout.set(begins)

    def queue_rows(self, rows: int) -> None:
        """Set the number of waiting rows."""
        self.waiting_rows = rows
        self._queue_rows.set(rows)

    def ready(self, is_ready: bool) -> None:
        """Set whether the model serves."""
        self._ready.set(is_ready)

    def variant_served(self, variant: str, is_served: bool) -> None:
        """Set whether a variant of the artifact serves on this host."""
        self._variants.add(variant)
        self._metrics.variant_served.labels(*self._labels, variant).set(is_served)

    def lane_up(self, variant: str, device: str, is_up: bool) -> None:
        """Set whether a lane takes work."""
        self._shown_lanes.add((variant, device))
        self._metrics.lane_up.labels(*self._labels, variant, device).set(is_up)

    def forget(self) -> None:
        """Drop the gauges of a version that has left for good; its counters stay.

        A gauge that is 0 for ever would look like a model that should serve and does not.
        """
        for gauge in (self._metrics.queue_rows, self._metrics.model_ready):
            gauge.remove(*self._labels)
        for variant in self._variants:
            self._metrics.variant_served.remove(*self._labels, variant)
        for lane in self._shown_lanes:
            self._metrics.lane_up.remove(*self._labels, *lane)
