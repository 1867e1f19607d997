"""How tall chunks and shards are: one rule, from the widest site and the memory that staging may take.

A chunk is the power of two of rows nearest 512 KiB. All sites share one shard height, so it follows from the
widest: the power of two of rows nearest 32 MiB. Then two corrections, in this order:

1. A shard should hold a whole batch, because batches are formed inside a shard's examples; it grows until it does.
2. All stages must fit the memory budget; it shrinks until they do. One stage holds one shard of every site, and
   `n_stages` of them are open at once: the shard that fills, and those that its last example reaches into.

The result is a pure function of its arguments, so that a plan made twice is the same plan.
"""

from collections.abc import Iterable
from math import ceil

from residua.store.base.errors import PlanError

CHUNK_BYTES = 512 * 1024
SHARD_BYTES = 32 * 1024 * 1024
HOST_MEMORY_BYTES = 4 * 1024**3
COLUMN_BYTES = 16  # of a row in a stage: its token, position and example


def nearest_power_of_two(value: float) -> int:
    """Return the power of two nearest to `value` on a linear scale, at least 1."""
    lower = 1 << max(0, int(value).bit_length() - 1)
    return lower if value - lower <= 2 * lower - value else 2 * lower


def chunk_rows(row_bytes: int, rows_per_shard: int) -> int:
    """Return the chunk height for rows of `row_bytes`, never more than the shard's."""
    return min(rows_per_shard, nearest_power_of_two(CHUNK_BYTES / max(1, row_bytes)))


def n_stages(most_rows_per_example: int, rows_per_shard: int) -> int:
    """Return how many shards are open at once: the one that fills and those its last example reaches."""
    return 1 + max(1, ceil(most_rows_per_example / rows_per_shard))


def staging_bytes(row_bytes_all: int, most_rows_per_example: int, rows_per_shard: int) -> int:
    """Return the host memory that all stages take together, in bytes."""
    return n_stages(most_rows_per_example, rows_per_shard) * rows_per_shard * (row_bytes_all + COLUMN_BYTES)


def shard_rows(
    row_bytes: Iterable[int],
    *,
    batch_rows: int,
    most_rows_per_example: int,
    host_memory_bytes: int = HOST_MEMORY_BYTES,
) -> int:
    """Return the shard height in rows, a power of two, by the rule in this module's head.

    Args:
        row_bytes: Logical bytes of one row of each site.
        batch_rows: Rows that one batch may yield.
        most_rows_per_example: Rows of the example that keeps most.
        host_memory_bytes: Memory that all stages may take together.

    Raises:
        PlanError: Even shards of one row do not fit the budget.
    """
    sizes = list(row_bytes)
    height = nearest_power_of_two(SHARD_BYTES / max([1, *sizes]))
    while height < batch_rows:
        height *= 2
    while height > 1 and staging_bytes(sum(sizes), most_rows_per_example, height) > host_memory_bytes:
        height //= 2
    check_budget(sizes, most_rows_per_example, height, host_memory_bytes)
    return height


def check_budget(row_bytes: Iterable[int], most_rows_per_example: int, height: int, host_memory_bytes: int) -> None:
    """Raise PlanError if stages of `height` rows take more than `host_memory_bytes` together."""
    sizes = list(row_bytes)
    needed = staging_bytes(sum(sizes), most_rows_per_example, height)
    if needed > host_memory_bytes:
        raise PlanError(
            f"--host-memory allows {host_memory_bytes:,} bytes, but {len(sizes)} sites in shards of {height:,} rows "
            f"need {needed:,} to stage the longest example ({most_rows_per_example:,} rows of {sum(sizes):,} bytes): "
            "raise --host-memory, lower --rows-per-shard, keep fewer positions, shorten the examples with --max-length "
            "or capture fewer sites."
        )
