"""Means and covariances over any number of rows, in float64 and in one pass.

Rows are centred on the mean of their own piece before anything is squared, and pieces are joined by the formula of
Chan, Golub and LeVeque (1979), so that a spread of 1e-2 around a mean of 1e4 keeps its digits.
"""

from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Moments:
    """Number, mean and scatter of rows that come piece by piece.

    Args:
        width: Values of a row.
        whole: Keep the scatter of every pair of channels, width² float64; else of each channel alone.

    Attributes:
        n: Rows seen.
        mean: (width,), float64.
        scatter: Sums of products of deviations from the mean, (width, width), or (width,) unless `whole`; float64.
    """

    def __init__(self, width: int, *, whole: bool = True) -> None:
        self.n = 0
        self.mean: Floats = np.zeros(width)
        self.scatter: Floats = np.zeros((width, width) if whole else width)

    @property
    def is_whole(self) -> bool:
        """Whether the scatter of pairs of channels is kept."""
        return self.scatter.ndim == 2

    @property
    def variance(self) -> Floats:
        """Variance of each channel over the rows (divided by n), (width,)."""
        return (np.diagonal(self.scatter) if self.is_whole else self.scatter) / max(1, self.n)

    def add(self, rows: npt.NDArray[np.floating]) -> Floats:
        """Take in `rows`, (rows, width); returns them centred on their own mean, in float64."""
        part = Moments(len(self.mean), whole=False)
        part.n = len(rows)
        centred = rows.astype(np.float64)
        if part.n:
            part.mean = centred.mean(axis=0)
            centred -= part.mean
            part.scatter = centred.T @ centred if self.is_whole else np.einsum("nd,nd->d", centred, centred)
        self.merge(part)
        return centred

    def merge(self, other: "Moments") -> Self:
        """Take in the rows that `other` has seen."""
        if other.n:
            shift = other.mean - self.mean
            n_rows = self.n + other.n
            self.scatter += other.scatter
            weight = self.n * other.n / n_rows
            if self.n:
                self.scatter += np.outer(shift, shift * weight) if self.is_whole else shift * shift * weight
            self.mean = self.mean + shift * (other.n / n_rows)
            self.n = n_rows
        return self
