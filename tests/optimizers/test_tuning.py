from pathlib import Path

import pytest
from msgspec.structs import replace

from optimizers.building import Built
from optimizers.isolation import Form
from optimizers.search import KnobChoice, Knobs
from optimizers.tuning import Tried, alternatives, open_alternatives
from server.artifact import SessionOptions, digest_of
from server.errors import UnsupportedModel

SPINNING, THREADS, BASIC = Knobs(2, spinning=True), Knobs(2), Knobs(graph_level="basic")


class FakeTrack:
    """Opens sessions that each take 100 bytes of a memory."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.failing: list[Knobs] = []

    def enter(self, built: Built, knobs: Knobs) -> str:
        if knobs in self.failing:
            raise UnsupportedModel("no such kernel")
        self.free -= 100
        return f"{built.name}, {knobs}"


@pytest.fixture
def built(mlp: Path) -> Built:
    return Built("fp32", "fp32", "cpu", exact=True, form=Form(mlp, digest_of(mlp)))


def test_build_for_this_cpu_keeps_its_graph_level(built: Built):
    form = replace(built.form, options=SessionOptions(graph_level="disable"))
    bound = replace(built, form=form, host_bound=True)
    assert {knobs.graph_level for knobs in alternatives(bound, 2)} == {"disable"}
    assert alternatives(replace(bound, provider="cuda"), 2) == []
    assert BASIC in alternatives(built, 1)
    assert SPINNING in alternatives(built, 2)
    assert SPINNING not in alternatives(built, 2, may_spin=False)


@pytest.mark.parametrize(("free", "opened"), [(124, 0), (125, 1), (225, 2), (325, 3)])
def test_settings_are_opened_while_they_fit_into_the_free_memory(built: Built, free: int, opened: int):
    track, settings = FakeTrack(free), [THREADS, SPINNING, BASIC]
    tried = open_alternatives(track, built, settings, 100, lambda: track.free)
    assert tried.labels == {knobs: f"fp32, {knobs}" for knobs in settings[:opened]}
    assert tried.left_out == tuple(settings[opened:])


@pytest.mark.parametrize(("session_bytes", "free"), [(None, 1), (100, 0)])
def test_memory_that_is_not_known_leaves_nothing_out(built: Built, session_bytes: int | None, free: int):
    tried = open_alternatives(FakeTrack(0), built, [THREADS, BASIC], session_bytes, lambda: free)
    assert list(tried.labels) == [THREADS, BASIC]
    assert tried.left_out == ()


def test_setting_that_does_not_open_is_passed_over(built: Built):
    track = FakeTrack(1000)
    track.failing.append(THREADS)
    tried = open_alternatives(track, built, [THREADS, BASIC], 100, lambda: track.free)
    assert (list(tried.labels), tried.left_out) == ([BASIC], ())


def test_choice_says_what_was_left_out():
    choice = KnobChoice("fp32", BASIC, "chosen")
    assert Tried({}, ()).noted(choice) is choice
    assert Tried({}, (THREADS,)).noted(choice).reason == (
        f"chosen; not tried, another session does not fit into the free memory: {THREADS}"
    )
