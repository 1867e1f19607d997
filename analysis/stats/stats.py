"""Statistics of every site in one pass over the rows: what its channels look like, and which of them stand out.

Tasks read runs of shards and return sums; the sums are merged in a fixed order, so the result is the same in one
process and on any cluster.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.columns import positions_of
from residua.analysis.rows.site_rows import pieces, runs, width_of
from residua.analysis.stats.site_stats import SITES, site_stats
from residua.analysis.stats.site_sums import SiteSums
from residua.analysis.support.cluster import Cluster, OrderedSum, or_inline
from residua.analysis.support.open_archives import address, opened
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive

_ROWS_A_CHANNEL = 32  # of a run, so that the covariance that its task returns is small beside what it read
_COVARIANCES = 8  # so many times a covariance a worker must hold: sum, part, product, and as much again for its copy


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the sites of an archive; rows with a NaN or an infinity are counted, and in nothing else.

    Attributes:
        sites: One line a site: site, width, n_rows, n_nonfinite (values), n_nonfinite_rows; mean, variance and kurtosis
            of all its values; row_kurtosis (mean over rows of the kurtosis of a row's values: 3 for normally
            distributed ones, more where few channels carry much; Elhage et al. 2023, "Privileged bases in the
            transformer residual stream"); norm_mean, norm_std, norm_max (Euclidean norm of a row);
            outlier_channels (root mean square over 6 times the median channel's, loudest first);
            component_shares (of the total variance, by principal component; null without components).
        channels: One line a site and channel: site, channel, mean, variance, kurtosis, min, max, rms, rms_ratio (to
            the median channel's).
        positions: One line a site and position: site, position, n_rows, norm_mean, norm_std.
        components: Principal directions by site, (components, width) float64, of length 1, most variance first; the
            entry of largest magnitude is positive.
    """

    sites: pa.Table
    channels: pa.Table
    positions: pa.Table
    components: dict[str, npt.NDArray[np.float64]]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write sites.parquet, channels.parquet, positions.parquet and components.safetensors into `folder`."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("sites", "channels", "positions"):
            pq.write_table(getattr(self, name), place / f"{name}.parquet")
        save_file(self.components, place / "components.safetensors")


class _Job(NamedTuple):
    path: str
    site: str
    blocks: Sequence[Block]
    where: str | None
    whole: bool


def stats(
    archive: Archive,
    sites: str | Iterable[str] = "*",
    *,
    components: int = 8,
    where: str | None = None,
    cluster: Cluster | None = None,
) -> Stats:
    """Compute statistics of `sites` in one pass over the captured rows.

    Kurtosis is the fourth central moment over the squared variance; variances are divided by the number of rows.
    A site so wide that its covariance, width² float64, would fill more than an eighth of a worker's memory gets no
    principal components; everything else it gets.

    Args:
        archive: The archive.
        sites: The sites, for example ``resid_post.*``.
        components: Principal components a site; 0 spares the covariance.
        where: Takes only these rows, for example ``position > 0``.
        cluster: Where to compute; by default in this process.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: A site has no finite rows, or the filter cannot be asked.
    """
    names, cluster = archive.select(sites), or_inline(cluster)
    widest = int((cluster.memory_limit / _COVARIANCES / 8) ** 0.5)
    jobs = [
        job
        for name in names
        for job in _jobs(archive, name, where, whole=components > 0 and width_of(archive, name) <= widest)
    ]
    if not jobs:
        raise AnalysisError(f"{archive.path} has no captured rows: go on with its capture first")
    found = {name: site_stats(name, sums, components) for name, sums in _summed(jobs, cluster)}
    ordered = [found[name] for name in names]
    return Stats(
        sites=pa.Table.from_pylist([site.line for site in ordered], schema=SITES),
        channels=pa.concat_tables([site.channels for site in ordered]),
        positions=pa.concat_tables([site.positions for site in ordered]),
        components={site.line["site"]: site.components for site in ordered if site.components is not None},
    )


def _jobs(archive: Archive, site: str, where: str | None, *, whole: bool) -> list[_Job]:
    least_rows = _ROWS_A_CHANNEL * width_of(archive, site)
    path, all_blocks = address(archive), blocks(archive)
    return [_Job(path, site, run, where, whole) for run in runs(all_blocks, least_rows=least_rows)]


def _sums(job: _Job) -> SiteSums:
    """Sum up the rows of one job; runs where the job runs."""
    archive = opened(job.path)
    sums = SiteSums(width_of(archive, job.site), whole=job.whole)
    for piece in pieces(archive, job.site, job.blocks, job.where):
        sums.add(piece.values, positions_of(archive, piece.rows))
    return sums


def _summed(jobs: Sequence[_Job], cluster: Cluster) -> Iterator[tuple[str, SiteSums]]:
    """Yield each site with the sums over all its rows, as they complete."""
    n_parts = Counter(job.site for job in jobs)
    sums = {site: OrderedSum(n, SiteSums.merge) for site, n in n_parts.items()}
    first = {job.site: len(jobs) - 1 - i for i, job in enumerate(reversed(jobs))}
    for number, part in cluster.map(_sums, jobs, label="statistics"):
        site = jobs[number].site
        whole = sums[site].add(number - first[site], part)
        if whole is not None:
            if not whole.moments.n and not whole.n_nonfinite_rows:
                raise AnalysisError("there is no row to compute statistics of: choose another filter")
            if not whole.moments.n:
                raise AnalysisError(
                    f"{site} has no finite row to compute statistics of ({whole.n_nonfinite_rows:,} have a NaN or an "
                    "infinity): choose other sites, or another filter"
                )
            yield site, whole
