"""A histogram of one pass is that of numpy on its own bins, whatever the order of the values."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from residua.analysis.page.histogram import Histogram

RNG = np.random.default_rng(0)
VALUES = {
    "normal": RNG.standard_normal(5000),
    "far from zero": 1e6 + RNG.standard_normal(3000),
    "outliers": np.concatenate([RNG.standard_normal(4000), [3000.0, -2500.0]]),
    "small": RNG.standard_normal(2000) * 1e-30,
    "large": RNG.standard_normal(2000) * 1e300,
    "one value": np.full(100, 0.3),
    "zeros": np.zeros(10),
    "two values": np.array([-1.0, 1.0] * 20),
    "whole numbers": RNG.integers(-5, 90, 3000).astype(np.float64),
}


def made(values: npt.NDArray[np.float64], n_pieces: int, seed: int = 0) -> Histogram:
    """Return a histogram of shuffled values that came in pieces, merged in pairs of histograms."""
    total = Histogram()
    for piece in np.array_split(np.random.default_rng(seed).permutation(values), n_pieces):
        one = Histogram()
        one.add(piece)
        total.merge(one)
    return total


@pytest.mark.parametrize("name", VALUES)
def test_the_bins_count_what_numpy_counts_in_them(name: str) -> None:
    values = VALUES[name]
    found = made(values, 7)
    bins = found.shown()
    assert bins is not None
    edges = bins.start + bins.width * np.arange(len(bins.counts) + 1)
    counts = [int(np.count_nonzero((values >= low) & (values < high))) for low, high in pairwise(edges)]
    assert bins.counts == counts
    assert [bins.below, bins.above] == [np.count_nonzero(values < edges[0]), np.count_nonzero(values >= edges[-1])]
    assert sum(counts) >= 0.99 * len(values)
    assert len(counts) <= 64
    assert (found.n, found.least, found.most) == (len(values), values.min(), values.max())


@pytest.mark.parametrize("name", VALUES)
def test_neither_order_nor_pieces_change_it(name: str) -> None:
    first = made(VALUES[name], 1).to_json()
    assert made(VALUES[name], 5, seed=1).to_json() == first == made(VALUES[name], 13, seed=2).to_json()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["normal", "far from zero", "outliers"])
def test_a_quantile_is_that_of_the_values_within_a_bin(name: str, share: float) -> None:
    values = VALUES[name]
    width = (values.max() - values.min()) / 1024
    found = made(values, 3).quantile(share)
    assert np.mean(values < found - width) <= share <= np.mean(values <= found + width)


def test_what_is_not_finite_is_counted_apart() -> None:
    found = Histogram()
    found.add(np.array([np.nan, 1.0, np.inf, -np.inf, 2.0]))
    assert (found.n, found.n_nonfinite, found.least, found.most) == (2, 3, 1.0, 2.0)
    nothing = Histogram()
    nothing.add(np.array([np.nan]))
    assert nothing.to_json()["bins"] is None
    assert found.merge(nothing).n_nonfinite == 4
    assert nothing.merge(found).n == 2
