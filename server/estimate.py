"""What the runs of a lane take: its measured table, corrected by what is seen while it serves. Pure.

Clocks change, neighbours come, inputs get longer: a table alone grows wrong. Each batch corrects it: an exponentially
weighted mean of the ratio of seen to measured time per size of batch (the expectation), and the 99th percentile of the
last ratios to that expectation (what a deadline may count on). Lanes without a table learn one, size by size.
"""

from collections import deque

import msgspec
import numpy as np

from server.artifact import LatencyTable

_WEIGHT = 0.1
"""Of the newest batch in the mean: about the last twenty count."""

_LEARNED = 3
"""Batches after which a lane without a table predicts."""

_WINDOW = 128
_REFRESH = 16
_MOST_RATIO = 20.0
"""One batch beside a suspended process says nothing about the next one."""


class Estimate:
    """Predicts the run times of a lane, or of several that are alike.

    Args:
        table: Measured on this host; ``None`` learns from what is observed.

    Attributes:
        learned: Batches that changed the table itself.
    """

    def __init__(self, table: LatencyTable | None) -> None:
        self._table = table
        self._overall = 1.0
        # By the binary length of the number of rows: 1, 2-3, 4-7, ... ; ``None`` where nothing was seen.
        self._factors: list[float | None] = []
        self._ratios: deque[float] = deque(maxlen=_WINDOW)
        self._spread = 1.0 if table is None else _spread_of(table)
        self._seen = self.learned = 0
        self._learning: dict[int, tuple[float, float]] = {}
        self._expected_s: dict[int, float] = {}  # by rows, since the last observation: many requests ask between two

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self._table is not None

    def best_rows(self, most: int) -> int:
        """Return the batch size of the table, at most ``most``, beyond which a larger one pays no more."""
        if self._table is None:
            return most
        factors = [self._factor(rows) for rows in self._table.rows]
        seen_ms = tuple(ms * factor for ms, factor in zip(self._table.p50_ms, factors, strict=True))
        return min(msgspec.structs.replace(self._table, p50_ms=seen_ms).paying_rows(), most)

    def run_s(self, rows: int) -> float:
        """Expect a run time in seconds; 0 while nothing is known."""
        expected_s = self._expected_s.get(rows)
        if expected_s is None:
            if self._table is None:
                return 0.0
            expected_s = self._expected_s[rows] = self._table.predict_s(rows) * self._factor(rows)
        return expected_s

    def safe_s(self, rows: int) -> float:
        """Return the seconds that 99 of 100 runs keep; 0 while nothing is known."""
        return self.run_s(rows) * self._spread

    def observe(self, rows: int, seconds: float) -> float | None:
        """Learn from a finished run; return the ratio of what it took to what was expected, if anything was."""
        if self._table is None or (self._learning and rows.bit_length() not in self._learning):
            self._learn(rows, seconds)
            return None
        expected_s = self.run_s(rows)
        ratio = min(seconds / max(expected_s, 1e-9), _MOST_RATIO)
        self._expected_s.clear()
        self._ratios.append(ratio)
        self._correct(rows, ratio)
        self._seen += 1
        if self._seen % _REFRESH == 0:
            # As an order statistic: numpy would take as long for it as a tiny model for its run.
            self._spread = max(1.0, sorted(self._ratios)[int(0.99 * (len(self._ratios) - 1))])
        return ratio

    def _factor(self, rows: int) -> float:
        size = rows.bit_length()
        found = self._factors[size] if size < len(self._factors) else None
        return self._overall if found is None else found

    def _correct(self, rows: int, ratio: float) -> None:
        size = rows.bit_length()
        self._factors.extend([None] * (size + 1 - len(self._factors)))
        old = self._factor(rows)
        seen = old * ratio
        self._factors[size] = old + _WEIGHT * (seen - old)
        self._overall += _WEIGHT * (seen - self._overall)

    def _learn(self, rows: int, seconds: float) -> None:
        """Keep the mean of each size; with enough batches they become the table, and each new size enters it."""
        size = rows.bit_length()
        for known, (mean_rows, mean_s) in self._learning.items():  # as they were corrected since
            self._learning[known] = (mean_rows, mean_s * self._factor(round(mean_rows)))
        mean_rows, mean_s = self._learning.get(size, (float(rows), seconds))
        self._learning[size] = (mean_rows + 0.5 * (rows - mean_rows), mean_s + 0.5 * (seconds - mean_s))
        self._factors.clear()
        self._expected_s.clear()
        self._overall = 1.0
        self.learned += 1
        if self.learned >= _LEARNED:
            sizes = sorted((max(1, round(r)), s * 1e3) for r, s in self._learning.values())
            columns = tuple(ms for _, ms in sizes)
            self._table = LatencyTable(tuple(r for r, _ in sizes), columns, columns, columns, columns)


def _spread_of(table: LatencyTable) -> float:
    ratios = [p99 / max(p50, 1e-9) for p50, p99 in zip(table.p50_ms, table.p99_ms, strict=True)]
    return max(1.0, float(np.median(ratios)))
