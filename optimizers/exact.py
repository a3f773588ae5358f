"""The exact passes, kept one by one: each must give the same answers, and must not be slower than what it was given."""

from collections.abc import Callable, Sequence

import msgspec

from optimizers.building import Built, Chain, Line
from optimizers.isolation import Form
from optimizers.measurement import Comparison, RacePlan
from optimizers.passes import Pass
from optimizers.passes.catalog import MUST_GAIN, PREPARING, label_of
from optimizers.racing import Track
from optimizers.records import Speed
from optimizers.search import deciding_rows, mean_speedup, speed_of
from server.errors import SlipstreamError

FUSED = "fp32-fused"
_RACE_S = 1.5


def build_exact(
    line: Line, track: Track, steps: Sequence[Pass], seed: int, observe: Callable[[str, float], None]
) -> Built:
    """Run the exact passes and keep those whose result is right and not slower; return the FP32 form.

    What the quantizers build on (``PREPARING``) is kept even where it is slower: the untouched model is raced as well.

    Args:
        line: Builds chains.
        track: For short races.
        steps: The passes, in order.
        seed: Of the races.
        observe: Told the current pass and the share done.
    """
    best = _entrant(line, (), line.original)
    for number, step in enumerate(steps):
        observe(f"pass {label_of(step)}", number / len(steps))
        made, finding = line.apply(best.chain, best.form, step)
        if finding.failure or not finding.changed:
            continue
        after = _entrant(line, (*best.chain, step), made)
        try:
            speed = _compare(track, best, after, seed)
        except SlipstreamError as exc:
            line.annotate(step, best.chain, (), f"does not run: {exc}", status="refused")
            track.leave(after)
            continue
        kept = _is_kept(step, speed)
        line.annotate(step, best.chain, tuple(Speed.of(c) for c in speed), _left_out(speed) if not kept else "")
        track.leave(best if kept else after)
        best = after if kept else best
    track.leave(best)  # from here on it goes by its own name
    return msgspec.structs.replace(best, name=FUSED)


def _entrant(line: Line, chain: Chain, form: Form) -> Built:
    """Name a form by the passes that made it; forms of other runs are told apart by the original."""
    made_by = " > ".join(label_of(step) for step in chain) or line.original.sha256[:8]
    return Built(f"after {made_by}", "fp32", "cpu", exact=True, form=form, chain=chain)


def _is_kept(step: Pass, speed: Sequence[Comparison]) -> bool:
    if step.spec.name in MUST_GAIN:
        return speed_of(speed) == "faster"
    return step.spec.name in PREPARING or speed_of(speed) != "slower"


def _compare(track: Track, before: Built, after: Built, seed: int) -> tuple[Comparison, ...]:
    """Race a pass's result against its input."""
    names = [track.enter(before), track.enter(after)]
    rows = deciding_rows(tuple(track.batches))
    plan = RacePlan(budget_s=_RACE_S, min_rounds=9, least_rounds=7, max_rounds=25, seed=seed)
    raced = track.race(names, rows, plan, lambda _: None)
    return tuple(raced.compare(names[1], names[0], r) for r in rows)


def _left_out(speed: Sequence[Comparison]) -> str:
    seen = ", ".join(str(c) for c in speed)
    return f"left out: {mean_speedup(speed):.2f}x the speed of the form before it ({seen})"
