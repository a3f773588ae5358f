"""One model version in service: its variants opened on the devices that are there, and its scheduler.

Free of HTTP: a request comes as an ``InferRequest`` and leaves as an ``InferResponse``.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from server.artifact import Artifact, Variant
from server.batching import BatchLimits
from server.errors import Draining, ModelNotReady
from server.lanes import Lanes
from server.metrics import Metrics, ModelMetrics
from server.outcome import Completion, Future
from server.providers import Device
from server.scheduler import Cores, LaneSpec, Scheduler
from server.serving import How
from server.session import MEASURED_ROWS, check_text
from server.settings import Settings
from server.shapes import Shapes
from server.split import Splits
from server.tensors import InferRequest, InferResponse, Tensors, TensorSpec

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "draining"]


class Model:
    """One model version.

    ``load`` it in any thread, ``start`` it on the event loop, and from then on call it on that loop only.

    Attributes:
        name: Name under which it is served.
        version: Its version, a number in decimal.
        signature: Its inputs and outputs.
        state: ``loading`` until ``start``, then ``ready``, then ``draining``.
        unoptimized: Whether it is a plain model that no optimizer has proven.
        variants: Names of the variants in service, the preferred one first.
        refused: Variant -> why it is not served on this host.
        artifact: What it was opened from.
        tap: Called with each request that pins no variant and its response, after the response was given; ``None``
            calls nothing.
    """

    def __init__(self, artifact: Artifact, lanes: Lanes, limits: BatchLimits, metrics: Metrics) -> None:
        self.artifact, self.name, self.version = artifact, artifact.name, artifact.version
        self.signature = lanes.signature
        self.state: State = "loading"
        self.unoptimized = artifact.manifest is None
        self.variants = tuple(dict.fromkeys(lane.variant for lane in lanes.specs))
        self.refused = lanes.refused
        self.tap: Callable[[InferRequest, InferResponse], None] | None = None
        self._lanes, self._limits = lanes, limits
        self._metrics = ModelMetrics(metrics, self.name, self.version)
        self._scheduler: Scheduler | None = None
        self._runner = lanes.specs[0].runner
        self._takes_text = any(spec.datatype == "BYTES" for spec in self.signature.inputs)
        self._shapes = Shapes(self.signature, batchable=limits.batchable)

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        devices: tuple[Device, ...],
        settings: Settings,
        metrics: Metrics,
        splits: Splits | None = None,
    ) -> "Model":
        """Open every variant that can be served here, check it against the golden outputs, and warm it up.

        Blocks; meant for a thread of its own. A variant that fails is left out with a warning and listed in
        ``refused``.

        Args:
            artifact: What to serve.
            devices: The devices that really work, the preferred one first.
            settings: Lanes per CPU, queue limits, default timeout.
            metrics: The process's metrics.
            splits: How the models of the process split the cores; without, that is not measured.

        Raises:
            StartupError: If no variant can be served; the message holds the reason of each. ``ArtifactError`` if
                there are no golden outputs to check against.
        """
        lanes = Lanes(artifact, devices, settings.cpu_instances, brownout=settings.brownout, splits=splits)
        limits = BatchLimits(
            batchable=lanes.batchable,
            max_rows=artifact.manifest.batching.max_rows if artifact.manifest is not None else MEASURED_ROWS[-1],
            max_queue_rows=settings.max_queue_rows,
            max_queue_delay_s=settings.max_queue_delay_s,
            default_timeout_s=settings.default_timeout_s,
            max_queue_s=settings.max_queue_s,
            brownout=settings.brownout,
            padding=artifact.manifest.padding if artifact.manifest is not None else None,
        )
        logger.info(
            "loaded %s/%s: lanes %s, batching %s%s",
            artifact.name,
            artifact.version,
            ", ".join(
                f"{lane['variant']} on {lane['device']}: {lane['instances']} x {lane['threads']} threads"
                for lane in lanes.summary()
            ),
            f"up to {limits.max_rows} rows" if limits.batchable else "off",
            ", unoptimized" if artifact.manifest is None else "",
        )
        return cls(artifact, lanes, limits, metrics)

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == "ready"

    @property
    def serves(self) -> bool:
        """Whether it takes requests and has a lane that can run them."""
        return self.ready and self._scheduler is not None and self._scheduler.serves

    @property
    def lanes_down(self) -> tuple[str, ...]:
        """The lanes that get no work because they fail, as ``variant on device``."""
        return self._scheduler.lanes_down if self._scheduler is not None else ()

    @property
    def lanes(self) -> tuple[LaneSpec, ...]:
        """Its lanes, the preferred ones first."""
        return tuple(self._lanes.specs)

    @property
    def waiting_rows(self) -> int:
        """Rows that wait for a lane now."""
        return self._metrics.waiting_rows

    def start(self, cores: Cores) -> None:
        """Start the lanes and become ready; on the event loop.

        Args:
            cores: The cores, shared with the other models.
        """
        self._scheduler = Scheduler(self._lanes.specs, self._limits, self._metrics, cores)
        self.state = "ready"
        for variant in self.variants:
            self._metrics.variant_served(variant, True)
        for variant in self.refused:
            self._metrics.variant_served(variant, variant in self.variants)
        self._metrics.ready(True)

    def open_engine(self, engine: Variant, source: Variant, device: Device) -> list[LaneSpec]:
        """Open lanes for an engine that was built of a variant in service; see ``Lanes.open_engine``. Blocks."""
        return self._lanes.open_engine(engine, source, device)

    def adopt(self, lanes: Sequence[LaneSpec]) -> None:
        """Take lanes into service, from one step of the loop to the next, ahead of all others.

        On the event loop, while it serves. The lanes that are there stay, for overflow and for failures.

        Raises:
            Draining: If it serves no more; they are closed with the others.
        """
        if self._scheduler is None or not self.ready:
            raise Draining(f"{self.name}/{self.version} is {self.state}")
        self._lanes.specs[:0] = lanes
        self._scheduler.prefer(lanes)
        self.variants = tuple(dict.fromkeys(spec.variant for spec in self._lanes.specs))
        for lane in lanes:
            self.refused.pop(lane.variant, None)
            self._metrics.variant_served(lane.variant, True)

    def discard(self, lanes: Sequence[LaneSpec]) -> None:
        """Release the lanes of an engine that is not adopted."""
        self._lanes.discard(lanes)

    def begin(self, request: InferRequest) -> Future:
        """Run one request, alone or in a batch with others.

        Cancelling the future drops the request if its batch has not formed; a batch that runs is not stopped.

        Returns:
            A future of what ``finish`` makes a response of. It fails with ``DeadlineExpired``, ``InferenceFailed``,
            ``LaneDown`` or ``Draining``.

        Raises:
            SignatureMismatch: If the inputs or the wanted outputs do not fit the signature.
            UnknownVariant: If the request pins a variant that is not in service.
            QueueFull: If too many rows wait.
            DeadlineUnmeetable: If the answer is predicted to come after the deadline.
            LaneDown: If every lane that could run it fails.
            Draining: If the model is shutting down.
            ModelNotReady: If it has not been started.
        """
        if self._scheduler is None:
            raise ModelNotReady(f"model '{self.name}' version {self.version} is {self.state}")
        self.signature.check(request.inputs)
        self.signature.check_outputs(request.outputs)
        if self._takes_text:
            check_text(request.inputs)
        if self._shapes.vary:
            self._shapes.count(request.inputs)
        return self._scheduler.submit(request)

    def finish(self, request: InferRequest, outcome: Completion) -> tuple[InferResponse, How]:
        """Make the response to a request of what its future gave: always from a run of its own."""
        outputs = outcome.outputs
        if request.outputs:
            outputs = {name: outputs[name] for name in request.outputs}
        response = InferResponse(
            self.name,
            self.version,
            request.id,
            outputs,
            outcome.variant,
            outcome.device,
            outcome.batch_rows,
            outcome.queue_s,
            outcome.compute_s,
            outcome.assemble_s,
        )
        if self.tap is not None and not request.variant:
            asyncio.get_running_loop().call_soon(self.tap, request, response)
        return response, "miss"

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one request; see ``begin``."""
        return self.finish(request, await self.begin(request))[0]

    def run_aside(self, request: InferRequest) -> Tensors:
        """Run one request alone on the preferred variant, before ``start``; blocks.

        Returns:
            Name -> array of all outputs.

        Raises:
            SignatureMismatch: If the inputs do not fit the signature.
            InferenceFailed: If the session raised.
        """
        self.signature.check(request.inputs)
        return self._runner.run(request.inputs)

    def metadata(self) -> dict[str, Any]:
        """Return ``inputs`` and ``outputs`` as the protocol's model metadata spells them, and what serves them.

        ``variants`` are those in service, the preferred one first; ``refused`` maps those that this host does not serve
        to the reason; ``lanes`` counts the instances of each and the threads of one.
        """
        return {
            "variants": list(self.variants),
            "refused": self.refused,
            "lanes": self._lanes.summary(),
            "inputs": [_metadata_of(spec) for spec in self.signature.inputs],
            "outputs": [_metadata_of(spec) for spec in self.signature.outputs],
        }

    def shapes(self) -> list[dict[str, Any]]:
        """Return the shapes of the requests so far; see ``Shapes.table``."""
        return self._shapes.table()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and finish those that wait; return whether all were finished in ``timeout_s``."""
        self.state = "draining"
        self._metrics.ready(False)
        return self._scheduler is None or await self._scheduler.drain(timeout_s)

    def close(self) -> None:
        """Stop the lanes and release the sessions; requests that still wait fail with ``Draining``."""
        self.state = "draining"
        self._metrics.ready(False)
        if self._scheduler is not None:
            self._scheduler.close()
        self._lanes.close()

    def forget(self) -> None:
        """Drop the gauges of this version, once it is closed for good."""
        self._metrics.forget()


def _metadata_of(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.protocol_shape}
