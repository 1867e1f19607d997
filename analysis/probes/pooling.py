"""One row an example: the last of its chosen rows, their mean, or the largest value of each channel.

Rows are pooled while a pass reads them: an example is pooled in the leaf that has its first row, and its other rows are
read beyond the end of that leaf. Memory holds a piece of rows, and the sums of one example.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.site_rows import Piece, pieces
from residua.store.base.errors import AnalysisError, NotCapturedError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

Pool: TypeAlias = Literal["last", "mean", "max"]
POOLS: tuple[Pool, ...] = ("last", "mean", "max")

Numbers: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = npt.NDArray[np.floating]


def check_pool(archive: Archive, pool: str) -> None:
    """Raise unless rows of an archive can be pooled in that way.

    Raises:
        AnalysisError: There is no such way.
        NotCapturedError: The archive is not finished, and its examples may lack rows.
    """
    if pool not in POOLS:
        raise AnalysisError(f"rows cannot be pooled by {pool!r}: choose one of {', '.join(POOLS)}")
    if not archive.is_sealed:
        raise NotCapturedError(
            f"{archive.place} is not finished, and some of its examples lack rows, which are needed to pool them: "
            "finish the capture first"
        )


def last_rows(archive: Archive, where: RowFilter | None) -> Numbers:
    """Return the last chosen row of each example that has one, ascending."""
    last = np.full(len(archive.example_table), -1)
    for block in blocks(archive):
        rows = np.arange(*block)
        if where is not None:
            rows = rows[where.mask(archive, *block)]
        last[examples_of(archive, rows)] = rows  # of several rows of an example, the last one stays
    return last[last >= 0]


def pooled_pieces(archive: Archive, site: str, leaf: Sequence[Block], where: str | None, pool: Pool) -> Iterator[Piece]:
    """Yield the pooled rows of the examples whose first row is in `leaf`; the number of each is its last chosen row."""
    first_row = archive.example_table.index().first_row
    for block in leaf:
        first, stop = np.searchsorted(first_row[:-1], block).tolist()
        if first < stop:
            rows = Block(int(first_row[first]), int(first_row[stop]))
            yield from _pooled(archive, pieces(archive, site, [rows], where), pool)


class _Groups(NamedTuple):
    """Sums over rows of examples: the example, its last row, its values, and its number of rows."""

    examples: Numbers
    rows: Numbers
    values: npt.NDArray[np.floating]
    counts: Numbers

    def part(self, chosen: slice) -> "_Groups":
        return _Groups(self.examples[chosen], self.rows[chosen], self.values[chosen], self.counts[chosen])


def _pooled(archive: Archive, found: Iterable[Piece], pool: Pool) -> Iterator[Piece]:
    open_: _Groups | None = None  # the last example, which the next piece may continue
    dtype: np.dtype[np.floating] = np.dtype(np.float32)
    for piece in found:
        dtype = piece.values.dtype
        groups = _grouped(examples_of(archive, piece.rows), piece, pool)
        if open_ is not None and open_.examples[0] == groups.examples[0]:
            _join(groups, open_, pool)
        elif open_ is not None:
            yield _finished(open_, pool, dtype)
        if len(groups.rows) > 1:
            yield _finished(groups.part(slice(None, -1)), pool, dtype)
        open_ = groups.part(slice(-1, None))
    if open_ is not None:
        yield _finished(open_, pool, dtype)


def _grouped(examples: Numbers, piece: Piece, pool: Pool) -> _Groups:
    starts = np.flatnonzero(np.concatenate([[True], examples[1:] != examples[:-1]]))
    ends = np.concatenate([starts[1:], [len(examples)]])
    if pool == "last":
        values = piece.values[ends - 1]
    elif pool == "max":
        values = np.maximum.reduceat(piece.values, starts, axis=0)
    else:
        values = np.add.reduceat(piece.values.astype(np.float64), starts, axis=0)
    return _Groups(examples[starts], piece.rows[ends - 1], values, ends - starts)


def _join(groups: _Groups, before: _Groups, pool: Pool) -> None:
    """Add earlier rows of the first example of `groups`."""
    if pool == "max":
        groups.values[0] = np.maximum(groups.values[0], before.values[0])
    elif pool == "mean":
        groups.values[0] += before.values[0]
    groups.counts[0] += before.counts[0]


def _finished(groups: _Groups, pool: Pool, dtype: np.dtype[np.floating]) -> Piece:
    values = groups.values / groups.counts[:, None] if pool == "mean" else groups.values
    return Piece(groups.rows, values.astype(dtype, copy=False))
