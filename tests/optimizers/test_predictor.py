"""The predictor: it learns an order from measurements and never claims more than it saw."""

import math
from pathlib import Path

from optimizers.predictor import Experience, add_experiences, features_of, in_order, predict, read_experiences

SMALL = features_of({"MatMul": 2, "Add": 2}, 10_000, 0.01)
LARGE = features_of({"MatMul": 40, "Add": 60}, 90_000_000, 20.0)
CONV = features_of({"Conv": 50, "Relu": 49}, 18_000_000, 12.0)


def lived(family: str, *pairs: tuple[tuple[float, ...], float]) -> list[Experience]:
    return [Experience(family, features, speedup) for features, speedup in pairs]


DYNAMIC = lived("int8-dynamic", (SMALL, 0.7), (SMALL, 0.75), (LARGE, 1.5), (LARGE, 1.6), (CONV, 0.9))


def test_learns_that_large_models_gain_and_small_ones_do_not() -> None:
    small, large = predict(DYNAMIC, "int8-dynamic", SMALL), predict(DYNAMIC, "int8-dynamic", LARGE)
    assert small is not None
    assert large is not None
    assert small < 0 < large


def test_without_enough_experience_there_is_no_guess() -> None:
    assert predict(DYNAMIC[:2], "int8-dynamic", SMALL) is None
    assert predict(DYNAMIC, "int8-static", SMALL) is None


def test_guess_stays_within_what_was_seen() -> None:
    giant = features_of({"MatMul": 4000}, 10**12, 1e5)
    guess = predict(DYNAMIC, "int8-dynamic", giant)
    assert guess is not None
    assert math.log(0.7) <= guess <= math.log(1.6)


def test_what_paid_before_is_tried_first_and_what_never_paid_last() -> None:
    never = lived("fp16", (LARGE, 0.9), (LARGE, 0.91), (CONV, 0.8))
    order = in_order(["fp16", "low-rank", "int8-dynamic"], [*DYNAMIC, *never], LARGE)
    assert order == ["int8-dynamic", "low-rank", "fp16"]


def test_without_experience_the_usual_order_stays() -> None:
    assert in_order(["c", "a", "b"], [], LARGE) == ["c", "a", "b"]


def test_experience_survives_in_a_file_with_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "experience.jsonl"
    add_experiences(file, DYNAMIC[:2])
    with file.open("ab") as out:
        out.write(b'{"family": "int8-dyn\n')
    add_experiences(file, DYNAMIC[2:])
    assert read_experiences(file) == DYNAMIC
    assert read_experiences(tmp_path / "none") == []
