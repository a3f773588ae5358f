"""The race track: opens candidates as the server would, and measures them against each other.

A session holds a copy of the weights: who has no further race should leave, and is opened anew when it enters again. A
finished race is kept in the store for a day, so that an interrupted run does not repeat it; a later run measures again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from optimizers.building import Built
from optimizers.evidence import join
from optimizers.forecast import Cost
from optimizers.graph import files_of
from optimizers.measurement import METHOD, Race, RacePlan, Sample, race
from optimizers.records import ORIGINAL
from optimizers.search import Knobs
from optimizers.store import Store, joint_digest, key_of
from server.artifact import SessionOptions
from server.errors import SlipstreamError
from server.providers import RECORD_PLACEMENT, Device
from server.session import Session
from server.tensors import Tensors

DEFAULTS = SessionOptions(intra_op_threads=0, spinning=True, graph_level="all")
"""How a user opens a model who sets nothing."""

VALID_FOR = timedelta(days=1)
_RESULT = "race.json"


class _Result(msgspec.Struct, frozen=True):
    """A race as it is stored."""

    finished: datetime
    cells: list[tuple[str, int, list[Sample]]]


class Track:
    """Opened candidates, beside the original with onnxruntime's defaults.

    Args:
        source: The user's own file.
        singles: Held-out or search samples, of which batches are made.
        sizes: Batch sizes, ascending from 1.
        store: Where finished races are kept.
        host: Fingerprint of this host.

    Raises:
        StartupError: If the original does not open.
    """

    def __init__(self, source: Path, singles: Sequence[Tensors], sizes: Sequence[int], store: Store, host: str) -> None:
        self._store, self._host = store, host
        self._sessions: dict[str, Session] = {}
        self._identity: dict[str, object] = {}
        self._spinning: set[str] = set()
        self._cost: dict[str, Cost] = {}
        self.batches = {size: batch_of(singles, size) for size in sizes}
        self._add(ORIGINAL, Session(source, Device("cpu"), DEFAULTS), (joint_digest(files_of(source)), DEFAULTS))

    def close(self) -> None:
        """Release all sessions."""
        for label in list(self._sessions):
            self._leave(label)

    def leave(self, built: Built) -> None:
        """Release the session of a candidate that has no further race; nothing happens when none is open."""
        self._leave(built.name)

    def enter(self, built: Built, knobs: Knobs | None = None) -> str:
        """Open a candidate, unless it is open, and run every batch size once; return its label in races.

        Another form under the same name takes the place of the earlier one.

        Raises:
            SlipstreamError: If it does not open or does not run.
        """
        label = label_of(built.name, knobs)
        options = with_knobs(built.options, knobs or Knobs(graph_level=built.options.graph_level))
        identity = (built.form.sha256, options, built.provider)
        if self._identity.get(label) != identity:
            self._leave(label)
            session = Session(built.model, Device(built.provider), options)
            try:
                cost = self._run_each(session)
            except SlipstreamError:
                session.close()
                raise
            self._add(label, session, identity)
            self._cost[label] = cost
        return label

    def cost(self, label: str) -> Cost:
        """Return what one run of each batch size took when a candidate entered: a rough idea, for nothing but plans."""
        return self._cost[label]

    def session(self, label: str) -> Session:
        """Return an opened session."""
        return self._sessions[label]

    def quick_ms(self, built: Built) -> float:
        """Return milliseconds of one row, the fastest of a few runs: a rough idea, for nothing but order.

        Raises:
            SlipstreamError: If it does not open or does not run.
        """
        session, batch = self._sessions[self.enter(built)], self.batches[min(self.batches)]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            session.run(batch)
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    def placement(self, built: Built) -> dict[str, dict[str, int]]:
        """Return execution provider -> operator -> count, as onnxruntime placed the nodes of a candidate.

        Raises:
            SlipstreamError: If it does not open.
        """
        options = msgspec.structs.replace(built.options, config={**built.options.config, RECORD_PLACEMENT: "1"})
        with closing(Session(built.model, Device(built.provider), options)) as session:
            return session.placement()

    def race(
        self, labels: Sequence[str], sizes: Sequence[int], plan: RacePlan, progress: Callable[[float], None]
    ) -> Race:
        """Measure opened sessions against each other.

        Args:
            labels: Who takes part.
            sizes: Batch sizes.
            plan: How long to measure.
            progress: Told the share done.

        Raises:
            InferenceFailed: If a session fails on a batch.
        """
        shapes = [(rows, {name: array.shape for name, array in self.batches[rows].items()}) for rows in sizes]
        key = key_of("race", METHOD, [(label, self._identity[label]) for label in labels], shapes, plan, self._host)
        found = self._store.read(key, _RESULT)
        if found is not None:
            result = msgspec.json.decode(found, type=_Result)
            if datetime.now(UTC) - result.finished < VALID_FOR:
                return Race({(name, rows): samples for name, rows, samples in result.cells})
        sessions = {label: self._sessions[label] for label in labels}
        batches = {size: self.batches[size] for size in sizes}
        finished = race(sessions, batches, frozenset(self._spinning & set(labels)), plan, progress)
        cells = [(name, rows, samples) for (name, rows), samples in finished.samples.items()]
        self._store.write(key, _RESULT, msgspec.json.encode(_Result(datetime.now(UTC), cells)))
        return finished

    def _run_each(self, session: Session) -> Cost:
        """Run every batch size once, the smallest twice: its first run also loads the weights."""
        session.run(self.batches[min(self.batches)])
        cost = {}
        for size, batch in self.batches.items():
            start = time.perf_counter()
            session.run(batch)
            cost[size] = time.perf_counter() - start
        return cost

    def _leave(self, label: str) -> None:
        if label in self._sessions:
            self._sessions.pop(label).close()
            self._identity.pop(label)
            self._spinning.discard(label)
            self._cost.pop(label, None)

    def _add(self, label: str, session: Session, identity: tuple[object, ...]) -> None:
        self._sessions[label] = session
        self._identity[label] = identity
        options = identity[1]
        if isinstance(options, SessionOptions) and options.spinning and options.intra_op_threads != 1:
            self._spinning.add(label)


def batch_of(singles: Sequence[Tensors], rows: int) -> Tensors:
    """Return a batch of the first samples, repeated if there are too few."""
    return singles[0] if rows == 1 else join([singles[i % len(singles)] for i in range(rows)])


def label_of(name: str, knobs: Knobs | None) -> str:
    """Return a candidate's name in races; plain settings go without saying."""
    return name if knobs is None else f"{name}, {knobs}"


def with_knobs(options: SessionOptions, knobs: Knobs) -> SessionOptions:
    """Return options with these settings; what the model itself needs stays."""
    return msgspec.structs.replace(
        options, intra_op_threads=knobs.threads, spinning=knobs.spinning, graph_level=knobs.graph_level
    )
