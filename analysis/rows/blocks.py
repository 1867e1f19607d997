"""Rows in blocks that fit into memory: those of an archive, shard by shard, and those of numpy and Dask arrays."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive

if TYPE_CHECKING:  # importing dask.array takes long, and archives need none of it
    from dask.array import Array as DaskArray

Array: TypeAlias = npt.NDArray[Any]
Rows: TypeAlias = "Array | DaskArray"

_BLOCK_ROWS = 8192  # of an array


class Span(Protocol):
    """Rows `start` to `stop` (not included)."""

    @property
    def start(self) -> int:
        """The first row."""
        ...

    @property
    def stop(self) -> int:
        """The row after the last."""
        ...


AnySpan = TypeVar("AnySpan", bound=Span)


class Block(NamedTuple):
    """Rows `start` to `stop` (not included), all in one shard."""

    start: int
    stop: int


def blocks(archive: Archive, *, most_bytes: int | None = None, sites: str | Iterable[str] = ()) -> list[Block]:
    """Return the committed rows of an archive as blocks, in order.

    A block is a shard. A shard larger than `most_bytes` is cut at multiples of a power of two of rows. Chunk heights
    are powers of two as well, so no two blocks read the same chunk, unless a block has to be smaller than a chunk.

    Args:
        archive: The archive.
        most_bytes: Largest size of a block, counted as readers get the values (bfloat16 has two bytes a value).
        sites: Sites whose bytes are counted; all by default.

    Raises:
        AnalysisError: Not even one row fits.
        DamagedArchiveError: The archive was finished, and has lost shards since.
        UnknownSiteError: `sites` names no stored site.
    """
    height = archive.plan.rows_per_shard
    if most_bytes is not None:
        names = archive.select(sites) if sites else archive.sites
        height = min(height, _rows_within(most_bytes, sum(archive.plan.site(name).row_bytes for name in names)))
    return [
        Block(row, min(row + height, stop))
        for start, stop in archive.captured_rows()
        for row in range(start, stop, height)
    ]


def stretches(archive: Archive) -> list[tuple[int, int]]:
    """Return the first row of each run of neighbouring captured shards, and the row after its last; ascending."""
    found: list[tuple[int, int]] = []
    for start, stop in archive.captured_rows():
        first = found.pop()[0] if found and found[-1][1] == start else start
        found.append((first, stop))
    return found


@dataclass(frozen=True)
class Leaves:
    """The captured rows of an archive in numbered runs of blocks: a few numbers, however many shards there are.

    The runs depend on the archive and on the sizes asked for, not on the cluster, so sums over them are the same
    wherever they are computed. A job gets the number of a run.

    Attributes:
        stretches: As `stretches` returns them.
        shard_rows: Rows of a shard.
        rows: Most rows of a run: a multiple of `shard_rows`, or less than that.
    """

    stretches: tuple[tuple[int, int], ...]
    shard_rows: int
    rows: int

    @classmethod
    def of(cls, archive: Archive, rows: int, *, multiple: int = 1) -> "Leaves":
        """Divide the captured rows into runs of about `rows`.

        Args:
            archive: The archive.
            rows: Most rows of a run, if that is at least a shard or `multiple`.
            multiple: Where a shard is divided, it is at multiples of so many of its rows.
        """
        height = archive.plan.rows_per_shard
        rows = rows // height * height if rows >= height else max(1, rows // multiple) * multiple
        return cls(tuple(stretches(archive)), height, min(rows, height) if rows < height else rows)

    def __len__(self) -> int:
        """Return the number of runs."""
        return sum(self._counts())

    def blocks(self, number: int) -> list[Block]:
        """Return the blocks of run `number`, in order."""
        counts = self._counts()
        at = bisect_right(list(accumulate(counts)), number)
        number -= sum(counts[:at])
        first, last = self.stretches[at]
        if self.rows < self.shard_rows:
            shard, part = divmod(number, self._per_shard)
            start = first + shard * self.shard_rows + part * self.rows
            stop = min(start + self.rows, first + (shard + 1) * self.shard_rows, last)
            return [Block(start, stop)] if start < stop else []
        starts = range(first + number * self.rows, min(first + (number + 1) * self.rows, last), self.shard_rows)
        return [Block(start, min(start + self.shard_rows, last)) for start in starts]

    @property
    def _per_shard(self) -> int:
        return -(-self.shard_rows // self.rows)

    def _counts(self) -> list[int]:
        """Return the number of runs of each stretch; of a short last shard, the last ones may be empty."""
        shards = [-(-(stop - start) // self.shard_rows) for start, stop in self.stretches]
        if self.rows < self.shard_rows:
            return [count * self._per_shard for count in shards]
        return [-(-count // (self.rows // self.shard_rows)) for count in shards]


def grouped(spans: Iterable[AnySpan], least_rows: int) -> list[list[AnySpan]]:
    """Divide `spans` into groups of neighbours, each as short as `least_rows` rows allow."""
    found: list[list[AnySpan]] = []
    n_rows = least_rows
    for span in spans:
        if n_rows >= least_rows:
            found.append([])
            n_rows = 0
        found[-1].append(span)
        n_rows += span.stop - span.start
    return found


def _rows_within(most_bytes: int, row_bytes: int) -> int:
    """Return the largest power of two of rows that fit into `most_bytes`."""
    if most_bytes < row_bytes:
        raise AnalysisError(
            f"blocks of at most {most_bytes:,} bytes were asked for, but one row has {row_bytes:,}: allow more memory, "
            "or choose fewer sites"
        )
    return 1 << ((most_bytes // row_bytes).bit_length() - 1)


def array_blocks(values: Rows) -> Iterator[Array]:
    """Yield the rows of a numpy array, a list or a Dask array in order, at most 8,192 at a time.

    The blocks of a Dask array are computed one after the other. An array without rows gives one empty block.
    """
    lazy: Any = values  # Dask's methods have no types
    pieces: Iterable[Array]
    if not hasattr(lazy, "numblocks"):
        pieces = [np.asarray(values)]
    else:
        rows = lazy.rechunk(dict.fromkeys(range(1, lazy.ndim), -1))
        dask_blocks = (rows.blocks[index] for index in range(rows.numblocks[0]))
        pieces = (np.asarray(block.compute(scheduler="synchronous")) for block in dask_blocks)
    for piece in pieces:
        for start in range(0, max(1, len(piece)), _BLOCK_ROWS):
            yield piece[start : start + _BLOCK_ROWS]


def labelled_blocks(values: Rows, labels: Array) -> Iterator[tuple[Array, Array]]:
    """Yield the blocks of `array_blocks`, each with its labels, (rows,)."""
    start = 0
    for block in array_blocks(values):
        yield block, labels[start : start + len(block)]
        start += len(block)
