"""The track: who is open under which name, and which races are measured again."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from optimizers import racing
from optimizers.building import Built
from optimizers.isolation import Form
from optimizers.measurement import Race, RacePlan
from optimizers.racing import VALID_FOR, Track, batch_of, label_of, with_knobs
from optimizers.search import Knobs
from optimizers.store import Store
from server.artifact import SessionOptions, digest_of
from server.errors import InferenceFailed, SlipstreamError
from server.session import Session
from tests.models import save_mlp

PLAN = RacePlan(budget_s=0.0, min_rounds=3, least_rounds=3, max_rounds=3, sample_s=1e-5)
ROWS = (1, 8)


def singles_of(count: int = 12, width: int = 64) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, width)).astype(np.float32)} for _ in range(count)]


def track_of(model: Path, folder: Path, host: str = "host") -> Track:
    return Track(model, singles_of(), ROWS, Store(folder / "store"), host)


@pytest.fixture
def track(mlp: Path, tmp_path: Path) -> Iterator[Track]:
    made = track_of(mlp, tmp_path)
    yield made
    made.close()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Who took part in each race that was really measured."""
    races: list[tuple[str, ...]] = []
    measure = racing.race

    def race(sessions: dict, *arguments: object) -> Race:
        races.append(tuple(sessions))
        return measure(sessions, *arguments)

    monkeypatch.setattr(racing, "race", race)
    return races


def built_of(model: Path, name: str = "a", **form: object) -> Built:
    return Built(name, "fp32", "cpu", exact=True, form=replace(Form(model, digest_of(model)), **form))


def raced(track: Track, *labels: str, plan: RacePlan = PLAN, sizes: tuple[int, ...] = ROWS) -> Race:
    return track.race(labels or ("original",), sizes, plan, lambda _: None)


def test_race_measures_every_session_at_every_size(track: Track, mlp: Path):
    race = raced(track, "original", track.enter(built_of(mlp)))
    assert set(race.samples) == {(name, rows) for name in ("original", "a") for rows in ROWS}
    assert all(len(samples) == 3 for samples in race.samples.values())


def test_finished_race_is_not_measured_again(mlp: Path, tmp_path: Path, measured: list[tuple[str, ...]]):
    races = []
    for _ in range(2):
        track = track_of(mlp, tmp_path)
        races.append(raced(track, "original", track.enter(built_of(mlp))))
        track.close()
    assert races[0] == races[1]
    assert measured == [("original", "a")]


def test_race_of_yesterday_is_measured_again(track: Track, tmp_path: Path, measured: list[tuple[str, ...]]):
    before = raced(track)
    (file,) = tmp_path.glob("store/*/*/race.json")
    for age, runs in ((VALID_FOR - timedelta(hours=1), 1), (VALID_FOR + timedelta(seconds=1), 2)):
        stored = json.loads(file.read_bytes())
        stored["finished"] = (datetime.now(UTC) - age).isoformat()
        file.write_text(json.dumps(stored))
        raced(track)
        assert len(measured) == runs
    assert raced(track) != before
    assert len(measured) == 2, "the new result took the place of the old one"


@pytest.mark.parametrize("change", ["names", "sizes", "plan", "model", "options", "host", "shape of the samples"])
def test_another_race_is_measured(change: str, mlp: Path, tmp_path: Path, measured: list[tuple[str, ...]]):
    def run(change: str = "") -> None:
        other = save_mlp(tmp_path / "other.onnx", seed=1)
        track = track_of(mlp, tmp_path, "b" if change == "host" else "host")
        if change == "shape of the samples":
            track.batches[8] = batch_of(singles_of(), 9)
        options = {"options": SessionOptions(config={"session.x": "1"})} if change == "options" else {}
        label = track.enter(built_of(other if change == "model" else mlp, **options))
        plan = replace(PLAN, seed=1) if change == "plan" else PLAN
        labels = ("original",) if change == "names" else ("original", label)
        raced(track, *labels, plan=plan, sizes=(1,) if change == "sizes" else ROWS)
        track.close()

    run()
    run()
    assert len(measured) == 1
    run(change)
    assert len(measured) == 2


def test_session_of_a_form_is_opened_once(track: Track, mlp: Path):
    session = track.session(track.enter(built_of(mlp)))
    assert track.session(track.enter(built_of(mlp))) is session


def test_another_form_takes_the_place_of_the_one_with_its_name(track: Track, mlp: Path, tmp_path: Path):
    """The search repairs a candidate under its name; nobody may answer for it but its last form."""
    first = track.session(track.enter(built_of(mlp)))
    other = save_mlp(tmp_path / "other.onnx", seed=1)
    (single, *_) = singles_of()
    expected = first.run(single)["y"]
    label = track.enter(built_of(other))
    assert label == "a"
    assert not np.allclose(track.session(label).run(single)["y"], expected)
    with pytest.raises(InferenceFailed, match="closed"):
        first.run(single)
    track.enter(built_of(mlp))
    np.testing.assert_array_equal(track.session("a").run(single)["y"], expected)


def test_nobody_answers_for_a_form_that_does_not_open(track: Track, mlp: Path, tmp_path: Path):
    track.enter(built_of(mlp))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(SlipstreamError, match=r"bad\.onnx"):
        track.enter(built_of(tmp_path / "bad.onnx"))
    with pytest.raises(KeyError):
        track.session("a")
    assert track.enter(built_of(mlp)) == "a"


def test_form_that_fails_at_one_batch_size_is_not_entered(track: Track, tmp_path: Path, mlp: Path):
    model = onnx.load(mlp)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(InferenceFailed):
        track.enter(built_of(tmp_path / "fixed.onnx"))
    with pytest.raises(KeyError):
        track.session("a")


def test_settings_make_another_label_and_reach_the_session(track: Track, mlp: Path):
    knobs = Knobs(2, spinning=True, graph_level="basic")
    label = track.enter(built_of(mlp), knobs)
    assert label == label_of("a", knobs) == "a, 2 threads, spinning, graph level basic"
    assert track.enter(built_of(mlp)) == label_of("a", None) == "a"
    assert track.session(label) is not track.session("a")


def test_settings_leave_what_the_model_needs():
    needed = SessionOptions(config={"session.x": "1"}, graph_level="disable")
    assert with_knobs(needed, Knobs(2, spinning=True)) == SessionOptions(
        config={"session.x": "1"}, graph_level="all", intra_op_threads=2, spinning=True
    )


def test_sessions_that_spin_run_apart(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[frozenset[str]] = []

    def race(sessions: dict, batches: dict, spinning: frozenset[str], *_: object) -> Race:
        seen.append(spinning)
        return Race({})

    monkeypatch.setattr(racing, "race", race)
    track = track_of(mlp, tmp_path)
    labels = [track.enter(built_of(mlp), knobs) for knobs in (None, Knobs(2, spinning=True), Knobs(1, spinning=True))]
    raced(track, *labels)
    raced(track, "original", *labels)
    track.close()
    assert seen == [{"a, 2 threads, spinning"}, {"original", "a, 2 threads, spinning"}]


def test_placement_counts_operators_by_provider(track: Track, mlp: Path):
    assert track.placement(built_of(mlp)) == {"CPUExecutionProvider": {"MatMul": 1, "Gemm": 1, "Relu": 1}}


def test_rough_time_of_one_row_is_positive(track: Track, mlp: Path):
    assert 0 < track.quick_ms(built_of(mlp)) < 1000


def test_closing_closes_every_session(mlp: Path, tmp_path: Path):
    track = track_of(mlp, tmp_path)
    sessions = [track.session(label) for label in ("original", track.enter(built_of(mlp)))]
    track.close()
    for session in sessions:
        with pytest.raises(InferenceFailed, match="closed"):
            session.run(singles_of()[0])


def test_batch_repeats_samples_when_there_are_too_few():
    singles = singles_of(3)
    rows = np.concatenate([singles[i]["x"] for i in (0, 1, 2, 0, 1)])
    np.testing.assert_array_equal(batch_of(singles, 5)["x"], rows)
    assert batch_of(singles, 1) is singles[0]


def test_who_leaves_has_no_session_until_it_enters_again(track: Track, mlp: Path):
    built, (single, *_) = built_of(mlp), singles_of()
    left = track.session(track.enter(built))
    expected = left.run(single)["y"]
    track.leave(built)
    with pytest.raises(InferenceFailed, match="closed"):
        left.run(single)
    for forgotten in (track.session, track.cost):
        with pytest.raises(KeyError):
            forgotten("a")
    track.leave(built)  # twice does no harm
    np.testing.assert_array_equal(track.session(track.enter(built)).run(single)["y"], expected)


def test_race_of_who_left_and_came_back_is_not_measured_again(track: Track, mlp: Path, measured: list[tuple[str, ...]]):
    first = raced(track, "original", track.enter(built_of(mlp)))
    track.leave(built_of(mlp))
    assert raced(track, "original", track.enter(built_of(mlp))) == first
    assert len(measured) == 1


def test_other_settings_stay_when_the_plain_ones_leave(track: Track, mlp: Path):
    other = track.enter(built_of(mlp), Knobs(2))
    track.enter(built_of(mlp))
    track.leave(built_of(mlp))
    assert track.session(other).run(singles_of()[0])


def test_cost_names_every_batch_size_in_seconds(track: Track, mlp: Path):
    cost = track.cost(track.enter(built_of(mlp)))
    assert set(cost) == set(ROWS)
    assert all(0 < seconds < 1 for seconds in cost.values())


def test_session_that_fails_on_entering_is_closed(track: Track, mlp: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Session] = []

    def opened(*arguments: Any) -> Session:
        made.append(Session(*arguments))
        return made[-1]

    monkeypatch.setattr(racing, "Session", opened)
    track.batches[8] = {"x": np.zeros((8, 63), np.float32)}
    with pytest.raises(InferenceFailed):
        track.enter(built_of(mlp))
    with pytest.raises(InferenceFailed, match="closed"):
        made[0].run(singles_of()[0])
