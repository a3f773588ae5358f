"""Asks the original: its answers to every sample, whether its rows may share a run, whether padding changes them."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from optimizers.calibration import Samples, read_samples, split, synthetic_samples, why_no_proof
from optimizers.decisions import require_outputs
from optimizers.evidence import HeldOut, Runner, join, prove_batching, run_singly
from optimizers.fidelity import decision_for
from optimizers.isolation import SERVING, Form
from optimizers.padding import prove_padding
from optimizers.recipe import Recipe
from optimizers.records import DataRecord
from optimizers.store import Store, key_of
from server.artifact import Batching, Golden, Padding
from server.host import HostFacts
from server.providers import CPU
from server.session import Session
from server.tensors import Array, Signature, Tensors

GOLDEN_SAMPLES = 8
_SYNTHETIC_SAMPLES = 32
_ANSWERS = "answers.npz"
_PROOF = "proof.json"


class Parts(msgspec.Struct, frozen=True):
    """The samples in three disjoint parts, and what they are.

    Attributes:
        calibration: For ranges; ``None`` when no data was given.
        search: For deciding what is tried next; may be empty.
        held_out: For verdicts.
        record: For the report.
        no_proof: Why they cannot prove a lossy variant; empty when they can.
        digest: Of everything that they follow from.
    """

    calibration: Samples | None
    search: Samples
    held_out: Samples
    record: DataRecord
    no_proof: str
    digest: str


class Original(msgspec.Struct, frozen=True):
    """What the original answered: the measure of everything else.

    Attributes:
        held_out: The samples for verdicts.
        search: The samples for the search; without any when there are too few.
        batching: Whether rows may share a run.
        padding: Whether a variable axis may be padded.
        golden: What the server checks every variant with.
    """

    held_out: HeldOut
    search: HeldOut | None
    batching: Batching
    padding: Padding
    golden: Golden


class _Proof(msgspec.Struct, frozen=True):
    batching: Batching
    padding: Padding


def parts_of(recipe: Recipe, signature: Signature, data: Path | None, labels: Path | None, place: "Place") -> Parts:
    """Read the samples and split them, or make some up when none were given.

    Args:
        recipe: How many samples each part gets.
        signature: The model's.
        data: DATA.npz.
        labels: LABELS.npz.
        place: Where they are unpacked, and what they are called.

    Raises:
        CalibrationError: If they do not fit the model.
        RecipeError: If the recipe names the decision of an output that the model does not have.
    """
    require_outputs(recipe.decisions, signature)
    counts = (recipe.calibration_samples, recipe.search_samples, recipe.holdout_samples)
    named = [sorted(recipe.decisions.items())] if recipe.decisions else []
    digest = key_of("samples", place.source, place.inputs, counts, recipe.seed, *named)
    if data is None:
        made = synthetic_samples(signature, _SYNTHETIC_SAMPLES, recipe.seed)
        record = DataRecord("made up: no --calibration was given", made.count, 0, 0, made.count, False, "")
        return Parts(None, made.take([]), made, record, why_no_proof(None), digest)
    place.folder.mkdir()
    samples = read_samples(data, signature, labels, place.folder)
    calibration, search, held_out = split(samples, *counts, recipe.seed)
    sizes = (samples.count, calibration.count, search.count, held_out.count)
    record = DataRecord(data.name, *sizes, samples.labels is not None, place.inputs)
    return Parts(calibration, search, held_out, record, why_no_proof(held_out), digest)


class Place(msgspec.Struct, frozen=True):
    """Where samples are unpacked, and the digests of what they belong to.

    Attributes:
        folder: Not there yet.
        source: Digest of the model.
        inputs: Digest of the files of samples and labels.
    """

    folder: Path
    source: str
    inputs: str


def ask(original: Form, signature: Signature, parts: Parts, recipe: Recipe, store: Store, host: HostFacts) -> Original:
    """Run the original over all samples that judge others, one by one and in batches.

    Args:
        original: The model.
        signature: Its signature.
        parts: The samples.
        recipe: The largest batch to prove, and the decisions that it names.
        store: Where the answers are kept.
        host: This machine.

    Raises:
        StartupError: If the original does not open.
        InferenceFailed: If it fails on a sample.
        RecipeError: If the shape of an output does not allow the decision that the recipe names for it.
    """
    key = key_of("original", original.sha256, parts.digest, max(recipe.batch_rows), host.fingerprint)
    session = Session(original.model, CPU, SERVING)

    def answered(samples: Samples, kept_as: str) -> HeldOut:
        singles = tuple(samples.batch(index, 1) for index in range(samples.count))
        reference = _known(store, kept_as) or _run(session, singles, store, kept_as, host.cores)
        decision = decision_for(reference, samples.labels, recipe.decisions)
        return HeldOut(singles, reference, decision, samples.labels)

    try:
        held_out = answered(parts.held_out, key_of(key, "held-out"))
        search = answered(parts.search, key_of(key, "search")) if parts.search.count else None
        known = store.read(key, _PROOF)
        if known is None:
            batching = prove_batching(session, signature, held_out, max(recipe.batch_rows), host.cores)
            proof = _Proof(batching, prove_padding(session, signature, held_out, host.cores))
            store.write(key, _PROOF, msgspec.json.encode(proof))
        else:
            proof = msgspec.json.decode(known, type=_Proof)
        golden = golden_of(session, held_out, batchable=proof.batching.batchable)
    finally:
        session.close()
    return Original(held_out, search, proof.batching, proof.padding, golden)


def _known(store: Store, key: str) -> Tensors | None:
    place = store.find(key)
    if place is None:
        return None
    with np.load(place / _ANSWERS, allow_pickle=False) as arrays:
        return {name.removeprefix("output/"): arrays[name] for name in arrays.files}


def _run(session: Session, singles: Sequence[Tensors], store: Store, key: str, workers: int) -> Tensors:
    reference = run_singly(session, singles, workers)
    if any(array.dtype.kind == "O" for array in reference.values()):
        return reference  # text would need pickle; it is quickly asked again
    draft = store.draft()
    named: dict[str, Array] = {f"output/{name}": array for name, array in reference.items()}
    np.savez(draft / _ANSWERS, allow_pickle=False, **named)
    store.keep(key, draft)
    return reference


def golden_of(original: Runner, held_out: HeldOut, *, batchable: bool) -> Golden:
    """Take a few held-out samples with the original's outputs, as one request.

    A model that must not be batched gets one sample, as one request can carry no more.
    """
    if not batchable:
        return Golden(dict(held_out.singles[0]), dict(original.run(held_out.singles[0])))
    count = min(GOLDEN_SAMPLES, len(held_out.singles))
    outputs = {name: array[:count] for name, array in held_out.reference.items()}
    return Golden(join(held_out.singles[:count]), outputs)
