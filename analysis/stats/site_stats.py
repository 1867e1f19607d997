"""Sums over the rows of a site, which merge in any number of pieces, and the statistics that follow from them.

Sums are float64 and centred on the mean of each piece. They are merged by the formulas of Chan, Golub and LeVeque
(1979) and, for third and fourth powers, of Pébay (2008, Sandia report SAND2008-6212).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from residua.analysis.support.moments import Moments
from residua.store.storage.place import saved_to

OUTLIER_RATIO = 6.0
"""A channel is an outlier if its root mean square is more than this many times that of the site's median channel."""

SITES = pa.schema(
    [
        ("site", pa.string()),
        *((name, pa.int64()) for name in ("width", "n_rows", "n_nonfinite", "n_nonfinite_rows")),
        *((name, pa.float64()) for name in ("mean", "variance", "kurtosis", "row_kurtosis")),
        *((name, pa.float64()) for name in ("norm_mean", "norm_std", "norm_max")),
        ("outlier_channels", pa.list_(pa.int64())),
        ("component_shares", pa.list_(pa.float64())),
    ]
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the sites of an archive. A row with a NaN or an infinity is counted, and left out of the rest.

    Attributes:
        sites: One line per site: site, width, n_rows, n_nonfinite (values), n_nonfinite_rows; mean, variance and
            kurtosis of all its values; row_kurtosis (mean over rows of the kurtosis of a row's values: 3 if they are
            normally distributed, more if a few channels are large; Elhage et al. 2023, "Privileged Bases in the
            Transformer Residual Stream"); norm_mean, norm_std, norm_max (Euclidean norm of a row);
            outlier_channels (root mean square over 6 times the median channel's, largest first);
            component_shares (of the total variance, by principal component; null without components).
        channels: One line per site and channel: site, channel, mean, variance, kurtosis, min, max, rms, rms_ratio (to
            the median channel's).
        positions: One line per site and position: site, position, n_rows, norm_mean, norm_std.
        components: Principal directions by site, (components, width) float64, of length 1, most variance first; the
            entry of largest magnitude is positive.
    """

    sites: pa.Table
    channels: pa.Table
    positions: pa.Table
    components: dict[str, npt.NDArray[np.float64]]

    def save(self, folder: str | PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Write sites.parquet, channels.parquet, positions.parquet and components.safetensors into `folder`.

        The folder is created if it does not exist; it may be an address in a bucket.
        """
        with saved_to(folder, storage_options) as place:
            place.mkdir(parents=True, exist_ok=True)
            for name in ("sites", "channels", "positions"):
                pq.write_table(getattr(self, name), place / f"{name}.parquet")
            save_file(self.components, place / "components.safetensors")


class SiteSums:
    """Sums over rows of one site.

    A row with a NaN or an infinity is counted, and left out of everything else.

    Args:
        width: Values of a row.
        full: Keep the covariance of all pairs of channels.

    Attributes:
        moments: Number, mean and scatter of the rows.
        third, fourth: Sums of third and fourth powers of deviations from the mean, (width,).
        least, most: Smallest and largest value of each channel, (width,).
        norms: Moments of the rows' Euclidean norms, as one channel.
        largest_norm: The largest norm.
        row_kurtosis: Sum over the rows of the kurtosis of a row's values.
        positions: Norms by the token's position.
        n_nonfinite: Values that are NaN or infinite.
        n_nonfinite_rows: Rows with such a value.
    """

    def __init__(self, width: int, *, full: bool) -> None:
        self.moments = Moments(width, full=full)
        self.third: Floats = np.zeros(width)
        self.fourth: Floats = np.zeros(width)
        self.least: Floats = np.full(width, np.inf)
        self.most: Floats = np.full(width, -np.inf)
        self.norms = Moments(1, full=False)
        self.largest_norm = 0.0
        self.row_kurtosis = 0.0
        self.positions = NormsByPosition()
        self.n_nonfinite = 0
        self.n_nonfinite_rows = 0

    def add(self, values: npt.NDArray[np.floating], positions: npt.NDArray[np.int64]) -> None:
        """Add rows: `values` (rows, width), and the position of each row's token, (rows,)."""
        is_finite = np.isfinite(values)
        if not is_finite.all():
            finite_rows = is_finite.all(axis=1)
            self.n_nonfinite += int(is_finite.size - np.count_nonzero(is_finite))
            self.n_nonfinite_rows += int(len(values) - np.count_nonzero(finite_rows))
            values, positions = values[finite_rows], positions[finite_rows]
        if len(values):
            self.merge(_sums_of(values, positions, full=self.moments.is_full))

    def merge(self, other: "SiteSums") -> Self:
        """Add the rows of `other`."""
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


@dataclass
class NormsByPosition:
    """Number, mean and scatter of the rows' norms at each position of the example, (longest example,) float64 each."""

    n: Floats = field(default_factory=lambda: np.zeros(0))
    mean: Floats = field(default_factory=lambda: np.zeros(0))
    scatter: Floats = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, norms: Floats, positions: npt.NDArray[np.int64]) -> Self:
        """Sum `norms` by `positions`, both (rows,)."""
        n = np.bincount(positions).astype(np.float64)
        mean = np.bincount(positions, norms) / np.maximum(n, 1)
        return cls(n, mean, np.bincount(positions, (norms - mean[positions]) ** 2).astype(np.float64))

    def merge(self, other: "NormsByPosition") -> None:
        """Add the rows of `other`."""
        length = max(len(self.n), len(other.n))
        (n, mean, scatter), (other_n, other_mean, other_scatter) = self._padded(length), other._padded(length)
        share = other_n / np.maximum(n + other_n, 1)
        shift = other_mean - mean
        self.n = n + other_n
        self.mean = mean + shift * share
        self.scatter = scatter + other_scatter + shift**2 * n * share

    def _padded(self, length: int) -> tuple[Floats, ...]:
        return tuple(np.pad(sums, (0, length - len(sums))) for sums in (self.n, self.mean, self.scatter))


def _sums_of(values: npt.NDArray[np.floating], positions: npt.NDArray[np.int64], *, full: bool) -> SiteSums:
    """Return the sums of rows without NaN and infinity."""
    sums = SiteSums(values.shape[1], full=full)
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
    return _ratio(fourth, second**2)


def site_stats(site: str, sums: SiteSums, n_components: int) -> Stats:
    """Return the statistics of `site`; at least one of its rows must be finite."""
    moments = sums.moments
    n_rows = moments.n
    second, fourth = moments.variance, sums.fourth / n_rows
    rms = np.sqrt(second + moments.mean**2)
    channels = {
        "mean": moments.mean,
        "variance": second,
        "kurtosis": _ratio(fourth, second**2),
        "min": sums.least,
        "max": sums.most,
        "rms": rms,
        "rms_ratio": _ratio(rms, np.full_like(rms, np.median(rms))),
    }
    outliers = np.flatnonzero(channels["rms_ratio"] > OUTLIER_RATIO)
    shares, components = _components(sums, n_components)
    line = {
        "site": site,
        "width": len(rms),
        "n_rows": n_rows + sums.n_nonfinite_rows,
        "n_nonfinite": sums.n_nonfinite,
        "n_nonfinite_rows": sums.n_nonfinite_rows,
        **_pooled(moments.mean, second, sums.third / n_rows, fourth),
        "row_kurtosis": sums.row_kurtosis / n_rows,
        "norm_mean": float(sums.norms.mean[0]),
        "norm_std": float(np.sqrt(sums.norms.variance[0])),
        "norm_max": sums.largest_norm,
        "outlier_channels": outliers[np.argsort(-rms[outliers], kind="stable")].tolist(),
        "component_shares": shares,
    }
    return Stats(
        sites=pa.Table.from_pylist([line], schema=SITES),
        channels=_table(site, {"channel": np.arange(len(rms)), **channels}),
        positions=_by_position(site, sums.positions),
        components={} if components is None else {site: components},
    )


def _pooled(mean: Floats, second: Floats, third: Floats, fourth: Floats) -> dict[str, float]:
    """Return mean, variance and kurtosis of all values of a site, from the central moments of its channels."""
    middle = float(mean.mean())
    shift = mean - middle
    variance = float((second + shift**2).mean())
    power = float((fourth + 4 * shift * third + 6 * shift**2 * second + shift**4).mean())
    return {"mean": middle, "variance": variance, "kurtosis": power / variance**2 if variance else 0.0}


def _components(sums: SiteSums, n_components: int) -> tuple[list[float] | None, Floats | None]:
    """Return the shares of the variance and the directions of the first principal components."""
    if not sums.moments.is_full:
        return None, None
    values, vectors = np.linalg.eigh(sums.moments.scatter)
    order = slice(None, -n_components - 1, -1)
    total = max(float(np.trace(sums.moments.scatter)), np.finfo(np.float64).tiny)
    directions = vectors[:, order].T
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return (np.maximum(values[order], 0) / total).tolist(), np.ascontiguousarray(directions * np.sign(largest))


def _by_position(site: str, norms: NormsByPosition) -> pa.Table:
    seen = np.flatnonzero(norms.n)
    n_rows = norms.n[seen]
    columns = {
        "position": pa.array(seen),
        "n_rows": pa.array(n_rows.astype(np.int64)),
        "norm_mean": norms.mean[seen],
        "norm_std": np.sqrt(norms.scatter[seen] / n_rows),
    }
    return _table(site, columns)


def _table(site: str, columns: dict[str, Any]) -> pa.Table:
    names = pa.repeat(site, len(next(iter(columns.values()))))
    return pa.table({"site": names, **{name: pa.array(values) for name, values in columns.items()}})


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return `top / bottom`, 0 where `bottom` is 0."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
