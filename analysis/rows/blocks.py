"""Runs of rows that lie in one shard: what a task reads at a time."""

from collections.abc import Iterable
from typing import NamedTuple

from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive


class Block(NamedTuple):
    """Rows `start` to `stop` (not included), all of one shard."""

    start: int
    stop: int


def blocks(archive: Archive, *, most_bytes: int | None = None, sites: str | Iterable[str] = ()) -> list[Block]:
    """Return the committed rows of an archive as blocks, in order.

    A block is a shard. Where a shard is larger than `most_bytes`, it is cut at multiples of a power of two of rows;
    chunk heights are powers of two as well, so no chunk is read for two blocks unless a block has to be smaller
    than a chunk.

    Args:
        archive: The archive.
        most_bytes: Most bytes of a block, as readers get the values (bfloat16 has two a value).
        sites: Sites whose bytes are counted; by default all.

    Raises:
        AnalysisError: Not even one row fits.
        UnknownSiteError: `sites` names no stored site.
    """
    height = archive.plan.rows_per_shard
    if most_bytes is not None:
        names = archive.select(sites) if sites else archive.sites
        height = min(height, _rows_within(most_bytes, sum(archive.plan.site(name).row_bytes for name in names)))
    runs = sorted(commit.rows for commit in archive.commits.values())
    return [Block(row, min(row + height, stop)) for start, stop in runs for row in range(start, stop, height)]


def _rows_within(most_bytes: int, row_bytes: int) -> int:
    """Return the largest power of two of rows that `most_bytes` hold."""
    if most_bytes < row_bytes:
        raise AnalysisError(
            f"blocks of at most {most_bytes:,} bytes were asked for, but one row has {row_bytes:,}: allow more memory, "
            "or choose fewer sites"
        )
    return 1 << ((most_bytes // row_bytes).bit_length() - 1)
