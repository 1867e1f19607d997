"""The order of rows in an epoch, and which rank and worker reads them. It follows from the settings alone.

The chosen rows of an archive lie in blocks of neighbours. An epoch puts the blocks in a random order, which is the same
for all ranks. Ranks take equal slices of that order, and the workers of a rank take full batches of its slice. Worker
number j modulo the number of workers makes batch j of a rank, since torch's `DataLoader` asks workers in that order. So
the batches after any point are known without those before.

Each worker shuffles its rows again in a buffer (`residua.analysis.loader.shuffle_buffer`).
"""

import zlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import examples_of
from residua.store.base.errors import AnalysisError
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.spec import ArraySpec
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array, Following
from residua.store.selection.row_filter import RowFilter

Numbers = npt.NDArray[np.int64]

_RAW_BLOCK_BYTES = 128 * 1024
_BLOCKS_PER_BUFFER = 64  # at least, if blocks may be smaller than the highest chunk
_MOST_BLOCKS = 2**19


class Source(Protocol):
    """Rows of one site, as `residua.store.read.array.ArchiveArray` has them, perhaps of several archives together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row shape)."""
        ...

    @property
    def stored_dtype(self) -> np.dtype[np.generic]:
        """Type of the stored values."""
        ...

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays on disk."""
        ...

    def numpy(self, rows: Numbers, *, dtype: npt.DTypeLike | None = None) -> Array:
        """Return the values of rows, (rows, *row shape)."""
        ...

    def fill(self, out: Array, pieces: Sequence[Numbers | range], following: Following | None = None) -> None:
        """Read pieces of rows, one after the other, into `out`, C-contiguous and of the stored dtype."""
        ...


class Order(Protocol):
    """Rows in the order in which ranks and workers divide them."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Numbers | range]:
        """Yield the numbers of the rows from place `start` to before `stop`."""
        ...


def row_bytes(sources: Sequence[Source]) -> int:
    """Return the stored bytes of one row of all `sources` together."""
    return sum(prod(source.shape[1:]) * source.stored_dtype.itemsize for source in sources)


def block_height(archive: Archive, sources: Sequence[Source], *, buffer_bytes: int, raw_block_bytes: int | None) -> int:
    """Return the number of rows of a block, a power of two. Small blocks mix better, but chunks are decoded in full.

    A block has the rows of a chunk. It has fewer if the sites have chunks of different heights and a buffer would hold
    few blocks, and `raw_block_bytes` at most if nothing has to be decoded: by default, of an archive in a folder, 128
    KiB. From an address chunks come whole.
    """
    size = row_bytes(sources)
    specs = [spec for source in sources for spec in source.specs]
    heights = [spec.rows_per_chunk for spec in specs]
    if raw_block_bytes is None and not archive.is_remote:
        raw_block_bytes = _RAW_BLOCK_BYTES
    if raw_block_bytes is not None and all(PRESETS[spec.preset].is_raw for spec in specs):
        rows = min(*heights, 1 << max(0, (raw_block_bytes // size).bit_length() - 1))
    else:
        rows = max(heights)
        while rows > min(heights) and rows * size * _BLOCKS_PER_BUFFER > buffer_bytes:
            rows //= 2
    while archive.n_rows > rows * _MOST_BLOCKS and rows < archive.plan.rows_per_shard:
        rows *= 2
    return rows


class ChosenRows:
    """The captured rows in blocks of `height`, or those of them that a filter chooses; a filter takes one bit per row.

    Attributes:
        counts: Number of chosen rows of each block, int64.

    Args:
        archive: The archive.
        height: Rows of a block, a power of two.
        where: Chooses rows; None chooses all.
        examples: Whether to choose rows of each example, (examples,); None chooses those of all.

    Raises:
        AnalysisError: The filter does not fit the archive, or chooses no row.
    """

    def __init__(
        self,
        archive: Archive,
        height: int,
        where: RowFilter | None,
        examples: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        shards = blocks(archive)
        by_shard = [np.arange(start, stop, height) for start, stop in shards]
        shard_stops = np.repeat([stop for _, stop in shards], [len(starts) for starts in by_shard])
        self._starts = np.concatenate([np.zeros(0, np.int64), *by_shard])
        self._heights = np.minimum(height, shard_stops - self._starts)
        self._rows_per_shard = archive.plan.rows_per_shard
        self.counts: Numbers = self._heights
        self._bits: dict[int, npt.NDArray[np.uint8]] = {}  # by shard; empty if all rows are chosen
        if where is not None or examples is not None:
            counts = [np.zeros(0, np.int64)]
            for (start, stop), starts in zip(shards, by_shard, strict=True):
                mask = np.ones(stop - start, np.bool_) if where is None else where.mask(archive, start, stop)
                if examples is not None:
                    mask = mask & examples[examples_of(archive, np.arange(start, stop))]
                counts.append(np.add.reduceat(mask, starts - start, dtype=np.int64))
                self._bits[start // self._rows_per_shard] = np.packbits(mask)
            self.counts = np.concatenate(counts)
        if not self.n_rows:
            found = f"{int(self._heights.sum()):,} captured rows" + (f", none with {where.text}" if where else "")
            raise AnalysisError(f"there is nothing to load: {archive.place} has {found}: capture, or choose, some")

    @property
    def n_rows(self) -> int:
        """Number of chosen rows."""
        return int(self.counts.sum())

    @property
    def checksum(self) -> int | None:
        """A checksum of which rows are chosen; None if all are."""
        return zlib.crc32(b"".join(bits.tobytes() for bits in self._bits.values())) if self._bits else None

    def shares_rows(self, other: "ChosenRows") -> bool:
        """Return whether a row is among these and among `other`, which are of the same archive."""
        if not (self._bits and other._bits):
            return bool(self.n_rows and other.n_rows)
        return any((bits & other._bits[shard]).any() for shard, bits in self._bits.items())

    def rows(self) -> Iterator[Numbers | range]:
        """Yield the numbers of all chosen rows, in pieces."""
        return self.of_slices(np.arange(len(self.counts)), np.zeros_like(self.counts), self.counts)

    def of_slices(self, block: Numbers, first: Numbers, last: Numbers) -> Iterator[Numbers | range]:
        """Yield the row numbers of slices of blocks: in each `block` the chosen rows from `first` to before `last`.

        If all rows are chosen, neighbouring slices come as one range, else each slice as an array.
        """
        if self._bits:
            for at, begin, end in zip(block.tolist(), first.tolist(), last.tolist(), strict=True):
                if begin < end:
                    yield self._chosen_of(at)[begin:end]
            return
        starts, stops = self._starts[block] + first, self._starts[block] + last
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        yield from map(range, starts[[0, *breaks]].tolist(), stops[[*(breaks - 1), -1]].tolist())

    def _chosen_of(self, block: int) -> Numbers:
        start = int(self._starts[block])
        shard, offset = divmod(start, self._rows_per_shard)
        byte, skipped = divmod(offset, 8)
        n_bits = skipped + int(self._heights[block])
        bits = np.unpackbits(self._bits[shard][byte : byte + -(-n_bits // 8)], count=n_bits)
        chosen: Numbers = start + np.flatnonzero(bits[skipped:])
        return chosen


class EpochOrder:
    """The chosen rows in the order of one epoch.

    Args:
        chosen: The rows.
        generator: Puts the blocks in a random order; None keeps the archive's order.
    """

    def __init__(self, chosen: ChosenRows, generator: np.random.Generator | None) -> None:
        n_blocks = len(chosen.counts)
        self._chosen = chosen
        self._blocks = np.arange(n_blocks) if generator is None else generator.permutation(n_blocks)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen.counts[self._blocks])])

    @property
    def n_rows(self) -> int:
        """Number of rows of the epoch."""
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> Iterator[Numbers | range]:
        """Yield the numbers of the rows from place `start` to before `stop`, sorted, as arrays and ranges."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        begins, ends = self._starts[first:last], self._starts[first + 1 : last + 1]
        order = np.argsort(self._blocks[first:last])
        slices = (self._blocks[first:last], np.maximum(start, begins) - begins, np.minimum(stop, ends) - begins)
        return self._chosen.of_slices(*(column[order] for column in slices))


def n_batches(n_rows: int, batch_size: int, rank: int, world_size: int, *, drop_last: bool) -> int:
    """Return the number of batches of a rank; with `drop_last` it is the same for all ranks."""
    if drop_last:
        return n_rows // world_size // batch_size
    return -(-len(rank_slice(n_rows, rank, world_size)) // batch_size)


def worker_slice(
    n_rows: int, batch_size: int, rank: int, world_size: int, worker: int, n_workers: int, *, drop_last: bool
) -> range:
    """Return the places of the epoch's order that one worker of one rank reads.

    All workers of all ranks together have every row once, except for the rows that `drop_last` leaves out. All batches
    are full, except for the last one of a rank.
    """
    own = rank_slice(n_rows, rank, world_size)
    total = n_batches(n_rows, batch_size, rank, world_size, drop_last=drop_last)
    missing = max(0, total * batch_size - len(own))  # rows of the last batch

    def begin(worker: int) -> int:
        before = total // n_workers * worker + min(worker, total % n_workers)
        return own.start + before * batch_size - (missing if worker > (total - 1) % n_workers else 0)

    return range(begin(worker), begin(worker + 1))


def rank_slice(n_rows: int, rank: int, world_size: int) -> range:
    """Return the places of an order of `n_rows` rows that belong to a rank."""
    return range(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)


def resumed_worker(worker: int, n_workers: int, taken: int) -> tuple[int, int]:
    """Return the worker that `worker` replaces after `taken` batches of the rank, and how many of those were its own.

    A `DataLoader` always asks its worker 0 first, also in the middle of an epoch.
    """
    replaced = (worker + taken) % n_workers
    return replaced, (taken - replaced + n_workers - 1) // n_workers
