"""Shapes that an engine was not built for."""

from pathlib import Path

import numpy as np
import pytest

from server.artifact import Profile, SessionOptions
from server.errors import InferenceFailed
from server.providers import CPU
from server.ranged import RangedSession, covers
from server.session import Session
from tests import models

PROFILE = Profile({"x": (2, 64)}, {"x": (4, 64)}, {"x": (8, 64)})


@pytest.mark.parametrize(("rows", "is_covered"), [(1, False), (2, True), (8, True), (9, False)])
def test_profile_covers_its_bounds(rows, is_covered):
    assert covers(PROFILE, {"x": np.zeros((rows, 64))}) == is_covered


def test_profile_covers_no_other_rank_and_every_input_that_it_leaves_out():
    assert not covers(PROFILE, {"x": np.zeros(64)})
    assert covers(PROFILE, {"x": np.zeros((2, 64)), "y": np.zeros(100)})


def test_what_the_profile_leaves_out_runs_on_the_source(tmp_path: Path, caplog):
    engine, source = (
        Session(models.save_mlp(tmp_path / f"{seed}.onnx", seed=seed), CPU, SessionOptions()) for seed in (0, 1)
    )
    session = RangedSession(engine, PROFILE, source)
    for rows, runs in ((2, engine), (8, engine), (1, source), (9, source)):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        assert (session.run({"x": x}, ("y",))["y"] == runs.run({"x": x})["y"]).all()
    assert caplog.text.count("shapes {'x': [1, 64]} lie outside of the engine's profile, up to {'x': [8, 64]}") == 1
    session.close()
    with pytest.raises(InferenceFailed, match="is closed"):
        session.run({"x": np.zeros((2, 64), np.float32)})
    assert source.run({"x": np.zeros((1, 64), np.float32)})["y"].shape == (1, 10), "it belongs to someone else"
