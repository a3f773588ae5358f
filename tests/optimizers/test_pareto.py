"""The Pareto set and the policy: who is dominated, who is better by which objective."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizers.pareto import Standing, dominates, gain, pareto, standing_of
from server.artifact import LatencyTable

TABLE = LatencyTable((1, 2, 4, 8), (10, 12, 16, 31), (11, 13, 18, 40), (9, 11, 15, 30), (11, 13, 17, 32))


def standing(name: str = "a", **changes) -> Standing:
    values = {"p99_ms": 10.0, "rows_per_s": 100.0, "best_rows": 4, "size_bytes": 1000, "agreement": 1.0}
    return Standing(name, **(values | changes))


def test_standing_takes_the_best_rate_and_its_smallest_batch() -> None:
    seen = standing_of("a", TABLE, 5, 0.99, 7)
    assert (seen.p99_ms, seen.best_rows, seen.size_bytes, seen.memory_bytes) == (11, 4, 5, 7)
    assert seen.rows_per_s == pytest.approx(8 / 31e-3)


def test_batches_beyond_the_wanted_p99_do_not_count() -> None:
    assert standing_of("a", TABLE, 5, 1.0, slo_ms=18).rows_per_s == pytest.approx(4 / 16e-3)
    assert standing_of("a", TABLE, 5, 1.0, slo_ms=1).rows_per_s == pytest.approx(1 / 10e-3)


@pytest.mark.parametrize(
    "changes", [{"p99_ms": 8.0}, {"rows_per_s": 120.0}, {"size_bytes": 900}, {"agreement": 1.0, "p99_ms": 9.0}]
)
def test_better_in_one_and_equal_in_the_rest_dominates(changes: dict) -> None:
    assert dominates(standing(**changes), standing("b"))
    assert not dominates(standing("b"), standing(**changes))


def test_differences_within_noise_do_not_count() -> None:
    assert not dominates(standing(p99_ms=9.7, rows_per_s=103.0), standing("b"))


def test_less_faithful_never_dominates() -> None:
    assert not dominates(standing(p99_ms=1.0, rows_per_s=1000.0, size_bytes=1, agreement=0.999), standing("b"))


def test_memory_counts_where_both_were_measured() -> None:
    assert dominates(standing(memory_bytes=100), standing("b", memory_bytes=200))
    assert not dominates(standing(memory_bytes=100), standing("b"))


def test_pareto_set_keeps_each_best_of_its_kind() -> None:
    fast, small = standing("fast", p99_ms=2.0, agreement=0.99), standing("small", size_bytes=10, agreement=0.99)
    exact, worse = standing("exact"), standing("worse", p99_ms=20.0, agreement=0.98)
    assert pareto([exact, fast, small, worse]) == ("exact", "fast", "small")


@given(
    st.lists(
        st.tuples(st.floats(0.1, 100), st.floats(1, 1000), st.integers(1, 10**9), st.floats(0, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_nobody_dominates_whom_it_is_dominated_by(values: list[tuple[float, float, int, float]]) -> None:
    standings = [Standing(str(i), p, r, 1, s, a) for i, (p, r, s, a) in enumerate(values)]
    assert not any(dominates(x, y) and dominates(y, x) for x in standings for y in standings)
    assert not any(dominates(x, x) for x in standings)


def test_gain_by_each_objective() -> None:
    base, other = standing("base", memory_bytes=400), standing(rows_per_s=150.0, size_bytes=250, memory_bytes=100)
    assert gain(other, base, "latency", 1.3) == 1.3
    assert gain(other, base, "throughput", 1.3) == pytest.approx(1.5)
    assert gain(other, base, "size", 1.3) == 4
    assert gain(other, base, "memory", 1.3) == 4
    assert gain(standing(size_bytes=500), base, "memory", 1.3) == 2  # not measured: by size
