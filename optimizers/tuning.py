"""The session settings that a served variant tries beside the plain ones, as far as there is memory for them."""

from collections.abc import Callable, Sequence

import msgspec

from optimizers.building import Built
from optimizers.racing import Track
from optimizers.search import KnobChoice, Knobs
from server.errors import SlipstreamError
from server.host import available_memory_bytes
from server.providers import CPU

LEAST_SPINNING_MS = 0.1
"""Waking a thread costs a share of longer runs; runs as short as this are over before another thread helps."""

MEMORY_SHARE = 0.8
"""Of the free memory: what a run may take."""


class Tried(msgspec.Struct, frozen=True):
    """Session settings of one variant.

    Attributes:
        labels: Settings that are open -> label in races.
        left_out: Settings for which there was no memory.
    """

    labels: dict[Knobs, str]
    left_out: tuple[Knobs, ...]

    def noted(self, choice: KnobChoice) -> KnobChoice:
        """Return a choice among these settings whose reason also says what was left out."""
        if not self.left_out:
            return choice
        names = "; ".join(str(knobs) for knobs in self.left_out)
        reason = f"{choice.reason}; not tried, another session does not fit into the free memory: {names}"
        return msgspec.structs.replace(choice, reason=reason)


def alternatives(built: Built, cores: int, *, may_spin: bool = True) -> list[Knobs]:
    """Return the session settings to try for a variant beside the plain ones."""
    if built.provider != CPU.kind:
        return []
    level = built.options.graph_level
    found = [Knobs(cores, False, level)] if cores > 1 else []
    found += [Knobs(cores, True, level)] if cores > 1 and may_spin else []
    return found if built.host_bound else [*found, Knobs(graph_level="extended"), Knobs(graph_level="basic")]


def open_alternatives(
    track: Track,
    built: Built,
    settings: Sequence[Knobs],
    session_bytes: int | None,
    free_bytes: Callable[[], int] = available_memory_bytes,
) -> Tried:
    """Open a variant with other settings, one session each, while they fit into the free memory.

    A setting with which it does not open or run is passed over: it is an alternative only, the plain ones are proven.

    Args:
        track: Where the sessions are opened.
        built: The variant.
        settings: What to try, the most promising first.
        session_bytes: What one session takes; ``None`` when that was not measured, and then nothing is left out.
        free_bytes: Tells the memory that is free; 0 when unknown, and then nothing is left out.
    """
    labels: dict[Knobs, str] = {}
    left_out: list[Knobs] = []
    for knobs in settings:
        free = free_bytes()
        if free and (session_bytes or 0) > MEMORY_SHARE * free:
            left_out.append(knobs)
            continue
        try:
            labels[knobs] = track.enter(built, knobs)
        except SlipstreamError:
            continue
    return Tried(labels, tuple(left_out))
