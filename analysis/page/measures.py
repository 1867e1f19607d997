"""What a page measures of a site's rows: norm, distance to the mean row, and directions; one pass over the rows.

Each task reads a run of shards and returns histograms and a few rows, however many it reads.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.page.directions import MEASURES, Direction
from residua.analysis.page.histogram import Histogram
from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.site_rows import piece_rows, pieces, runs, width_of
from residua.analysis.stats.top import Best, kept, no_rows
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.open_archives import Location, location, opened
from residua.analysis.support.sums import by_key
from residua.store.read.archive import Archive

Floats = npt.NDArray[np.float64]


class SiteMeasures(NamedTuple):
    """What is measured of the rows of one site, in the order of `names`.

    Attributes:
        site: The site.
        mean: The mean row, (width,) float64.
        directions: The directions at this site; their vectors are (width,) float64.
    """

    site: str
    mean: Floats
    directions: tuple[Direction, ...]

    @property
    def names(self) -> list[str]:
        """Return ``norm``, ``distance``, and the names of the directions."""
        return [*MEASURES, *(direction.name for direction in self.directions)]

    def of(self, values: npt.NDArray[Any]) -> Floats:
        """Return the measures of rows, (measures, rows) float64; `values` are (rows, width)."""
        wide = values.astype(np.float64)
        found = np.empty((2 + len(self.directions), len(wide)))
        with np.errstate(invalid="ignore", over="ignore"):
            found[0] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            for number, direction in enumerate(self.directions, 2):
                vector = np.asarray(direction.vector)
                channels = np.flatnonzero(vector)  # a NaN in another channel does not count
                found[number] = wide[:, channels] @ vector[channels] + direction.bias
            wide -= self.mean
            found[1] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        return found


class Measured(NamedTuple):
    """One measure over all rows: how it is distributed, and its rows at either end.

    Attributes:
        histogram: All rows.
        strongest: The rows with the largest values, one an example.
        weakest: Those with the smallest; scores have the opposite sign.
    """

    histogram: Histogram
    strongest: Best
    weakest: Best


class _Job(NamedTuple):
    location: Location
    measures: SiteMeasures
    blocks: Sequence[Block]
    k: int


def measure(
    archive: Archive, sites: Sequence[SiteMeasures], *, k: int, cluster: Cluster, least_rows: int = 2**16
) -> dict[str, list[Measured]]:
    """Measure all captured rows, in one pass over each site.

    Args:
        archive: The archive.
        sites: What to measure.
        k: Rows to keep at either end of each measure.
        cluster: Where to compute.
        least_rows: Fewest rows that a task reads.

    Returns:
        For each site its measures, in their order.
    """
    jobs = [
        _Job(location(archive), one, run, k) for one in sites for run in runs(blocks(archive), least_rows=least_rows)
    ]
    totals = {one.site: [_nothing() for _ in one.names] for one in sites}
    for number, found in cluster.map(_measured, jobs, label="measuring rows"):
        site = jobs[number].measures.site
        totals[site] = [_joined(*pair, k) for pair in zip(totals[site], found, strict=True)]
    return totals


def _nothing() -> Measured:
    return Measured(Histogram(), no_rows(), no_rows())


def _measured(job: _Job) -> list[Measured]:
    """Measure the rows of one job; runs where the job runs."""
    archive = opened(job.location)
    totals = [_nothing() for _ in job.measures.names]
    for rows, values in pieces(archive, job.measures.site, job.blocks):
        examples = examples_of(archive, rows)
        for number, scores in enumerate(job.measures.of(values)):
            totals[number] = _joined(totals[number], _of_scores(scores, rows, examples, job.k), job.k)
    return totals


def _of_scores(scores: Floats, rows: npt.NDArray[np.int64], examples: npt.NDArray[np.int64], k: int) -> Measured:
    histogram = Histogram()
    histogram.add(scores)
    ranked = ~np.isnan(scores)
    strongest, weakest = (
        kept(Best(sign * scores[ranked], rows[ranked], examples[ranked]), no_rows(), k, per_example=True)
        for sign in (1, -1)
    )
    return Measured(histogram, strongest, weakest)


def _joined(first: Measured, second: Measured, k: int) -> Measured:
    return Measured(
        first.histogram.merge(second.histogram),
        kept(first.strongest, second.strongest, k, per_example=True),
        kept(first.weakest, second.weakest, k, per_example=True),
    )


class ShownRows(NamedTuple):
    """The rows of an example that a page shows: `start` to `stop` (not included)."""

    start: int
    stop: int


class _ShownJob(NamedTuple):
    location: Location
    measures: SiteMeasures
    rows: Sequence[ShownRows]


_EXAMPLES_PER_JOB = 64


def measure_shown(
    archive: Archive, sites: Sequence[SiteMeasures], rows: Sequence[ShownRows], *, cluster: Cluster
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Measure the rows of the examples that a page shows.

    Yields:
        Each site, as it is done, and its measures, (measures, rows of all examples) float32.
    """
    groups = [rows[i : i + _EXAMPLES_PER_JOB] for i in range(0, len(rows), _EXAMPLES_PER_JOB)]
    jobs = [_ShownJob(location(archive), one, group) for one in sites for group in groups]
    results = cluster.map(_shown, jobs, label="measuring examples")
    for site, found in by_key(results, [job.measures.site for job in jobs], len(groups)):
        yield site, np.concatenate(found, axis=1)


def _shown(job: _ShownJob) -> npt.NDArray[np.float32]:
    archive = opened(job.location)
    width = width_of(archive, job.measures.site)
    array = archive[job.measures.site]
    rows = np.concatenate([np.arange(*each) for each in job.rows])
    height = piece_rows(width)
    parts = (rows[i : i + height] for i in range(0, len(rows), height))  # together: few chunks are decoded twice
    found = [job.measures.of(array[part].reshape(len(part), width)) for part in parts]
    with np.errstate(over="ignore"):
        return np.concatenate(found, axis=1).astype(np.float32)
