"""One run of the comparison: which server is started when, and what is kept of it."""

from collections.abc import Callable, Sequence

from benchmarks.raw import RawSession
from benchmarks.servers import ServerFailed
from benchmarks.serving.ablations import Ablation, ablate
from benchmarks.serving.bars import bars
from benchmarks.serving.loads import at_rest, closed_loops, open_loops
from benchmarks.serving.material import Material
from benchmarks.serving.results import (
    Ablated,
    Comparison,
    Failure,
    Rate,
    Start,
    reference_of,
    round_of,
)
from benchmarks.serving.systems import OURS, System, started
from benchmarks.summary import Case, Measurement, Summary, summarize

ABLATION_ROUNDS = 2
_FAILURES = (ServerFailed, ValueError, KeyError)
"""A server that fails, and one whose answers cannot be read."""


class Run:
    """Collects what is measured. A server that fails is noted, and the run goes on.

    Args:
        systems: Which take part, in the order of the first round.
        rounds: Of closed loops.
        seconds: Of a closed loop.
        say: Told of every step.
    """

    def __init__(self, systems: Sequence[System], rounds: int, seconds: float, say: Callable[[str], None]) -> None:
        self._rounds, self._seconds, self._say = rounds, seconds, say
        self._measured: dict[Case, list[Measurement]] = {}
        self._references: dict[str, tuple[float, str]] = {}
        self._starts: list[Start] = []
        self._rates: list[Rate] = []
        self._ablations: list[Ablated] = []
        self._failures: list[Failure] = []
        self._systems: list[System] = []
        for system in systems:
            if system.missing:
                self._fail("every model", system, system.missing)
            else:
                self._systems.append(system)

    def closed(self, materials: Sequence[Material]) -> None:
        """Measure raw sessions and closed loops, the order reversed in every other round."""
        raws = {material.name: RawSession(material.workload) for material in materials}
        best = {
            material.name: raws[material.name].best_rows(
                material.workload.lanes, self._seconds * material.closed_scale / 4
            )
            for material in materials
        }
        for number in range(self._rounds):
            turn = order(self._systems, number)
            for material in materials:
                self._raw(material, raws[material.name], best[material.name])
                for system in turn:
                    if system.optimized and material.optimized is None:
                        continue
                    self._say(f"round {number + 1} of {self._rounds}: {material.name}, {system.name}")
                    self._closed(system, material)

    def open(self, materials: Sequence[Material]) -> None:
        """Offer rising rates to each server in turn; closed loops must have been measured."""
        silent = [system.name for system in self._systems if not system.answers]
        for material in materials:
            if not material.slo_ms:
                continue
            try:
                self._references[material.name] = reference_of(self._summaries(), material.name, OURS, silent)
            except ValueError as exc:
                self._say(f"{material.name}: no open loop, {exc}")
                continue
            for system in self._systems:
                if system.answers and not (system.optimized and material.optimized is None):
                    self._say(f"open loop: {material.name}, {system.name}")
                    self._open(system, material)

    def ablations(self, materials: Sequence[Material], ablations: Sequence[Ablation]) -> None:
        """Measure what the server is without each of its ideas."""
        rounds = min(ABLATION_ROUNDS, self._rounds)
        for ablation in ablations:
            for material in materials:
                if material.name in ablation.models:
                    self._say(f"without: {ablation.idea}, {material.name}")
                    try:
                        self._ablations.append(ablate(ablation, material, rounds, self._seconds))
                    except _FAILURES as exc:
                        self._failures.append(Failure(material.name, f"without {ablation.idea}", str(exc)))

    def comparison(self, header: dict[str, str]) -> Comparison:
        """Return everything."""
        summaries = self._summaries()
        return Comparison(
            header=header,
            systems={system.name: system.about for system in self._systems},
            references=self._references,
            summaries=summaries,
            rounds={f"{c.workload}: {c.label}": [round_of(m) for m in found] for c, found in self._measured.items()},
            starts=self._starts,
            rates=self._rates,
            ablations=self._ablations,
            bars=bars(summaries, self._rates),
            failures=self._failures,
        )

    def _summaries(self) -> list[Summary]:
        return [summarize(case, found) for case, found in self._measured.items()]

    def _raw(self, material: Material, raw: RawSession, best: int) -> None:
        lanes = material.workload.lanes
        for rows, at_once in ((1, 1), (1, lanes), (best, lanes)):
            times_ms, cpu_s, span_s = raw.run(rows, at_once, self._seconds * material.closed_scale)
            case = Case(material.name, "raw", "arrays", at_once, rows)
            self._keep(case, Measurement(len(times_ms), span_s, cpu_s, 0.0, times_ms))

    def _closed(self, system: System, material: Material) -> None:
        if system.rounds and self._seen(system, material) >= system.rounds:
            return
        try:
            with started(system, material) as server:
                for case, measured in closed_loops(system, material, server, self._seconds * material.closed_scale):
                    self._keep(case, measured)
                self._starts.append(at_rest(system, material, server))
        except _FAILURES as exc:
            self._fail(material.name, system, str(exc))

    def _open(self, system: System, material: Material) -> None:
        seconds = self._seconds * material.open_scale
        try:
            with started(system, material, material.slo_ms) as server:
                reference, _ = self._references[material.name]
                self._rates += open_loops(system, material, server, reference, seconds)
        except _FAILURES as exc:
            self._fail(material.name, system, str(exc))

    def _seen(self, system: System, material: Material) -> int:
        return sum((start.model, start.system) == (material.name, system.name) for start in self._starts)

    def _keep(self, case: Case, measured: Measurement) -> None:
        self._measured.setdefault(case, []).append(measured)

    def _fail(self, model: str, system: System, why: str) -> None:
        self._say(f"{model}, {system.name}: {why}")
        self._failures.append(Failure(model, system.name, why))


def order(systems: Sequence[System], number: int) -> list[System]:
    """Return the order of a round."""
    return list(systems) if number % 2 == 0 else list(reversed(systems))
