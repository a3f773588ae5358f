"""What the comparison must show; pure."""

from collections.abc import Iterator, Sequence

from benchmarks.serving.results import Rate
from benchmarks.serving.systems import BARE, OURS, PLAIN, SLIPSTREAM, TRITON
from benchmarks.summary import Summary, Target, best_raw, cpu_ratio, find, p50_above_ms

BUSY = (16, 64)
SMALL = ("tiny", "wide")
MOST_OF_BARE, MOST_OF_PLAIN, MOST_OF_TRITON, MOST_OF_PLAIN_WIDE = 2.0, 0.15, 0.2, 0.25
_NEARLY_ALL = 0.95
MOST_ABOVE_RAW_MS, MOST_OF_RAW = 0.5, 1.10


def bars(summaries: Sequence[Summary], rates: Sequence[Rate]) -> list[Target]:
    """Return every promise that what was measured can judge, each as a value and its upper bound."""
    models = list(dict.fromkeys(s.case.workload for s in summaries))
    large = [model for model in models if model not in SMALL]
    return [
        *_small(summaries),
        *(bar for model in models if model != "wide" for bar in _alone(summaries, model)),
        *(bar for model in large for bar in _near_raw(summaries, model)),
        *(bar for model in large for bar in _ahead_closed(summaries, model)),
        *(bar for model in large for bar in _ahead_open(rates, model)),
    ]


def _small(summaries: Sequence[Summary]) -> Iterator[Target]:
    pairs = [("tiny", kind, BARE, kind, MOST_OF_BARE) for kind in ("json", "binary")]
    pairs += [("tiny", "json", PLAIN, "json", MOST_OF_PLAIN)]
    pairs += [("tiny", kind, TRITON, kind, MOST_OF_TRITON) for kind in ("json", "binary")]
    pairs += [("wide", "json", PLAIN, "json", MOST_OF_PLAIN_WIDE)]
    for model, kind, other, other_kind, most in pairs:
        for connections in BUSY:
            seen = find(summaries, model, SLIPSTREAM, kind, connections)
            base = find(summaries, model, other, other_kind, connections)
            if seen and base:
                text = f"1. {model}, {kind}, {connections} clients: CPU per request, of {other}'s"
                yield Target(text, _cpu_ratio(seen, base), most)


def _alone(summaries: Sequence[Summary], model: str) -> Iterator[Target]:
    seen, base = find(summaries, model, SLIPSTREAM, "binary", 1), find(summaries, model, "raw", "arrays", 1)
    if seen and base:
        text = f"2. {model}, binary, 1 client: p50 above raw session.run, ms"
        yield Target(text, _p50_above_ms(seen, base), MOST_ABOVE_RAW_MS)


def _near_raw(summaries: Sequence[Summary], model: str) -> Iterator[Target]:
    base = best_raw(summaries, model)
    for connections in BUSY:
        seen = find(summaries, model, SLIPSTREAM, "binary", connections)
        if seen and base:
            text = f"3. {model}, binary, {connections} clients: CPU per row, of raw session.run's at its best batch"
            yield Target(text, _cpu_ratio(seen, base), MOST_OF_RAW)


def _ahead_closed(summaries: Sequence[Summary], model: str) -> Iterator[Target]:
    for connections in BUSY:
        seen = find(summaries, model, SLIPSTREAM, "binary", connections)
        peers = [
            s
            for s in summaries
            if (s.case.workload, s.case.connections) == (model, connections)
            and s.case.system not in ("raw", BARE, *OURS)
        ]
        if seen and peers:
            fastest = max(peers, key=lambda s: s.rows_per_s)
            text = f"3. {model}, {connections} clients: requests/s of the best peer ({fastest.case.system}), of ours"
            yield Target(text, fastest.rows_per_s / seen.rows_per_s, 1.0)
            steadiest = min(peers, key=lambda s: s.p99_ms)
            text = f"3. {model}, {connections} clients: our p99, of the best peer's ({steadiest.case.system})"
            yield Target(text, seen.p99_ms / steadiest.p99_ms, 1.0)


def _ahead_open(rates: Sequence[Rate], model: str) -> Iterator[Target]:
    offered = [rate for rate in rates if rate.model == model]
    for burst, share in dict.fromkeys((rate.burst, rate.share) for rate in offered):
        there = [rate for rate in offered if (rate.burst, rate.share) == (burst, share)]
        seen = next((rate for rate in there if rate.system == SLIPSTREAM and not rate.skipped), None)
        peers = [rate for rate in there if rate.system not in OURS]
        if seen is None or not peers:
            continue
        arrivals = "Poisson" if burst == 1 else f"bursts of {burst}"
        place = f"3. {model}, {arrivals}, {share:g} of the reference"
        best = max(peers, key=lambda rate: rate.goodput)
        # Which of two servers that both keep up answers one request more is chance.
        if seen.goodput and best.goodput > 0:
            text = f"{place}: goodput of the best peer ({best.system}), of ours"
            yield Target(text, best.goodput / seen.goodput, 1.0 if share > 1 else 1.01)
        timely = [(rate.p99_ms, rate.system) for rate in peers if rate.p99_ms and _keeps_up(rate)]
        if seen.p99_ms and timely and _keeps_up(seen):
            least_ms, name = min(timely)
            yield Target(f"{place}: our p99, of the best peer's ({name})", seen.p99_ms / least_ms, 1.0)


def _cpu_ratio(seen: Summary, base: Summary) -> float:
    """Compare round by round; where one of them failed in a round, by the medians."""
    if len(seen.cpu_rounds_ms) != len(base.cpu_rounds_ms):
        return seen.cpu_ms / base.cpu_ms
    return cpu_ratio(seen, base)


def _p50_above_ms(seen: Summary, base: Summary) -> float:
    if len(seen.p50_rounds_ms) != len(base.p50_rounds_ms):
        return seen.p50_ms - base.p50_ms
    return p50_above_ms(seen, base)


def _keeps_up(rate: Rate) -> bool:
    """Whether p99 is of nearly all requests, and not of the few that were accepted."""
    return rate.in_time >= _NEARLY_ALL
