"""What a load test must reach: thresholds, and what of them was missed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtests.shapes import WARM_UP, Phase
from loadtests.tallies import FAILED, Tally


@dataclass(frozen=True, slots=True)
class Objective:
    """Thresholds; each is kept in every phase that is judged.

    Attributes:
        max_p99_ms: 99th percentile of the good answers; 0 is no limit.
        max_error_rate: Share of the requests that may fail, refusals not counted. Errors and wrong answers count in all
            phases but the warm-up, requests without an answer only where the others do, too.
        max_refused_share: Share of the requests that may be refused (429, 503, 504), where none should be.
        min_goodput_per_s: Good answers per second that the best phase must reach; 0 is no limit.
        slo_ms: By when an answer is in time, unless its request says so; 0: ``max_p99_ms``, or whenever it comes.
    """

    max_p99_ms: float = 0.0
    max_error_rate: float = 0.0
    max_refused_share: float = 0.01
    min_goodput_per_s: float = 0.0
    slo_ms: float = 0.0

    @property
    def deadline_ms(self) -> float:
        """By when an answer counts as good, where its request has no deadline of its own."""
        return self.slo_ms or self.max_p99_ms or math.inf

    def is_in_time(self, latency_ms: float, timeout_ms: float) -> bool:
        """Whether an answer counts as good; the request's own deadline is 0 without one."""
        return latency_ms <= (timeout_ms or self.deadline_ms)

    def missed(self, phases: Sequence[tuple[Phase, Tally]]) -> list[str]:
        """Say what was missed, and where.

        Args:
            phases: Those that took place, in order, with what was counted in each.
        """
        measured = [(phase, tally) for phase, tally in phases if phase.name != WARM_UP]
        texts = [f"{phase.name}: {text}" for phase, tally in measured for text in self._missed_in(phase, tally)]
        if not any(tally.answered for _, tally in measured):
            return ["no request was answered", *texts]
        goodput = max(tally.good / phase.seconds for phase, tally in measured)
        if goodput < self.min_goodput_per_s:
            texts.append(f"the best goodput is {goodput:.1f}/s, wanted are {self.min_goodput_per_s:g}")
        return texts

    def highest_held(self, steps: Sequence[tuple[Phase, Tally]]) -> float:
        """Return the rate in requests per second up to which no step misses anything; 0 if the first one does."""
        highest_per_s = 0.0
        for phase, tally in steps:
            if not tally.answered or self._missed_in(replace(phase, judged=True, may_refuse=False), tally):
                break
            highest_per_s = tally.asked / phase.seconds
        return highest_per_s

    def _missed_in(self, phase: Phase, tally: Tally) -> list[str]:
        asked = max(tally.asked, 1)
        texts = []
        failed = tally.failed if phase.judged else tally.outcomes[FAILED]
        if failed > self.max_error_rate * asked:
            texts.append(f"error rate is {failed / asked:.4f}, allowed is {self.max_error_rate:g}")
        if not phase.judged:
            return texts
        p99_ms = tally.percentile_ms(0.99)
        if self.max_p99_ms and p99_ms > self.max_p99_ms:
            texts.append(f"p99 is {p99_ms:.4g} ms, allowed are {self.max_p99_ms:g}")
        if not phase.may_refuse and tally.refused > self.max_refused_share * asked:
            texts.append(f"refused share is {tally.refused / asked:.4f}, allowed is {self.max_refused_share:g}")
        return texts
