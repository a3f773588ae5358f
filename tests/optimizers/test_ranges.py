import numpy as np
import pytest

from optimizers.passes.ranges import BINS, Histogram, entropy_range, mse_range, percentile_range, range_of

METHODS = ("minmax", "percentile", "entropy", "mse")
NORMAL = np.random.default_rng(0).standard_normal(100_000)
UNIFORM = np.random.default_rng(1).uniform(-1, 1, 100_000)


def histogram(values: np.ndarray) -> Histogram:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    present = values[values != 0]
    return Histogram(np.histogram(present, BINS, (low, high))[0], low, high)


def rounded(values: np.ndarray, low: float, high: float, levels: int = 256) -> np.ndarray:
    step = (high - low) / (levels - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, levels - 1) - zero) * step


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    return float(np.mean((values - rounded(values, low, high)) ** 2))


def heavy_tailed(seed: int = 2) -> np.ndarray:
    """Values of which one in a thousand is thirty times as large as the others."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(50_000) * np.where(rng.random(50_000) < 0.001, 30, 1)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_cut_where_all_values_are_equally_frequent(method: str) -> None:
    assert range_of(histogram(UNIFORM), method) == pytest.approx((-1, 1), abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [np.abs(NORMAL), -np.abs(NORMAL), NORMAL + 20, NORMAL - 20, np.maximum(NORMAL, 0)])
def test_ranges_contain_zero_and_stay_within_the_extremes(method: str, values: np.ndarray) -> None:
    low, high = range_of(histogram(values), method)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)
    assert high - low > 0.5 * np.abs(values).max()


@pytest.mark.parametrize("method", METHODS)
def test_mirrored_values_have_the_mirrored_range(method: str) -> None:
    values = heavy_tailed() ** 3
    low, high = range_of(histogram(np.abs(values)), method)
    assert range_of(histogram(-np.abs(values)), method) == pytest.approx((-high, -low), rel=0.02)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_tails_are_cut(method: str) -> None:
    values = heavy_tailed()
    low, high = range_of(histogram(values), method)
    assert high < 0.9 * values.max()
    assert low > 0.9 * values.min()


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_a_tail_at_one_end_is_cut_there_only(method: str) -> None:
    values = np.concatenate([UNIFORM, [4.0, 3.9]])
    low, high = range_of(histogram(values), method)
    assert low == pytest.approx(-1, abs=0.01)
    assert 0.99 < high < 3.9


# Percentile


def test_percentiles_cut_a_share_of_both_ends() -> None:
    low, high = percentile_range(histogram(UNIFORM), 90)
    assert (low, high) == pytest.approx((-0.9, 0.9), abs=0.01)


def test_percentiles_cut_all_of_it_where_zero_is_the_other_end() -> None:
    assert percentile_range(histogram(np.abs(UNIFORM)), 90) == pytest.approx((0, 0.9), abs=0.01)
    assert percentile_range(histogram(-np.abs(UNIFORM)), 90) == pytest.approx((-0.9, 0), abs=0.01)


# Mean squared error


@pytest.mark.parametrize(
    "values",
    [NORMAL, heavy_tailed(), np.maximum(heavy_tailed(), 0), NORMAL + 3, np.concatenate([UNIFORM, [9.0]])],
    ids=["normal", "heavy tails", "relu", "shifted", "outlier"],
)
def test_no_range_of_a_grid_has_a_smaller_error(values: np.ndarray) -> None:
    found = histogram(values)
    error = squared_error(values, *mse_range(found))
    shares = np.linspace(0.04, 1, 25)
    ends = [(a * found.low, b * found.high) for a in (shares if found.low else [0.0]) for b in shares]
    best = min(squared_error(values, low, high) for low, high in ends)
    assert error <= 1.02 * best
    assert error <= squared_error(values, found.low, found.high)


def test_the_error_is_exact_where_steps_are_finer_than_bins() -> None:
    # With 65,536 levels a step is a 32nd of a bin: errors at the middles of bins would be those of chance.
    low, high = mse_range(histogram(UNIFORM), levels=65_536)
    assert (low, high) == pytest.approx((-1, 1), abs=2e-3)


def test_zeros_do_not_hide_the_error_of_the_others() -> None:
    values = np.maximum(NORMAL, 0)
    assert mse_range(histogram(values)) == mse_range(histogram(np.concatenate([values, np.zeros(10**6)])))


# Entropy


def divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """KL(P || Q) by the definition, bin by bin."""
    p = counts[first:last].astype(float)
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    bins, q = last - first, np.zeros(last - first)
    level_of = [max(k for k in range(levels) if k * bins // levels <= i) for i in range(bins)]
    for level in range(levels):
        members = [i for i in range(bins) if level_of[i] == level]
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = sum(counts[first + m] for m in members) / len(filled)
    q = q / counts[first:last].sum()
    return sum(a * np.log(a / max(b, 0.5 / counts.sum())) for a, b in zip(p / p.sum(), q, strict=True) if a > 0)


@pytest.mark.parametrize("values", [heavy_tailed() ** 3, np.abs(heavy_tailed())], ids=["two ends", "one end"])
def test_the_range_has_the_least_divergence_of_all_with_its_other_end(values: np.ndarray) -> None:
    bins, levels = 64, 8
    low, high = min(float(values.min()), 0.0), float(values.max())
    found = Histogram(np.histogram(values, bins, (low, high))[0], low, high)
    start, stop = entropy_range(found, levels)
    first, last = (int(np.rint((end - low) / (high - low) * bins)) for end in (start, stop))
    zero = found.zero
    costs = {i: divergence(found.counts, i, last, levels) for i in range(zero + 1) if last - i >= levels}
    assert costs[first] == pytest.approx(min(costs.values()), abs=1e-9)
    whole = divergence(found.counts, 0, bins, levels)
    assert costs[first] < whole


def test_magnitudes_are_cut_where_migacz_cuts_them() -> None:
    # Migacz's own definition, all widths from 128 to 2048 bins, tried one by one.
    found = histogram(np.abs(heavy_tailed()))
    counts = found.counts
    costs = {}
    for width in range(128, BINS + 1, 16):
        p = counts[:width].astype(float)
        p[-1] += counts[width:].sum()
        groups = np.array_split(np.arange(width), 128)
        q = np.zeros(width)
        for group in groups:
            filled = group[p[group] > 0]
            q[filled] = counts[group].sum() / max(len(filled), 1)
        here = p > 0
        costs[width] = np.sum(p[here] / p.sum() * np.log((p[here] / p.sum()) / np.maximum(q[here] / q.sum(), 5e-6)))
    best = min(costs.values())
    _, high = entropy_range(found, 128)
    width = int(np.rint(high / found.high * BINS / 16)) * 16
    assert costs[width] < 1.05 * best
    assert costs[BINS] > 2 * best


def test_an_outlier_far_out_does_not_forbid_the_cut() -> None:
    low, high = entropy_range(histogram(np.concatenate([NORMAL, [100.0]])))
    assert -5 < low < -3.5
    assert high < 15  # 256 of 2048 bins are the narrowest range there is


def test_few_values_tell_no_distribution() -> None:
    values = heavy_tailed()[: BINS - 1]
    assert entropy_range(histogram(values)) == (values.min(), values.max())


def test_equal_candidates_leave_the_range_as_it_is() -> None:
    values = np.random.default_rng(0).integers(-3, 4, 100_000).astype(float)
    assert entropy_range(histogram(values)) == (-3, 3)
