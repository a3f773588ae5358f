"""One model's contest: everybody makes a model of the same samples, then all race and answer to unseen samples."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.optimizing.material import Material, set_aside
from benchmarks.optimizing.results import (
    ORIGINAL,
    ORIGINAL_ONE,
    OURS,
    OURS_DEFAULTS,
    Comparison,
    Judged,
    Row,
    agreement_high,
    promise_kept,
)
from benchmarks.peers.asking import ORT_DEFAULTS, Peer, PeerFailed, ask_peer, children_cpu_s
from optimizers.api import Result, Task, optimize
from optimizers.errors import OptimizerError, PassFailed
from optimizers.evidence import HeldOut, fidelity_of, run_singly
from optimizers.fidelity import decision_for
from optimizers.measurement import Race, RacePlan, race
from optimizers.racing import batch_of
from optimizers.recipe import Recipe
from optimizers.records import Speed
from optimizers.search import Gate
from server.artifact import SessionOptions, Variant
from server.errors import SlipstreamError
from server.host import HostFacts, read_host
from server.providers import CPU, Device
from server.session import Session
from server.tensors import Tensors

ONE_THREAD = SessionOptions()
_MIDDLE_ROWS = 8


class Entry(msgspec.Struct, frozen=True):
    """A model that takes part.

    Attributes:
        row: What is known of it.
        model: Its file.
        options: How it is opened.
        device: Where it runs.
        bulk: What takes batches of at least so many rows in its place, as the server does it.
    """

    row: Row
    model: Path
    options: SessionOptions
    device: Device = CPU
    bulk: "tuple[Entry, int] | None" = None


class ByRows:
    """Two sessions, one of which takes large batches."""

    def __init__(self, usual: Session, large: Session, from_rows: int) -> None:
        self._usual, self._large, self._from_rows = usual, large, from_rows

    def run(self, inputs: Tensors) -> Tensors:
        rows = len(next(iter(inputs.values())))
        return (self._large if rows >= self._from_rows else self._usual).run(inputs)

    def close(self) -> None:
        self._usual.close()
        self._large.close()


class Plan(msgspec.Struct, frozen=True):
    """How a contest is held.

    Attributes:
        repository: Where our artifacts go.
        peers: Who else takes part.
        recipe: What our optimizer is asked for.
        time_budget_s: What our optimizer may take.
        race_s: What the race may take.
        peer_timeout_s: What a peer may take.
        least_rounds: Rounds of the race even for slow batches.
    """

    repository: Path
    peers: tuple[Peer, ...]
    recipe: Recipe = Recipe()
    time_budget_s: float = 300.0
    race_s: float = 60.0
    peer_timeout_s: float = 900.0
    least_rounds: int = 15


def compare(name: str, about: str, folder: Path, work: Path, plan: Plan, say: Callable[[str], None]) -> Comparison:
    """Hold the contest of one model. Blocks for minutes.

    Args:
        name: The model's.
        about: One line about it.
        folder: Holds ``model.onnx``, ``data.npz`` and maybe ``labels.npz``.
        work: A folder for parts and peers.
        plan: How.
        say: Takes progress lines.

    Raises:
        OptimizerError: If the samples do not fit the model.
        SlipstreamError: If the original cannot be opened or fails.
    """
    host = read_host()
    material = set_aside(folder, work / "samples", plan.recipe)
    say(f"{name}: {material.seen_count} samples for everybody, {material.unseen.count} for nobody")
    result, ours = _ours(name, material, plan)
    say(f"{name}: {ours[0].failure or f'optimized in {ours[0].wall_s:.0f} s'}")
    entries, rows = _originals(material.model), {row.name: row for row in ours}
    if result is not None:
        entries += _entries_of(result, ours)
    for peer in plan.peers:
        try:
            made = ask_peer(peer, material.model, material.calibration, host, work / peer.name, plan.peer_timeout_s)
            row = Row(peer.name, notes=made.notes, wall_s=made.wall_s, cpu_s=made.cpu_s)
            entries.append(Entry(row, made.model, made.options))
        except PeerFailed as exc:
            row = Row(peer.name, failure=str(exc))
        rows[peer.name] = row
        say(f"{name}: {peer.name} {row.failure or f'took {row.wall_s:.0f} s'}")
    sizes = _sizes(result)
    rows |= _measured(entries, material, sizes, plan, host)
    order = [ORIGINAL, ORIGINAL_ONE, *(peer.name for peer in plan.peers), OURS_DEFAULTS, OURS]
    return Comparison(
        model=name,
        about=about,
        gate=_gate(plan),
        seen=material.seen_count,
        unseen=material.unseen.count,
        repeated=material.repeated,
        headline="" if result is None else result.report.headline,
        chosen="" if result is None else result.chosen.name,
        best_rows=_best_rows(result),
        rows=tuple(rows[each] for each in order),
        judged=() if result is None else tuple(Judged(c.name, c.verdict, c.reason) for c in result.report.candidates),
    )


def _gate(plan: Plan) -> Gate:
    return Gate(plan.recipe.min_agreement, plan.recipe.max_accuracy_drop)


def _ours(name: str, material: Material, plan: Plan) -> tuple[Result | None, tuple[Row, Row]]:
    """Run our optimizer as a user would: from its Python API, with what everybody gets."""
    task = Task(
        model=material.model,
        repository=plan.repository,
        name=name,
        calibration=material.seen,
        labels=material.seen_labels,
        recipe=plan.recipe,
        time_budget_s=plan.time_budget_s,
    )
    start_s, cpu_s = time.monotonic(), time.process_time() + children_cpu_s()
    try:
        result = optimize(task)
    except (OptimizerError, SlipstreamError) as exc:
        failure = f"{type(exc).__name__}: {exc}"
        return None, (Row(OURS, failure=failure), Row(OURS_DEFAULTS, failure=failure))
    wall_s, cpu_s = time.monotonic() - start_s, time.process_time() + children_cpu_s() - cpu_s
    # A version that was found again was made before; its report knows how long that took.
    if result.report.seconds > wall_s:
        note = f"made before, in {result.report.seconds:.0f} s"
        return result, (Row(OURS, notes=(note,)), Row(OURS_DEFAULTS, notes=(note,)))
    return result, (Row(OURS, wall_s=wall_s, cpu_s=cpu_s), Row(OURS_DEFAULTS, wall_s=wall_s, cpu_s=cpu_s))


def _originals(model: Path) -> list[Entry]:
    return [Entry(Row(ORIGINAL), model, ORT_DEFAULTS), Entry(Row(ORIGINAL_ONE), model, ONE_THREAD)]


def _entries_of(result: Result, rows: Sequence[Row]) -> list[Entry]:
    """Open ours as the manifest says, and once more with as many threads as onnxruntime takes by default."""
    served, many = (
        _entry(result, result.chosen, row, spinning) for row, spinning in zip(rows, (False, True), strict=True)
    )
    large = next((variant for variant in result.artifact.variants if variant.from_rows), None)
    if large is None:
        return [served, many]
    row = _noted(served.row, f"from {large.from_rows} rows on {large.name}: {_setting(large.options)}")
    bulk = (_entry(result, large, row, spinning=False), large.from_rows)
    return [msgspec.structs.replace(served, row=row, bulk=bulk), many]


def _entry(result: Result, variant: Variant, row: Row, spinning: bool) -> Entry:
    """Describe a variant as it is served, or with all cores that spin."""
    options = variant.options
    if spinning:
        options = msgspec.structs.replace(options, intra_op_threads=0, spinning=True)
    device = CPU if variant.provider == "cpu" else Device("cuda")
    noted = _noted(row, f"{variant.name}: {_setting(options)}")
    return Entry(noted, result.artifact.folder / variant.file, options, device)


def _noted(row: Row, note: str) -> Row:
    return msgspec.structs.replace(row, notes=(*row.notes, note))


def _setting(options: SessionOptions) -> str:
    threads = f"{options.intra_op_threads} threads" if options.intra_op_threads else "ORT's threads"
    return f"{threads}, {'spinning' if options.spinning else 'not spinning'}, graph level {options.graph_level}"


def _best_rows(result: Result | None) -> int:
    if result is None or not _batchable(result) or result.chosen.latency is None:
        return 1
    return result.chosen.latency.best_rows()


def _batchable(result: Result) -> bool:
    manifest = result.artifact.manifest
    return manifest is not None and manifest.batching.batchable


def _sizes(result: Result | None) -> list[int]:
    if result is None or not _batchable(result):
        return [1]
    return sorted({1, _MIDDLE_ROWS, _best_rows(result)})


def _measured(
    entries: Sequence[Entry], material: Material, sizes: Sequence[int], plan: Plan, host: HostFacts
) -> dict[str, Row]:
    """Open everybody, race them, and compare their answers to the unseen samples."""
    singles = tuple(material.unseen.batch(index, 1) for index in range(material.unseen.count))
    batches = {rows: batch_of(singles, rows) for rows in sizes}
    rows: dict[str, Row] = {}
    sessions: dict[str, Session | ByRows] = {}
    try:
        for entry in entries:
            rows[entry.row.name] = _opened(entry, batches, sessions)
        reference = run_singly(sessions[ORIGINAL_ONE], singles, host.cores)
        labels = material.unseen.labels
        unseen = HeldOut(singles, reference, decision_for(reference, labels), labels)
        for name, session in list(sessions.items()):
            rows[name] = _faithful(rows[name], session, unseen, max(sizes), _gate(plan))
        spinning = frozenset(e.row.name for e in entries if e.options.spinning and e.options.intra_op_threads != 1)
        racing = RacePlan(budget_s=plan.race_s, least_rounds=plan.least_rounds)
        raced = race(sessions, batches, spinning, racing)
        return rows | {name: _raced(rows[name], raced) for name in sessions}
    finally:
        for session in sessions.values():
            session.close()


def _opened(entry: Entry, batches: Mapping[int, Tensors], sessions: dict[str, Session | ByRows]) -> Row:
    """Open an entry and run every batch size; one that fails takes no further part."""
    try:
        session = _open(entry)
        for batch in batches.values():
            session.run(batch)
    except SlipstreamError as exc:
        if entry.row.name in (ORIGINAL, ORIGINAL_ONE):
            raise
        return msgspec.structs.replace(entry.row, failure=f"does not run: {exc}")
    sessions[entry.row.name] = session
    return msgspec.structs.replace(entry.row, size_bytes=entry.model.stat().st_size)


def _open(entry: Entry) -> Session | ByRows:
    session = Session(entry.model, entry.device, entry.options)
    if entry.bulk is None:
        return session
    large, from_rows = entry.bulk
    return ByRows(session, Session(large.model, large.device, large.options), from_rows)


def _faithful(row: Row, session: Session | ByRows, unseen: HeldOut, rows: int, gate: Gate) -> Row:
    """Compare with the original on unseen samples, one by one and in batches; the worse counts."""
    try:
        fidelity = fidelity_of(session, unseen, rows)
    except (PassFailed, SlipstreamError) as exc:
        return msgspec.structs.replace(_noted(row, f"fails on unseen samples: {exc}"), promise="broken")
    return msgspec.structs.replace(
        row, fidelity=fidelity, agreement_high=agreement_high(fidelity), promise=promise_kept(fidelity, gate)
    )


def _raced(row: Row, raced: Race) -> Row:
    others = raced.rows if row.name != OURS and raced.has(OURS) else ()
    against = tuple(Speed.of(raced.compare(OURS, row.name, rows)) for rows in others)
    cpu_ms = tuple(ms / rows for ms, rows in zip(raced.cpu_ms(row.name), raced.rows, strict=True))
    return msgspec.structs.replace(row, latency=raced.table(row.name), cpu_ms=cpu_ms, ours=against)
