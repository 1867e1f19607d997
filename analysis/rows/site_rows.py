"""The rows of one site as matrices, piece by piece: what statistics and probes read."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.blocks import Block, grouped
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

_PIECE_BYTES = 32 * 2**20  # large enough for fast matrix products, small compared with a worker's memory
_MOST_RUNS = 256


class Piece(NamedTuple):
    """Some rows of one site.

    Attributes:
        rows: Row numbers, int64, ascending.
        values: (rows, width) float32, or float64 if the site is; the heads of a row one after the other.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.floating]


def width_of(archive: Archive, site: str) -> int:
    """Return the number of values in a row of `site`, over all its heads."""
    return prod(archive[site].shape[1:])


def piece_rows(width: int, piece_bytes: int = _PIECE_BYTES) -> int:
    """Return the most rows of a piece."""
    return max(1, piece_bytes // (8 * width))


def pieces(
    archive: Archive,
    site: str,
    blocks: Sequence[Block],
    where: str | None = None,
    *,
    piece_bytes: int = _PIECE_BYTES,
) -> Iterator[Piece]:
    """Yield the rows of `blocks`, or those that the filter `where` selects; no piece is empty.

    The ends of the pieces depend only on the blocks and the site's width.

    Args:
        archive: The archive.
        site: The site.
        blocks: The rows.
        where: A filter, such as ``position > 0``.
        piece_bytes: Largest size of a piece in float64; a piece has at least one row.
    """
    array = archive[site]
    width = width_of(archive, site)
    dtype = np.float64 if array.dtype.itemsize > 4 or array.dtype == np.int32 else np.float32
    height = piece_rows(width, piece_bytes)
    selected = None if where is None else RowFilter.parse(where)
    for block in blocks:
        for start in range(block.start, block.stop, height):
            stop = min(start + height, block.stop)
            rows = np.arange(start, stop)
            values: npt.NDArray[Any] = array.numpy(slice(start, stop), dtype=dtype).reshape(stop - start, width)
            if selected is not None:
                mask = selected.mask(archive, start, stop)
                rows, values = rows[mask], values[mask]
            if len(rows):
                yield Piece(rows, values)


def runs(blocks: Sequence[Block], *, least_rows: int) -> list[list[Block]]:
    """Divide `blocks` into runs of neighbours, each the work of one task; at most a few hundred runs.

    A run has at least `least_rows` rows, so that what a task returns is small compared with what it reads. The runs
    depend on the archive and not on the cluster, so sums over runs are the same wherever they are computed.
    """
    least_rows = max(least_rows, sum(block.stop - block.start for block in blocks) // _MOST_RUNS)
    return grouped(blocks, least_rows)
