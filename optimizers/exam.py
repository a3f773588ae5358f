"""Examines candidates: their answers on one part of the samples against the original's; what was found out is kept."""

from typing import Any

import msgspec

from optimizers.building import Built
from optimizers.evaluator import Evaluate
from optimizers.evidence import HeldOut, Runner, compared, fidelity_of, run_batched, run_singly
from optimizers.masks import hide
from optimizers.store import Store, key_of
from server.artifact import Fidelity
from server.tensors import Tensors

_RESULT = "fidelity.json"


class Exam(msgspec.Struct, frozen=True):
    """One part of the samples, and how candidates answer it.

    Attributes:
        samples: The requests with the original's answers.
        name: ``search`` or ``held-out``.
        digest: Of everything that samples and answers follow from.
        rows: Largest batch that will be served; 1 where rows must not share a run.
        workers: Runs at a time.
        store: Where results are kept.
        host: Fingerprint of this host: arithmetic differs between hosts.
        evaluate: The user's own metric.
    """

    samples: HeldOut
    name: str
    digest: str
    rows: int
    workers: int
    store: Store
    host: str
    evaluate: Evaluate | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.samples.singles)

    def fidelity(self, built: Built, session: Runner) -> Fidelity:
        """Compare a candidate with the original, one by one and in full batches; the worse counts.

        Raises:
            PassFailed: If an output has another shape, or is NaN or infinite where the original's is finite.
            InferenceFailed: If the session fails.
        """
        parts: list[Any] = [built.form.sha256, built.options, built.provider, self.rows, self.digest, self.host]
        key = key_of("fidelity", self.name, *parts)
        found = self.store.read(key, _RESULT)
        if found is not None:
            return msgspec.json.decode(found, type=Fidelity)
        fidelity = fidelity_of(session, self.samples, self.rows, self.workers, self.evaluate)
        self.store.write(key, _RESULT, msgspec.json.encode(fidelity))
        return fidelity

    def few(self, count: int) -> HeldOut:
        """Return the first samples only."""
        whole = self.samples
        return msgspec.structs.replace(
            whole,
            singles=whole.singles[:count],
            reference={name: array[:count] for name, array in whole.reference.items()},
            labels=None if whole.labels is None else whole.labels[:count],
        )

    def glance(self, session: Runner) -> tuple[Fidelity, Tensors]:
        """Compare a candidate with the original in full batches only, where rows may share a run.

        Returns:
            The comparison, and the candidate's outputs, zero where the samples' mask hides them; axis 0 = samples.

        Raises:
            PassFailed: If an output has another shape, or is NaN or infinite where the original's is finite.
            InferenceFailed: If the session fails.
        """
        singles = self.samples.singles
        if self.rows == 1:
            outputs = run_singly(session, singles, self.workers)
        else:
            outputs = run_batched(session, singles, self.rows, self.workers)
        return compared(outputs, self.samples, self.evaluate), hide(outputs, self.samples.mask)
