"""Means and covariances over any number of rows, in float64 and in one pass.

Each batch of rows is centred on its own mean before anything is squared, and batches are merged by the formula of Chan,
Golub and LeVeque (1979). So a spread of 1e-2 around a mean of 1e4 keeps its digits.
"""

from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Moments:
    """Number, mean and scatter of rows that arrive in batches.

    Args:
        width: Number of channels of a row.
        full: Keep the scatter of every pair of channels, width² float64; else only of each channel.

    Attributes:
        n: Number of rows.
        mean: (width,), float64.
        scatter: Sums of products of deviations from the mean, (width, width), or (width,) unless `full`; float64.
    """

    def __init__(self, width: int, *, full: bool = True) -> None:
        self.n = 0
        self.mean: Floats = np.zeros(width)
        self.scatter: Floats = np.zeros((width, width) if full else width)

    @property
    def is_full(self) -> bool:
        """Whether the scatter of pairs of channels is kept."""
        return self.scatter.ndim == 2

    @property
    def variance(self) -> Floats:
        """Variance of each channel over the rows (divided by n), (width,)."""
        return (np.diagonal(self.scatter) if self.is_full else self.scatter) / max(1, self.n)

    def add(self, rows: npt.NDArray[np.floating]) -> Floats:
        """Add `rows`, (rows, width). Return them centred on their own mean, in float64."""
        batch = Moments(len(self.mean), full=False)
        batch.n = len(rows)
        centred = rows.astype(np.float64)
        if batch.n:
            batch.mean = centred.mean(axis=0)
            centred -= batch.mean
            batch.scatter = centred.T @ centred if self.is_full else np.einsum("nd,nd->d", centred, centred)
        self.merge(batch)
        return centred

    def merge(self, other: "Moments") -> Self:
        """Add the rows of `other`."""
        if other.n:
            shift = other.mean - self.mean
            n_rows = self.n + other.n
            self.scatter += other.scatter
            weight = self.n * other.n / n_rows
            if self.n:
                self.scatter += np.outer(shift, shift * weight) if self.is_full else shift * shift * weight
            self.mean = self.mean + shift * (other.n / n_rows)
            self.n = n_rows
        return self
