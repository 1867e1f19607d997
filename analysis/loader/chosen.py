"""The rows that a loader hands out, as blocks of neighbours: how high a block is, and which of its rows are chosen."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from residua.analysis.loader.order import Runs
from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError
from residua.store.encoding.codecs import PRESETS
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

Rows = npt.NDArray[np.int64]

_RAW_BYTES = 128 * 1024  # a copy of less is mostly overhead
_FEWEST_PER_BUFFER = 64
_MOST_BLOCKS = 2**19


def row_bytes(archive: Archive, sites: Sequence[str]) -> int:
    """Return the bytes of one row of all of `sites`."""
    return sum(archive.plan.site(site).row_bytes for site in sites)


def block_rows(archive: Archive, sites: Sequence[str], buffer_bytes: int) -> int:
    """Return how many neighbouring rows to read at a time: few mix better, but a chunk is decoded as a whole.

    That is a chunk's rows; less, where sites have chunks of other heights and a buffer would hold few blocks; and
    less where nothing has to be decoded. Always a power of two.
    """
    size = row_bytes(archive, sites)
    specs = [spec for site in sites for spec in archive[site].specs]
    heights = [spec.rows_per_chunk for spec in specs]
    if all(PRESETS[spec.preset].effort is None for spec in specs):
        rows = min(*heights, 1 << max(0, (_RAW_BYTES // size).bit_length() - 1))
    else:
        rows = max(heights)
        while rows > min(heights) and rows * size * _FEWEST_PER_BUFFER > buffer_bytes:
            rows //= 2
    while archive.n_rows > rows * _MOST_BLOCKS and rows < archive.plan.rows_per_shard:
        rows *= 2
    return rows


class ChosenRows:
    """Captured rows in blocks of `height`, all of them or those that a filter chooses, which takes a bit a row.

    Attributes:
        counts: Chosen rows of each block, int64.

    Args:
        archive: The archive.
        height: Rows of a block, a power of two.
        where: Chooses rows.

    Raises:
        AnalysisError: The filter does not fit the archive, or no row is chosen.
    """

    def __init__(self, archive: Archive, height: int, where: RowFilter | None) -> None:
        shards = blocks(archive)
        pieces = [np.arange(start, stop, height) for start, stop in shards]
        self._starts = np.concatenate([np.zeros(0, np.int64), *pieces])
        shard_stops = np.repeat([stop for _, stop in shards], [len(piece) for piece in pieces])
        self._heights = np.minimum(height, shard_stops - self._starts)
        self._rows_per_shard = archive.plan.rows_per_shard
        self.counts: Rows = self._heights
        self._bits: dict[int, npt.NDArray[np.uint8]] = {}  # by shard; empty if all rows are chosen
        if where is not None:
            counts = [np.zeros(0, np.int64)]
            for (start, stop), piece in zip(shards, pieces, strict=True):
                mask = where.mask(archive, start, stop)
                counts.append(np.add.reduceat(mask, piece - start, dtype=np.int64))
                self._bits[start // self._rows_per_shard] = np.packbits(mask)
            self.counts = np.concatenate(counts)
        if not self.n_rows:
            found = f"{int(self._heights.sum()):,} captured rows" + (f", none with {where.text}" if where else "")
            raise AnalysisError(f"there is nothing to load: {archive.path} has {found}: capture, or choose, some")

    @property
    def n_rows(self) -> int:
        """How many rows are chosen."""
        return int(self.counts.sum())

    def runs_of_rows(self, runs: Runs) -> Iterator[tuple[int, Rows | range]]:
        """Yield the row numbers of `runs` and the place of the first among them all.

        Neighbours of which all rows are chosen come as one range, others as the numbers of one block each.
        """
        at = 0
        if not self._bits:
            starts, stops = self._starts[runs.block] + runs.first, self._starts[runs.block] + runs.last
            breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
            begins, ends = starts[[0, *breaks]].tolist(), stops[[*(breaks - 1), -1]].tolist()
            for begin, end in zip(begins, ends, strict=True):
                yield at, range(begin, end)
                at += end - begin
            return
        for block, first, last in zip(*(column.tolist() for column in runs), strict=True):
            if first < last:
                yield at, self._chosen(block)[first:last]
                at += last - first

    def _chosen(self, block: int) -> Rows:
        start = int(self._starts[block])
        shard, offset = divmod(start, self._rows_per_shard)
        byte, skipped = divmod(offset, 8)
        n_bits = skipped + int(self._heights[block])
        bits = np.unpackbits(self._bits[shard][byte : byte + -(-n_bits // 8)], count=n_bits)
        chosen: Rows = start + np.flatnonzero(bits[skipped:])
        return chosen
