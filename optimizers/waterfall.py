"""What each step of a candidate's chain did to speed and error. Pure, from the records.

Exact passes are raced one by one, so each has its own speed-up. A quantization and its repairs are raced as a whole:
their steps share one speed-up, and each has its own error.
"""

import math
from collections.abc import Sequence

import msgspec

from optimizers.records import UNTOUCHED, CandidateRecord, PassRecord, Report, Speed, mean_of
from optimizers.search import deciding_rows

_LEAST_SPAN = 1.25
_LONGEST_WHISKER = 3.0
_TOGETHER = "quantization and repair, together"


class Gain(msgspec.Struct, frozen=True):
    """A mean speed-up over the deciding batch sizes, with the means of the ends of its 95 % intervals."""

    speedup: float
    low: float
    high: float


class Bar(msgspec.Struct, frozen=True):
    """Where a bar and its whisker lie on the scale, in percent of its width."""

    left: float
    width: float
    low: float
    high: float


class Stage(msgspec.Struct, frozen=True):
    """One step of a chain.

    Attributes:
        label: The pass, or what a joint speed-up stands for.
        note: What it did.
        sqnr_db: Of the model behind it against the original, on the probe samples; ``None`` where it is unknown.
        gain: Against the form before it; ``None`` when the step was not raced by itself.
        total: Product of the speed-ups so far.
        bar: From the total before it to the total behind it; ``None`` without a speed-up.
    """

    label: str
    note: str
    sqnr_db: float | None
    gain: Gain | None = None
    total: float = 1.0
    bar: Bar | None = None


class Waterfall(msgspec.Struct, frozen=True):
    """A candidate's chain.

    Attributes:
        candidate: Its name.
        rows: The batch sizes that the speed-ups are means over.
        stages: The steps, in order.
        measured: The whole chain against the untouched file with the same session settings, from the latency race.
        bar: Of ``measured``.
        sqnr_db: On the held-out samples.
        origin: Position of 1x on the scale, in percent.
        ends: Speed-ups at both ends of the scale, which is logarithmic.
    """

    candidate: str
    rows: tuple[int, ...]
    stages: tuple[Stage, ...]
    measured: Gain | None
    bar: Bar | None
    sqnr_db: float | None
    origin: float
    ends: tuple[float, float]


def served_record(report: Report, variant: str) -> CandidateRecord | None:
    """Return the candidate behind a served variant, whose name may be another; ``None`` for the original."""
    behind = next((record.candidate for record in report.served if record.variant == variant), variant)
    return next((r for r in report.candidates if r.name == behind and r.verdict == "served"), None)


def waterfall(report: Report, candidate: CandidateRecord) -> Waterfall:
    """Attribute a candidate's speed and error to the passes of its chain."""
    steps = _steps(report, candidate)
    stages = _stages(report, candidate, steps)
    measured = _against(report, candidate, _named(report, UNTOUCHED))
    ends = _scale([stage for stage in stages if stage.gain is not None], measured)
    return Waterfall(
        candidate.name,
        deciding_rows(candidate.latency.rows) if candidate.latency is not None else (),
        tuple(_placed(stage, ends) for stage in stages),
        measured,
        _bar(1.0, measured.speedup, (measured.low, measured.high), ends) if measured is not None else None,
        candidate.fidelity.sqnr_db if candidate.fidelity is not None else None,
        _position(1.0, ends),
        ends,
    )


def _steps(report: Report, candidate: CandidateRecord) -> list[tuple[str, PassRecord | None]]:
    """Pair each pass of the chain with what it did behind the passes before it."""
    done = {(record.name, record.after): record for record in report.passes}
    chain = candidate.passes
    return [(label, done.get((label, chain[:index]))) for index, label in enumerate(chain)]


def _stages(report: Report, candidate: CandidateRecord, steps: Sequence[tuple[str, PassRecord | None]]) -> list[Stage]:
    # Passes were raced one by one on the CPU; that says nothing about a GPU.
    gains = [_mean(record.speed) if record and candidate.provider == "cpu" else None for _, record in steps]
    resolved = max((index + 1 for index, gain in enumerate(gains) if gain is not None), default=0)
    joint = _joint(report, candidate, resolved)
    alone = len(steps) - resolved == 1
    stages: list[Stage] = []
    total = 1.0
    for index, (label, record) in enumerate(steps):
        gain = joint if alone and index == resolved else gains[index]
        total *= gain.speedup if gain is not None else 1.0
        sqnr_db = record.sqnr_db if record is not None else None
        stages.append(Stage(label, _note(record), sqnr_db, gain, total))
    if joint is not None and len(steps) - resolved > 1:
        stages.append(Stage(_TOGETHER, "", stages[-1].sqnr_db, joint, total * joint.speedup))
    return stages


def _note(record: PassRecord | None) -> str:
    if record is None:
        return ""
    return record.reason or ", ".join(f"{what}: {count}" for what, count in record.counts.items())


def _joint(report: Report, candidate: CandidateRecord, resolved: int) -> Gain | None:
    """Return the speed-up of the steps that were not raced one by one over the form before them, if that was raced."""
    if resolved == len(candidate.passes):
        return None
    for record in report.candidates:
        settings = (record.passes, record.provider, record.threads)
        if settings == (candidate.passes[:resolved], candidate.provider, candidate.threads):
            return _against(report, candidate, record)
    return None


def _against(report: Report, candidate: CandidateRecord, base: CandidateRecord | None) -> Gain | None:
    """Compare with another form: paired by round where that was recorded, else by the medians of the same race."""
    paired = _mean(candidate.against_exact) if base is not None and base is _beaten(report, candidate) else None
    return paired or _raced(base, candidate)


def _beaten(report: Report, candidate: CandidateRecord) -> CandidateRecord | None:
    """Return the form that ``against_exact`` of a candidate refers to, where that is certain."""
    rivals = [
        record
        for record in report.candidates
        if record is not candidate
        and (record.provider, record.threads) == (candidate.provider, candidate.threads)
        and (record.verdict == "served" or record.name == UNTOUCHED)
        and _is_exact(report, record)
    ]
    if _is_exact(report, candidate):  # judged against the exact forms before it, of which the portable ones come first
        rivals = [record for record in rivals if not record.host_bound]
        if not candidate.host_bound and len(rivals) > 1:
            return None
    return max(rivals, key=lambda record: (record.host_bound, bool(record.passes)), default=None)


def _is_exact(report: Report, record: CandidateRecord) -> bool:
    effects = [step.effect if step is not None else "lossy" for _, step in _steps(report, record)]
    return record.precision == "fp32" and "lossy" not in effects


def _named(report: Report, name: str) -> CandidateRecord | None:
    return next((record for record in report.candidates if record.name == name), None)


def _mean(speeds: Sequence[Speed]) -> Gain | None:
    if not speeds:
        return None
    low, high = (
        mean_of([msgspec.structs.replace(s, speedup=end) for s, end in zip(speeds, ends, strict=True)])
        for ends in ([s.low for s in speeds], [s.high for s in speeds])
    )
    return Gain(mean_of(speeds), low, high)


def _raced(base: CandidateRecord | None, candidate: CandidateRecord) -> Gain | None:
    """Compare medians of the same race; the interval joins those of both medians, so it is wider than a paired one."""
    if base is None or base is candidate or base.latency is None or candidate.latency is None:
        return None
    before, after = base.latency, candidate.latency
    rows = [r for r in deciding_rows(after.rows) if r in before.rows]
    pairs = [(before.rows.index(r), after.rows.index(r)) for r in rows]
    if not pairs:
        return None
    middle = [_log(before.p50_ms[i], after.p50_ms[j]) for i, j in pairs]
    low = [_log(before.low_ms[i], after.high_ms[j]) for i, j in pairs]
    high = [_log(before.high_ms[i], after.low_ms[j]) for i, j in pairs]
    return Gain(*(math.exp(sum(logs) / len(logs)) for logs in (middle, low, high)))


def _log(before_ms: float, after_ms: float) -> float:
    return math.log(max(before_ms, 1e-9) / max(after_ms, 1e-9))


def _ends(stage: Stage) -> tuple[float, ...]:
    if stage.gain is None:
        return ()
    before = stage.total / stage.gain.speedup
    return (before, stage.total, before * stage.gain.low, before * stage.gain.high)


def _scale(stages: Sequence[Stage], measured: Gain | None) -> tuple[float, float]:
    """Return the ends of a scale that holds all bars, and their whiskers unless these are very long."""
    reached = [1.0]
    for total, *whisker in [
        *(_ends(s)[1:] for s in stages),
        *([msgspec.structs.astuple(measured)] if measured else []),
    ]:
        reached += [min(max(end, total / _LONGEST_WHISKER), total * _LONGEST_WHISKER) for end in (total, *whisker)]
    low, high = min(reached), max(reached)
    spare = max(_LEAST_SPAN / (high / low), 1.05) ** 0.5
    return (low / spare, high * spare)


def _placed(stage: Stage, ends: tuple[float, float]) -> Stage:
    if stage.gain is None:
        return stage
    before, after, low, high = _ends(stage)
    return msgspec.structs.replace(stage, bar=_bar(before, after, (low, high), ends))


def _bar(before: float, after: float, whisker: tuple[float, float], ends: tuple[float, float]) -> Bar:
    left, right = sorted((_position(before, ends), _position(after, ends)))
    return Bar(left, right - left, _position(whisker[0], ends), _position(whisker[1], ends))


def _position(value: float, ends: tuple[float, float]) -> float:
    share = math.log(value / ends[0]) / math.log(ends[1] / ends[0])
    return 100 * min(max(share, 0.0), 1.0)
