"""How long comparisons and races of a candidate will take, from the times of single runs. Pure.

The figures are rough, and rather too high than too low: they decide whether something is started, and about what is
measured they say nothing.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

Cost = Mapping[int, float]
"""Batch size -> seconds of one run; holds 1 at least."""

_ROUNDS = 7
"""Of a race that has too little time for more: five rounds, and two runs to warm up."""

_RACES = 3
"""Races at all batch sizes; a trial has more, which leave out sizes or candidates and add up to as much."""

_SETTINGS = 1
"""Further races for a candidate that may be served: it tries other session settings."""

_MEMORY_S = 1.0
"""To measure the memory of a session in a process of its own."""


class Forecast(msgspec.Struct, frozen=True):
    """Predicts what follows from the costs of candidates.

    Attributes:
        search: Number of search samples.
        held_out: Number of held-out samples.
        rows: Largest batch that will be served; 1 where rows must not share a run.
        workers: Runs at a time.
    """

    search: int
    held_out: int
    rows: int
    workers: int

    def glance_s(self, cost: Cost) -> float:
        """Return the seconds of a comparison on the search samples, in full batches."""
        return self.search * self._batched_s(cost) / self.workers

    def proof_s(self, cost: Cost) -> float:
        """Return the seconds of a comparison on the held-out samples, one by one and in full batches."""
        batched_s = self._batched_s(cost) if self.rows > 1 else 0.0
        return self.held_out * (cost[1] + batched_s) / self.workers

    def race_s(self, costs: Sequence[Cost], sizes: Collection[int], budget_s: float = 0.0) -> float:
        """Return the seconds of one race.

        Args:
            costs: Of those that take part.
            sizes: Batch sizes.
            budget_s: What the race may take; its least number of rounds may take longer.
        """
        return max(budget_s, _ROUNDS * sum(cost[rows] for cost in costs for rows in sizes))

    def races_s(self, costs: Sequence[Cost], budget_s: float = 0.0) -> float:
        """Return the seconds of all races of a trial, and of measuring memory; see ``race_s``."""
        return max(budget_s, _RACES * self.race_s(costs, costs[0])) + _MEMORY_S * len(costs)

    def trial_s(self, cost: Cost) -> float:
        """Return the seconds that one candidate adds to a trial."""
        return self.proof_s(cost) + self.races_s([cost]) + _SETTINGS * self.race_s([cost], cost)

    def _batched_s(self, cost: Cost) -> float:
        return cost[self.rows] / self.rows
