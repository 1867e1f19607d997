"""The labelled rows of one site, leaf by leaf, where a job of a pass over them runs.

A worker keeps the rows that it has read from one pass to the next, decoded, as long as they take no more than half of
the memory that its libraries leave (`residua.analysis.support.kept`); the others it reads again in every pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.pooling import Pool, pooled_pieces
from residua.analysis.probes.target import GivenTarget, Target, TargetSummary, read_target
from residua.analysis.rows.blocks import Leaves
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.site_rows import piece_rows, pieces, width_of
from residua.analysis.support.kept import kept
from residua.analysis.support.open_archives import Location, location, opened
from residua.store.read.archive import Archive

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating]

_LEAF_BYTES, _LEAF_ROWS = 4 * 2**20, 1024  # least of a leaf, as float32: adding its sums is little work beside it
_KEPT_SHARE = 2  # of a worker's memory, for rows that it keeps
_LIBRARIES_BYTES = 160 * 2**20  # of a worker's memory that Python, numpy, Dask and scikit-learn take


@dataclass(frozen=True)
class SiteRows:
    """The rows of one site that a probe needs; they are read where a job runs.

    Attributes:
        location: Where the archive is.
        site: The site.
        width: Values of a row.
        leaves: The rows.
        target: What is predicted.
        where: Filter on the rows, or None.
        pool: How the rows of an example become one, or None.
        summary: What is known of the target.
        analysis: A text that no other analysis has.
        memory: Bytes that a worker may use.
    """

    location: Location
    site: str
    width: int
    leaves: Leaves
    target: str | GivenTarget
    where: str | None
    pool: Pool | None
    summary: TargetSummary
    analysis: str
    memory: int

    @property
    def bytes_to_keep(self) -> int:
        """Bytes that all rows take where they are kept."""
        return sum(self.summary.n_rows) * (4 * self.width + 40)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Under which workers keep the rows of this site, by leaf."""
        return [(self.site, leaf) for leaf in range(len(self.leaves))]

    @property
    def most_kept(self) -> int:
        """Bytes of rows that one worker may keep."""
        return max(0, self.memory - _LIBRARIES_BYTES) // _KEPT_SHARE


def leaves_of(archive: Archive, site: str, *, least_rows: int = 0) -> Leaves:
    """Return the leaves of the sums over the rows of a site, each of 4 MiB, 1,024 or `least_rows` at least."""
    width = width_of(archive, site)
    return Leaves.of(archive, max(least_rows, _LEAF_ROWS, _LEAF_BYTES // (4 * width)), multiple=piece_rows(width))


def site_rows(
    archive: Archive,
    site: str,
    target: str | GivenTarget,
    where: str | None,
    summary: TargetSummary,
    *,
    pool: Pool | None = None,
    analysis: str,
    memory: int,
    least_rows: int = 0,
) -> SiteRows:
    """Return the rows of one site; see `SiteRows` and `leaves_of`."""
    leaves, width = leaves_of(archive, site, least_rows=least_rows), width_of(archive, site)
    return SiteRows(location(archive), site, width, leaves, target, where, pool, summary, analysis, memory)


@dataclass
class LabelledRows:
    """Some rows of a site, those of a subset after those of another, so that passes over a subset copy nothing.

    Attributes:
        values: (rows, width), finite, float32 or float64.
        labels: True labels and those of the control, (rows, 2) float64.
        subsets: `FIT`, `VALIDATION` or `TEST`, ascending, (rows,).
        n_left_out: Rows that are not here because a value is NaN or infinite.
        is_standardised: Whether `values` have mean 0 and variance 1.
    """

    values: Rows
    labels: Floats
    subsets: npt.NDArray[np.int8]
    n_left_out: int
    is_standardised: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes that the arrays take."""
        return self.values.nbytes + self.labels.nbytes + self.subsets.nbytes

    def standardise_(self, mean: Floats, scale: Floats) -> None:
        """Give the values mean 0 and variance 1, in place, unless they have them."""
        if not self.is_standardised:
            self.values -= mean.astype(self.values.dtype)
            self.values *= (1 / scale).astype(self.values.dtype)
            self.is_standardised = True

    def of(self, *subsets: int) -> tuple[Rows, Floats]:
        """Return values and labels of the rows of `subsets`, which follow each other."""
        chosen = slice(*np.searchsorted(self.subsets, [min(subsets), max(subsets) + 1]).tolist())
        return self.values[chosen], self.labels[chosen]


def labelled_rows(rows: SiteRows, leaf: int) -> list[LabelledRows]:
    """Return the rows of a leaf in order: those that this worker kept, or read from the archive."""
    return kept(
        rows.analysis,
        (rows.site, leaf),
        lambda: list(_read(rows, leaf)),
        lambda pieces: sum(piece.n_bytes for piece in pieces),
        most_bytes=rows.most_kept,
    )


def _read(rows: SiteRows, leaf: int) -> Iterator[LabelledRows]:
    archive = opened(rows.location)
    target = _target(rows.location, rows.target, rows.analysis)
    blocks = rows.leaves.blocks(leaf)
    found = (
        pieces(archive, rows.site, blocks, rows.where)
        if rows.pool is None
        else pooled_pieces(archive, rows.site, blocks, rows.where, rows.pool)
    )
    for numbers, values in found:
        wanted = target.values(numbers)
        if target.leaves_out and not (is_there := np.isfinite(wanted)).all():
            numbers, values, wanted = numbers[is_there], values[is_there], wanted[is_there]
        if not len(numbers):
            continue
        examples = examples_of(archive, numbers)
        labels = np.column_stack([wanted, rows.summary.control.labels(numbers, examples)])
        labels, subsets = labels.astype(np.float64), rows.summary.subsets[examples]
        finite = np.flatnonzero(np.isfinite(values).all(axis=1))
        order = finite[np.argsort(subsets[finite], kind="stable")]
        yield LabelledRows(values[order], labels[order], subsets[order], len(values) - len(order))


@lru_cache(maxsize=1)
def _target(where: Location, target: str | GivenTarget, _analysis: str) -> Target:
    """Return the target, read once in an analysis: a column of the example table may be long."""
    return read_target(opened(where), target)
