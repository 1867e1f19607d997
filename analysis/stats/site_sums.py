"""What `residua.analysis.stats.stats` adds up over the rows of one site: moments, extremes, norms, broken values.

Everything is float64, centred piece by piece, and joined by the formulas of Chan, Golub and LeVeque (1979) and, for
third and fourth powers, of Pébay (2008, Sandia report SAND2008-6212).
"""

from typing import Self

import numpy as np
import numpy.typing as npt

from residua.analysis.support.moments import Moments

Floats = npt.NDArray[np.float64]


class SiteSums:
    """Sums over rows of one site that come piece by piece.

    Rows with a value that is NaN or infinite are counted, and left out of everything else.

    Args:
        width: Values of a row.
        whole: Keep the covariance of all pairs of channels.

    Attributes:
        moments: Number, mean and scatter of the rows.
        third, fourth: Sums of third and fourth powers of deviations from the mean, (width,).
        least, most: Smallest and largest value of each channel, (width,).
        norms: Moments of the rows' Euclidean norms, as one channel.
        largest_norm: The largest of them.
        row_kurtosis: Sum over the rows of the kurtosis of a row's values.
        positions: Norms by the token's position.
        n_nonfinite: Values that are NaN or infinite.
        n_nonfinite_rows: Rows with such a value.
    """

    def __init__(self, width: int, *, whole: bool) -> None:
        self.moments = Moments(width, whole=whole)
        self.third: Floats = np.zeros(width)
        self.fourth: Floats = np.zeros(width)
        self.least: Floats = np.full(width, np.inf)
        self.most: Floats = np.full(width, -np.inf)
        self.norms = Moments(1, whole=False)
        self.largest_norm = 0.0
        self.row_kurtosis = 0.0
        self.positions = NormsByPosition()
        self.n_nonfinite = 0
        self.n_nonfinite_rows = 0

    def add(self, values: npt.NDArray[np.floating], positions: npt.NDArray[np.int64]) -> None:
        """Take in rows: `values` (rows, width), and the position of each row's token."""
        is_finite = np.isfinite(values)
        if not is_finite.all():
            whole_rows = is_finite.all(axis=1)
            self.n_nonfinite += int(is_finite.size - np.count_nonzero(is_finite))
            self.n_nonfinite_rows += int(len(values) - np.count_nonzero(whole_rows))
            values, positions = values[whole_rows], positions[whole_rows]
        if len(values):
            self.merge(_sums_of(values, positions, whole=self.moments.is_whole))

    def merge(self, other: "SiteSums") -> Self:
        """Take in the rows that `other` has seen."""
        self._merge_powers(other)
        self.moments.merge(other.moments)
        self.least = np.minimum(self.least, other.least)
        self.most = np.maximum(self.most, other.most)
        self.norms.merge(other.norms)
        self.largest_norm = max(self.largest_norm, other.largest_norm)
        self.row_kurtosis += other.row_kurtosis
        self.positions.merge(other.positions)
        self.n_nonfinite += other.n_nonfinite
        self.n_nonfinite_rows += other.n_nonfinite_rows
        return self

    def _merge_powers(self, other: "SiteSums") -> None:
        mine, theirs = self.moments, other.moments
        n = mine.n + theirs.n
        if not n:
            return
        p, q = mine.n / n, theirs.n / n
        shift = theirs.mean - mine.mean
        second, other_second = mine.variance * mine.n, theirs.variance * theirs.n
        self.fourth = self.fourth + other.fourth + 4 * shift * (p * other.third - q * self.third)
        self.fourth += 6 * shift**2 * (p * p * other_second + q * q * second)
        self.fourth += n * p * q * (p * p - p * q + q * q) * shift**4
        self.third = self.third + other.third + 3 * shift * (p * other_second - q * second)
        self.third += n * p * q * (p - q) * shift**3


class NormsByPosition:
    """Number, mean and scatter of the rows' norms at each position of the example, (longest example,) each."""

    def __init__(self, n: Floats | None = None, mean: Floats | None = None, scatter: Floats | None = None) -> None:
        nothing = np.zeros(0)
        self.n = nothing if n is None else n
        self.mean = nothing if mean is None else mean
        self.scatter = nothing if scatter is None else scatter

    @classmethod
    def of(cls, norms: Floats, positions: npt.NDArray[np.int64]) -> Self:
        """Sum up `norms` by `positions`, both (rows,)."""
        n = np.bincount(positions).astype(np.float64)
        mean = np.bincount(positions, norms) / np.maximum(n, 1)
        return cls(n, mean, np.bincount(positions, (norms - mean[positions]) ** 2).astype(np.float64))

    def merge(self, other: "NormsByPosition") -> None:
        """Take in the rows that `other` has seen."""
        length = max(len(self.n), len(other.n))
        (n, mean, scatter), (other_n, other_mean, other_scatter) = self._padded(length), other._padded(length)
        share = other_n / np.maximum(n + other_n, 1)
        shift = other_mean - mean
        self.n = n + other_n
        self.mean = mean + shift * share
        self.scatter = scatter + other_scatter + shift**2 * n * share

    def _padded(self, length: int) -> tuple[Floats, ...]:
        return tuple(np.pad(part, (0, length - len(part))) for part in (self.n, self.mean, self.scatter))


def _sums_of(values: npt.NDArray[np.floating], positions: npt.NDArray[np.int64], *, whole: bool) -> SiteSums:
    """Return the sums of rows that are all finite."""
    sums = SiteSums(values.shape[1], whole=whole)
    sums.least, sums.most = (edge.astype(np.float64) for edge in (values.min(axis=0), values.max(axis=0)))
    exact = values.astype(np.float64, copy=False)
    norms = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    sums.norms.add(norms[:, None])
    sums.largest_norm = float(norms.max())
    sums.positions = NormsByPosition.of(norms, positions)
    sums.row_kurtosis = float(_kurtosis_within(exact).sum())
    centred = sums.moments.add(values)
    squares = centred * centred
    sums.third = np.einsum("nd,nd->d", squares, centred)
    sums.fourth = np.einsum("nd,nd->d", squares, squares)
    return sums


def _kurtosis_within(rows: Floats) -> Floats:
    """Return the kurtosis of the values of each row, (rows,); 0 for a row whose values are all equal."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    squares = centred * centred
    second = squares.mean(axis=1)
    fourth = np.einsum("nd,nd->n", squares, squares) / rows.shape[1]
    return np.asarray(np.divide(fourth, second**2, out=np.zeros_like(second), where=second > 0))
