"""From the sums over a site's rows to its statistics."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.analysis.stats.site_sums import NormsByPosition, SiteSums

OUTLIER_RATIO = 6.0
"""A channel is an outlier if its root mean square is more than so many times that of the site's median channel."""

SITES = pa.schema(
    [
        ("site", pa.string()),
        ("width", pa.int64()),
        ("n_rows", pa.int64()),
        ("n_nonfinite", pa.int64()),
        ("n_nonfinite_rows", pa.int64()),
        ("mean", pa.float64()),
        ("variance", pa.float64()),
        ("kurtosis", pa.float64()),
        ("row_kurtosis", pa.float64()),
        ("norm_mean", pa.float64()),
        ("norm_std", pa.float64()),
        ("norm_max", pa.float64()),
        ("outlier_channels", pa.list_(pa.int64())),
        ("component_shares", pa.list_(pa.float64())),
    ]
)

Floats = npt.NDArray[np.float64]


class SiteStats(NamedTuple):
    """Statistics of one site; `residua.analysis.stats.stats.Stats` says what is in the tables."""

    line: dict[str, Any]
    channels: pa.Table
    positions: pa.Table
    components: Floats | None


def site_stats(site: str, sums: SiteSums, n_components: int) -> SiteStats:
    """Return the statistics of `site`, of whose rows at least one is finite."""
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
    by_channel = _table(site, {"channel": np.arange(len(rms)), **channels})
    return SiteStats(line, by_channel, _by_position(site, sums.positions), components)


def _pooled(mean: Floats, second: Floats, third: Floats, fourth: Floats) -> dict[str, float]:
    """Return mean, variance and kurtosis of all values of a site, from the central moments of its channels."""
    middle = float(mean.mean())
    shift = mean - middle
    variance = float((second + shift**2).mean())
    power = float((fourth + 4 * shift * third + 6 * shift**2 * second + shift**4).mean())
    return {"mean": middle, "variance": variance, "kurtosis": power / variance**2 if variance else 0.0}


def _components(sums: SiteSums, n_components: int) -> tuple[list[float] | None, Floats | None]:
    """Return the shares of variance and the directions of the first principal components."""
    if not sums.moments.is_whole:
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
    names = pa.array([site]).take(pa.array(np.zeros(len(next(iter(columns.values()))), np.int64)))
    return pa.table({"site": names, **{name: pa.array(values) for name, values in columns.items()}})


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return `top / bottom`, 0 where `bottom` is 0."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
