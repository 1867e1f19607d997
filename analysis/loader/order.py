"""Which rows follow which in an epoch, and who reads them: arithmetic only, nothing is read.

The archive's rows lie in blocks of neighbours. An epoch puts the blocks in a random order, the same for everybody;
that is a long line of rows. Ranks take equal pieces of the line, the workers of a rank whole batches of its piece.
A worker fills its buffer with the next rows of its piece, shuffles the buffer, hands it out, and fills it anew.

Batch j of a rank is made by worker j modulo the number of workers, which is the order in which torch's `DataLoader`
asks them. So what follows after any batch is known without what came before.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Share(NamedTuple):
    """A worker's piece of the line: rows `start` to `stop` (not included) of the epoch's order."""

    start: int
    stop: int


class Runs(NamedTuple):
    """Parts of blocks, by ascending block: rows `first` to `last` (not included) of its chosen rows."""

    block: Numbers
    first: Numbers
    last: Numbers


def n_batches(n_rows: int, batch_size: int, rank: int, world_size: int, *, drop_last: bool) -> int:
    """Return how many batches a rank makes of `n_rows` rows; with `drop_last`, so many on every rank."""
    if drop_last:
        return n_rows // world_size // batch_size
    start, stop = _of_rank(n_rows, rank, world_size)
    return -(-(stop - start) // batch_size)


def share_of(
    n_rows: int, batch_size: int, rank: int, world_size: int, worker: int, n_workers: int, *, drop_last: bool
) -> Share:
    """Return the piece of one worker of one rank.

    The pieces of all workers of all ranks hold every row once, but for the rows that `drop_last` leaves out. All
    batches are full, but for the last of a rank.
    """
    start, stop = _of_rank(n_rows, rank, world_size)
    total = n_batches(n_rows, batch_size, rank, world_size, drop_last=drop_last)
    missing = max(0, total * batch_size - (stop - start))  # of the last batch

    def begin(worker: int) -> int:
        before = total // n_workers * worker + min(worker, total % n_workers)
        return before * batch_size - (missing if worker > (total - 1) % n_workers else 0)

    return Share(start + begin(worker), start + begin(worker + 1))


def _of_rank(n_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    return n_rows * rank // world_size, n_rows * (rank + 1) // world_size


def turn(worker: int, n_workers: int, taken: int) -> tuple[int, int]:
    """Say whose part a worker plays after `taken` batches of the rank, and how many of its batches are taken.

    A `DataLoader` that goes on in the middle of an epoch asks its worker 0 first.
    """
    part = (worker + taken) % n_workers
    return part, (taken - part + n_workers - 1) // n_workers


class Order:
    """The line of rows of one epoch.

    Args:
        counts: Chosen rows of each block.
        generator: Puts the blocks in a random order; None keeps theirs.
    """

    def __init__(self, counts: Numbers, generator: np.random.Generator | None) -> None:
        n_blocks = len(counts)
        self._blocks = np.arange(n_blocks) if generator is None else generator.permutation(n_blocks)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[self._blocks])])

    def runs(self, start: int, stop: int) -> Runs:
        """Return what to read for rows `start` to `stop` of the line."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        begins, ends = self._starts[first:last], self._starts[first + 1 : last + 1]
        order = np.argsort(self._blocks[first:last])
        runs = (self._blocks[first:last], np.maximum(start, begins) - begins, np.minimum(stop, ends) - begins)
        return Runs(*(column[order] for column in runs))
