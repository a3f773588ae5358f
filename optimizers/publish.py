"""Writes an artifact: variants, golden samples, recipe, report, the manifest last; then renames it into place."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from optimizers.asking import Original
from optimizers.building import Built
from optimizers.engine_forms import EngineForm
from optimizers.explore import Found
from optimizers.fidelity import promise
from optimizers.graph import files_of
from optimizers.passes.catalog import settings_of
from optimizers.recipe import Recipe, VariantPlan, write_recipe
from optimizers.records import DataRecord, EngineRecord, PassRecord, Report
from optimizers.report import write_report
from optimizers.request import Digests, OptimizeRequest
from optimizers.search import Gate
from optimizers.stages import Staging, add_stages
from optimizers.store import key_of
from optimizers.trial import Chosen, Outcome, headline
from server.artifact import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    Batching,
    Golden,
    Manifest,
    Profile,
    SessionOptions,
    Source,
    Variant,
    digest_of,
)
from server.errors import ArtifactError, SlipstreamError
from server.golden import sqnr_db
from server.host import HostFacts
from server.providers import Device
from server.session import Session
from server.tensors import Signature

GOLDEN_MARGIN_DB = 3.0
GOLDEN_CEILING_DB = 60.0
RECIPE, ENGINES = "recipe.toml", "engines"


class Edition(msgspec.Struct, frozen=True):
    """Everything that one artifact is written from.

    Attributes:
        engine_form: What only engines are made of; ``None`` without.
        engine_profile: The shapes of the plans that lie in the folder ``ENGINES``.
        lost: That the first choice was refused when it was written; empty when it was not.
    """

    request: OptimizeRequest
    version: str
    digests: Digests
    host: HostFacts
    signature: Signature
    original: Original
    data: DataRecord
    passes: tuple[PassRecord, ...]
    found: Found
    outcome: Outcome
    engine_form: EngineForm | None
    engine_profile: Profile
    engines: tuple[EngineRecord, ...]
    seconds: float
    lost: str = ""


def publish(folder: Path, edition: Edition) -> None:
    """Write an artifact into an empty folder; with the manifest, written last, it is complete.

    A variant that fails on the golden samples is refused, and the next one takes its place.

    Raises:
        SlipstreamError: If the last resort, a portable exact variant, fails on them.
    """
    write_golden(folder, edition.original.golden)
    chosen = edition.outcome.chosen
    variants, refused = write_variants(folder, chosen, edition.original.golden, edition.host.fingerprint)
    edition = msgspec.structs.replace(edition, outcome=without(edition.outcome, refused), lost=_loss(chosen, refused))
    if edition.request.recipe.stages > 1:
        variants, record = add_stages(folder, variants, _staging(edition))
        edition = msgspec.structs.replace(edition, engines=(*edition.engines, record))
    if edition.engine_form is not None:
        variants = (*variants, _write_engine_form(folder, edition.engine_form, edition.original.golden))
    variants = tuple(_with_engine(folder, variant, edition.engine_profile) for variant in variants)
    manifest = _manifest(folder, edition, variants)
    recipe = write_recipe(_replay(edition))
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    write_report(_report(edition, manifest, recipe), folder)
    write_manifest(folder, manifest)


def write_golden(folder: Path, golden: Golden) -> None:
    """Write ``golden.npz``. Text becomes fixed-width bytes, since the file must hold no pickles."""
    arrays = {f"input/{name}": array for name, array in golden.inputs.items()}
    arrays |= {f"output/{name}": array for name, array in golden.outputs.items()}
    plain = {key: array.astype(np.bytes_) if array.dtype.kind == "O" else array for key, array in arrays.items()}
    np.savez(folder / GOLDEN, allow_pickle=False, **plain)


def write_variants(
    folder: Path, chosen: Sequence[Chosen], golden: Golden, host: str
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Copy the chosen files in and bind each to what it reached on the golden samples on this host.

    Args:
        folder: The artifact's folder.
        chosen: In order of preference; the last one that is not for large batches is the last resort.
        golden: The golden request.
        host: Fingerprint of this host.

    Returns:
        The variants, and those that are refused with the reason, by name. With the first choice its variant for large
        batches is refused too, since it is one only beside that choice.

    Raises:
        SlipstreamError: If the last resort does not open or run, or does not reproduce the golden outputs at all.
    """
    variants: list[Variant] = []
    refused: dict[str, str] = {}
    last_resort = [choice for choice in chosen if not choice.from_rows][-1]
    for choice in chosen:
        if choice.from_rows and chosen[0].name in refused:
            refused[choice.name] = f"it serves large batches beside {chosen[0].name} only, which is refused"
            continue
        try:
            variants.append(_write_variant(folder, choice, golden, host))
        except SlipstreamError as exc:
            if choice is last_resort:
                raise
            refused[choice.name] = str(exc)
            shutil.rmtree(folder / choice.name)
    return tuple(variants), refused


def without(outcome: Outcome, refused: Mapping[str, str]) -> Outcome:
    """Return an outcome in which some of the chosen variants are refused.

    Args:
        outcome: The result of a trial.
        refused: Variant -> reason.
    """
    reasons = {choice.built.name: refused[choice.name] for choice in outcome.chosen if choice.name in refused}
    return msgspec.structs.replace(
        outcome,
        candidates=tuple(
            msgspec.structs.replace(record, verdict="refused", reason=reasons[record.name], pareto=False)
            if record.name in reasons
            else record
            for record in outcome.candidates
        ),
        chosen=tuple(choice for choice in outcome.chosen if choice.name not in refused),
        served=tuple(record for record in outcome.served if record.variant not in refused),
        knobs=tuple(choice for choice in outcome.knobs if choice.variant not in refused),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; with it the folder is complete."""
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def move_into_place(folder: Path, target: Path) -> None:
    """Rename the finished folder, which lies on the same file system, to its place.

    Raises:
        ArtifactError: If the place was taken meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # temporary folders are private; a served one may be read by another user
    try:
        folder.rename(target)
    except OSError as exc:
        raise ArtifactError(f"cannot move the artifact to {target}: {exc}; choose another --version") from exc


def _write_variant(folder: Path, choice: Chosen, golden: Golden, host: str) -> Variant:
    written = _write(folder, choice.name, choice.built, choice.options, golden)
    return msgspec.structs.replace(
        written,
        fidelity=choice.fidelity,
        latency=choice.latency,
        host=host,
        host_bound=choice.built.host_bound,
        from_rows=choice.from_rows,
    )


def _write_engine_form(folder: Path, form: EngineForm, golden: Golden) -> Variant:
    """Write what an engine is built of; no device has measured it."""
    written = _write(folder, form.built.name, form.built, form.options, golden)
    return msgspec.structs.replace(written, provider="tensorrt", options=SessionOptions(), fidelity=form.fidelity)


def _with_engine(folder: Path, variant: Variant, profile: Profile) -> Variant:
    plan = folder / ENGINES / f"{variant.name}.plan"
    if not plan.is_file():
        return variant
    file = str(plan.relative_to(folder))
    return msgspec.structs.replace(variant, engine=file, engine_sha256=digest_of(plan), profile=profile)


def _write(folder: Path, name: str, built: Built, options: SessionOptions, golden: Golden) -> Variant:
    """Copy a form in, and bind it to what it reaches on the golden samples."""
    place = folder / name / "model.onnx"
    place.parent.mkdir()
    shutil.copyfile(built.model, place)
    for weights in files_of(built.model)[1:]:  # of a model beyond 2 GB
        shutil.copyfile(weights, place.parent / weights.name)
    session = Session(place, Device(built.provider), options)
    try:
        reached = sqnr_db(golden.outputs, session.run(golden.inputs))
    finally:
        session.close()
    if reached <= 0:
        raise ArtifactError(f"variant {name} reaches {reached:.1f} dB on the golden samples; it must reach more than 0")
    extra = {file.name: digest_of(file) for file in sorted(place.parent.iterdir()) if file != place}
    return Variant(
        name=name,
        file=str(place.relative_to(folder)),
        sha256=digest_of(place),
        size_bytes=built.size_bytes,
        precision=built.precision,
        provider=built.provider,
        options=options,
        golden_min_sqnr_db=min(reached - GOLDEN_MARGIN_DB, GOLDEN_CEILING_DB),
        weights=extra,
    )


def _manifest(folder: Path, edition: Edition, variants: tuple[Variant, ...]) -> Manifest:
    host, request, digests = edition.host, edition.request, edition.digests
    facts = {
        "fingerprint": host.fingerprint,
        "cpu": host.cpu,
        "flags": " ".join(host.flags),
        "cores": str(host.cores),
    }
    made = [(v.name, v.sha256, v.weights, v.stages, v.options) for v in variants]
    golden = digest_of(folder / GOLDEN)
    return Manifest(
        format=FORMAT,
        name=request.name,
        version=edition.version,
        signature=edition.signature,
        batching=_within_slo(edition.original.batching, edition.outcome, request.recipe.slo_ms),
        source=Source(request.model.name, digests.source, sum(f.stat().st_size for f in files_of(request.model))),
        variants=variants,
        recipe_sha256=digests.recipe,
        inputs_sha256=digests.inputs,
        tools=host.tools,
        host=facts,
        golden_sha256=golden,
        padding=edition.original.padding,
        digest=key_of(digests.source, digests.recipe, digests.inputs, golden, made),
    )


def _staging(edition: Edition) -> Staging:
    recipe, original = edition.request.recipe, edition.original
    rows = original.batching.max_rows if original.batching.batchable else 1
    return Staging(
        stages=recipe.stages,
        signature=edition.signature,
        golden=original.golden,
        batchable=original.batching.batchable,
        sizes=tuple(sorted({1, *(r for r in recipe.batch_rows if r <= rows)})),
        cores=edition.host.cores,
        limit_bytes=recipe.stage_bytes,
    )


def _loss(chosen: Sequence[Chosen], refused: Mapping[str, str]) -> str:
    first = chosen[0].name
    return f"{first} was the first choice and is refused: {refused[first]}. " if first in refused else ""


def _within_slo(batching: Batching, outcome: Outcome, slo_ms: float | None) -> Batching:
    """Limit batches to those whose measured p99 keeps the wanted latency; one row always goes."""
    if slo_ms is None or not batching.batchable:
        return batching
    table = outcome.chosen[0].latency
    fitting = [rows for rows, p99_ms in zip(table.rows, table.p99_ms, strict=True) if p99_ms <= slo_ms]
    rows = max(fitting, default=1)
    seen = f"p99 of {rows} rows is {table.p99_ms[table.rows.index(rows)]:.1f} ms, wanted are {slo_ms:g} ms"
    return Batching(True, f"{batching.reason}; {seen}", rows)


def _replay(edition: Edition) -> Recipe:
    """Return the recipe that makes the served variants again, without a search."""
    plans = tuple(
        VariantPlan(choice.name, built.precision, tuple(settings_of(step) for step in built.chain), built.exact)
        for choice, built in ((choice, choice.built) for choice in edition.outcome.chosen)
        if built.provider == "cpu"
    )
    return msgspec.structs.replace(edition.request.recipe, variants=plans)


def _report(edition: Edition, manifest: Manifest, recipe: str) -> Report:
    request, outcome = edition.request, edition.outcome
    return Report(
        name=manifest.name,
        version=manifest.version,
        headline=f"{edition.lost}{headline(outcome)}",
        chosen=outcome.chosen[0].name,
        source=manifest.source,
        gate=Gate(request.recipe.min_agreement, request.recipe.max_accuracy_drop),
        recipe=msgspec.to_builtins(request.recipe),
        recipe_sha256=manifest.recipe_sha256,
        data=edition.data,
        batching=manifest.batching,
        padding=edition.original.padding,
        policy=outcome.policy,
        promise=promise(edition.data.held_out, request.recipe.min_agreement),
        passes=edition.passes,
        steps=edition.found.steps,
        sensitivity=edition.found.sensitivity,
        candidates=outcome.candidates,
        served=outcome.served,
        knobs=outcome.knobs,
        engines=edition.engines,
        host=edition.host,
        command=request.command,
        replay=recipe,
        seconds=edition.seconds,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )
