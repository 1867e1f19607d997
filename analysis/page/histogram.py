"""A histogram that needs no range beforehand and merges exactly, in one pass over any number of values.

Its bins are as wide as a power of two and begin at multiples of their width. When values come that lie too far apart,
two neighbouring bins become one. What results depends on the values alone, not on their order or on how they were
divided.
"""

from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MOST_BINS = 4096  # so that an outlier a hundred times larger than the rest leaves dozens of bins for the rest
_SHOWN_BINS = 64
_SHOWN_TAIL = 0.001  # share of the values at either end that may be counted beyond the bins shown
_LEAST_RELATIVE = 40  # bits: a narrower bin cannot be told apart in most sums


class ShownBins(NamedTuple):
    """Bins for a picture, all of one width, and what lies beyond them.

    Attributes:
        start: Lower end of the first bin.
        width: Width of a bin.
        counts: Values of each bin; a value on a border belongs to the upper one.
        below: Values below the first bin.
        above: Values at or above the end of the last.
    """

    start: float
    width: float
    counts: list[int]
    below: int
    above: int


class Histogram:
    """Counts of finite values.

    Attributes:
        n: Finite values.
        n_nonfinite: NaN and infinite values, which are left out of the rest.
        least, most: The smallest and the largest value.
    """

    def __init__(self) -> None:
        self.n = 0
        self.n_nonfinite = 0
        self.least, self.most = np.inf, -np.inf
        self._exponent = -1100  # below that of any float64
        self._first = 0
        self._counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, values: Floats) -> None:
        """Count `values`, (values,) float64."""
        finite = values[np.isfinite(values)]
        self.n_nonfinite += len(values) - len(finite)
        if not len(finite):
            return
        self._fit(float(finite.min()), float(finite.max()))
        numbers = np.floor(np.ldexp(finite, -self._exponent)).astype(np.int64)
        self._put(int(numbers.min()), np.bincount(numbers - numbers.min()))
        self.n += len(finite)

    def merge(self, other: "Histogram") -> Self:
        """Add the counts of `other`, which changes the width of its bins."""
        self.n_nonfinite += other.n_nonfinite
        if other.n:
            self._fit(other.least, other.most)
            other._widen(self._exponent)
            self._put(other._first, other._counts)
            self.n += other.n
        return self

    def quantile(self, share: float) -> float:
        """Return the value below which `share` of the values lie, as exact as the bins; NaN without values."""
        if not self.n:
            return np.nan
        below = np.concatenate([[0], np.cumsum(self._counts)])
        edges = np.ldexp(self._first + np.arange(len(below), dtype=np.float64), self._exponent)
        return float(np.clip(np.interp(share * self.n, below, edges), self.least, self.most))

    def shown(self) -> ShownBins | None:
        """Return at most 64 bins that hold nearly all values; None without values."""
        if not self.n:
            return None
        low, high = self._shown_range()
        together = -(-(high - low) // _SHOWN_BINS)
        end = low + -(-(high - low) // together) * together
        counts = np.zeros(end - low, np.int64)
        counts[: len(self._counts) - low] = self._counts[low:end]
        return ShownBins(
            start=float(np.ldexp(float(self._first + low), self._exponent)),
            width=float(np.ldexp(float(together), self._exponent)),
            counts=counts.reshape(-1, together).sum(1).tolist(),
            below=int(self._counts[:low].sum()),
            above=int(self._counts[end:].sum()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts, the range and some quantiles as JSON values; without values the range is null."""
        shown = self.shown()
        return {
            "n": self.n,
            "nonfinite": self.n_nonfinite,
            "least": self.least if self.n else None,
            "most": self.most if self.n else None,
            "low": self.quantile(0.01) if self.n else None,
            "median": self.quantile(0.5) if self.n else None,
            "high": self.quantile(0.99) if self.n else None,
            "bins": None if shown is None else shown._asdict(),
        }

    def _shown_range(self) -> tuple[int, int]:
        """Return the first bin that is shown, and the one after the last."""
        tail = int(self.n * _SHOWN_TAIL)
        low = int(np.argmax(np.cumsum(self._counts) > tail))
        high = len(self._counts) - int(np.argmax(np.cumsum(self._counts[::-1]) > tail))
        return low, high

    def _fit(self, least: float, most: float) -> None:
        """Widen the bins until all values up to now, and those between `least` and `most`, have room."""
        self.least, self.most = min(self.least, least), max(self.most, most)
        largest = max(abs(self.least), abs(self.most))
        exponent = max(self._exponent, int(np.frexp(largest)[1]) - _LEAST_RELATIVE)
        while np.floor(np.ldexp(self.most, -exponent)) - np.floor(np.ldexp(self.least, -exponent)) >= _MOST_BINS:
            exponent += 1
        self._widen(exponent)

    def _widen(self, exponent: int) -> None:
        """Make bins as wide as two to the power of `exponent`, which is not below today's."""
        if self._counts.size and exponent > self._exponent:
            numbers = (self._first + np.arange(len(self._counts))) >> min(exponent - self._exponent, 62)
            self._first = int(numbers[0])
            self._counts = np.bincount(numbers - self._first, self._counts).astype(np.int64)
        self._exponent = exponent

    def _put(self, first: int, counts: npt.NDArray[np.int64]) -> None:
        """Add the counts of the bins from number `first` on."""
        if not self._counts.size:
            self._first = first
        start = min(self._first, first)
        stop = max(self._first + len(self._counts), first + len(counts))
        total = np.zeros(stop - start, np.int64)
        total[self._first - start :][: len(self._counts)] += self._counts
        total[first - start :][: len(counts)] += counts
        self._first, self._counts = start, total
