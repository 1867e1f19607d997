"""Statistics of sites in one pass over the rows: channels, outliers, norms, principal components.

Each task reads a run of shards and returns sums. The sums are merged in a fixed order, so the result is the same, bit
for bit, in one process and on any cluster.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import NamedTuple

import pyarrow as pa

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.columns import positions_of
from residua.analysis.rows.site_rows import pieces, runs, width_of
from residua.analysis.stats.site_stats import SiteSums, Stats, site_stats
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import Location, location, opened
from residua.analysis.support.sums import OrderedSum
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from residua.store.read.stacks import by_rows, open_archive

_ROWS_PER_CHANNEL = 32  # of a task, so that the covariance it returns is small compared with what it reads
_COVARIANCES = 8  # that a worker holds at most: the sum, one piece, a product, and as much again for copies


class _Job(NamedTuple):
    location: Location
    site: str
    blocks: Sequence[Block]
    where: str | None
    full: bool


def stats(
    archive: Archive | str | PathLike[str],
    sites: str | Iterable[str] = "*",
    *,
    components: int = 8,
    where: str | None = None,
    cluster: Cluster | None = None,
    task_rows: int | None = None,
) -> Stats:
    """Compute statistics of `sites` in one pass over the captured rows.

    Kurtosis is the fourth central moment divided by the squared variance. Variances are divided by the number of rows.
    A site gets no principal components if its covariance, width² float64, fills more than an eighth of a worker's
    memory.

    Args:
        archive: The archive, or its path or address.
        sites: The sites, for example ``resid_post.*``; they may be of several stacks.
        components: Number of principal components for each site; with 0 no covariance is computed.
        where: Use only these rows, for example ``position > 0``.
        cluster: Where to compute; by default in this process.
        task_rows: Fewest rows that a task reads; by default 32 for each channel.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: A site has no finite rows, or the filter does not fit the archive.
    """
    archive, cluster = open_archive(archive), or_inline(cluster)
    widest = int((cluster.memory_limit / _COVARIANCES / 8) ** 0.5)
    jobs = [
        job
        for of_rows, names in by_rows(archive, sites)
        for name in names
        for job in _jobs(of_rows, name, where, task_rows, full=components > 0 and width_of(of_rows, name) <= widest)
    ]
    if not jobs:
        raise AnalysisError(f"{archive.place} has no captured rows: resume its capture first")
    found = {name: site_stats(name, sums, components) for name, sums in _summed(jobs, cluster)}
    ordered = [found[name] for name in dict.fromkeys(job.site for job in jobs)]
    return Stats(
        sites=pa.concat_tables([site.sites for site in ordered]),
        channels=pa.concat_tables([site.channels for site in ordered]),
        positions=pa.concat_tables([site.positions for site in ordered]),
        components={name: directions for site in ordered for name, directions in site.components.items()},
    )


def _jobs(archive: Archive, site: str, where: str | None, task_rows: int | None, *, full: bool) -> list[_Job]:
    least_rows = _ROWS_PER_CHANNEL * width_of(archive, site) if task_rows is None else task_rows
    return [_Job(location(archive), site, run, where, full) for run in runs(blocks(archive), least_rows=least_rows)]


def _sums(job: _Job) -> SiteSums:
    """Sum the rows of one job; runs where the job runs."""
    archive = opened(job.location)
    sums = SiteSums(width_of(archive, job.site), full=job.full)
    for piece in pieces(archive, job.site, job.blocks, job.where):
        sums.add(piece.values, positions_of(archive, piece.rows))
    return sums


def _summed(jobs: Sequence[_Job], cluster: Cluster) -> Iterator[tuple[str, SiteSums]]:
    """Yield each site with the sums over all its rows, in the order in which sites complete."""
    n_jobs = Counter(job.site for job in jobs)
    totals = {site: OrderedSum(n, SiteSums.merge) for site, n in n_jobs.items()}
    first = {job.site: len(jobs) - 1 - i for i, job in enumerate(reversed(jobs))}
    for number, sums in cluster.map(_sums, jobs, label="statistics"):
        site = jobs[number].site
        total = totals[site].add(number - first[site], sums)
        if total is None:
            continue
        if not total.moments.n and not total.n_nonfinite_rows:
            raise AnalysisError("there is no row to compute statistics of: choose another filter")
        if not total.moments.n:
            raise AnalysisError(
                f"{site} has no finite row to compute statistics of: {total.n_nonfinite_rows:,} rows have a NaN or an "
                "infinity. Choose other sites, or another filter."
            )
        yield site, total
