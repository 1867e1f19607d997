"""The schedule of a capture: its batches and the shards that they fill, from the plan and the examples' lengths alone.

An example belongs to the shard that has its first row; the examples of one shard are its *group*. Batches are formed
inside a group: examples from longest to shortest (equal lengths in their order), as many as fit `batch_tokens` with
padding. The batch with the group's last example comes last, because only that example can reach into the next shards.
So every batch has the same examples however often the run was interrupted. A resumed run computes a batch twice only
if it reaches from a finished shard into a missing one.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from residua.store.examples.index import ExampleIndex
from residua.store.examples.table import ExampleTable

_LEAST_RUN = 3  # shards; a batch can be as large as a shard, and the one at each end is computed twice


@dataclass(frozen=True)
class Batch:
    """Examples that run together: their numbers in batch order, and the shard whose group they are from."""

    examples: npt.NDArray[np.int64]
    group: int


class Schedule:
    """The batches of a plan, by group.

    Args:
        index: Lengths and first rows of all examples.
        rows_per_shard: Rows of a shard.
        batch_tokens: Most token positions in one batch, padding included; a longer example runs alone.

    Attributes:
        is_whole: Whether all examples are there.
        n_rows: Rows of the examples that are there.
        n_shards: Shards whose examples are all there.
    """

    def __init__(self, index: ExampleIndex, *, rows_per_shard: int, batch_tokens: int) -> None:
        self._height = rows_per_shard
        self.batch_tokens = batch_tokens
        self._take(index, is_whole=True)

    def _take(self, index: ExampleIndex, *, is_whole: bool) -> None:
        self._index = index
        self.is_whole = is_whole
        self.n_rows = int(index.first_row[-1])
        self.n_shards = -(-self.n_rows // self._height) if is_whole else self.n_rows // self._height

    def intervals(self) -> Iterator[range | None]:
        """Yield the shards that can be run, in order: all of them together, since their examples are there."""
        yield range(self.n_shards)

    def group(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the examples whose first row lies in `shard`; examples without a row are in no group."""
        bounds = np.array([shard, shard + 1], np.int64) * self._height
        start, stop = np.searchsorted(self._index.first_row[:-1], bounds)
        examples = np.arange(start, stop, dtype=np.int64)
        return examples[self._index.n_rows[start:stop] > 0]

    def sizes(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return how many of the chosen examples, (examples,), each group has, (shards,)."""
        first = self._index.first_row[:-1][chosen & (self._index.n_rows > 0)]
        return np.bincount(first // self._height, minlength=self.n_shards)

    def batches(self, shard: int) -> list[Batch]:
        """Return the batches of the group of `shard`; the last one can reach into later shards."""
        examples = self.group(shard)
        if not len(examples):
            return []
        last = examples[-1]
        order = np.argsort(-self._index.n_tokens[examples], kind="stable")
        batches = list(self._fill(examples[order], shard))
        batches.sort(key=lambda batch: bool(np.isin(last, batch.examples)))
        return batches

    def batch_of(self, example: int) -> Batch | None:
        """Return the batch that `example` runs in; None if it has no row."""
        group = int(self._index.first_row[example]) // self._height
        return next((batch for batch in self.batches(group) if example in batch.examples), None)

    def _fill(self, examples: npt.NDArray[np.int64], shard: int) -> Iterator[Batch]:
        start = 0
        while start < len(examples):
            longest = int(self._index.n_tokens[examples[start]])
            stop = start + max(1, self.batch_tokens // longest)
            yield Batch(examples[start:stop], shard)
            start = stop

    def reach(self, shard: int) -> int:
        """Return the last shard that the group of `shard` has rows in."""
        examples = self.group(shard)
        return (int(self._index.first_row[examples[-1] + 1]) - 1) // self._height if len(examples) else shard

    def work(self, committed: Container[int], shards: range | None = None) -> Iterator[Batch]:
        """Yield the batches that fill every shard not in `committed`, group by group.

        Args:
            committed: Shards that are finished.
            shards: The shards to fill; all by default.
        """
        wanted = range(self.n_shards) if shards is None else shards

        def is_missing(shard: int) -> bool:
            return shard in wanted and shard not in committed

        for shard in range(self._first_group(wanted.start), wanted.stop):
            if is_missing(shard):
                yield from self.batches(shard)
            elif any(is_missing(other) for other in range(shard + 1, self.reach(shard) + 1)):
                yield self.batches(shard)[-1]

    def _first_group(self, shard: int) -> int:
        """Return the group of the example that owns the first row of `shard`: no earlier group reaches the shard."""
        if not 0 <= shard < self.n_shards:
            return shard
        example = np.searchsorted(self._index.first_row, shard * self._height, side="right") - 1
        return int(self._index.first_row[example]) // self._height

    def runs(self, n_workers: int, shards: range | None = None) -> list[range]:
        """Cut `shards`, or all, into runs of consecutive shards, which workers take one after another.

        A run is half of each worker's share of what is left, so that all workers end at about the same time (guided
        self-scheduling: Polychronopoulos and Kuck, 1987). The end of a run is moved, by up to a quarter of its length,
        to where the batch that both neighbours compute is smallest. A minimal length keeps that repetition small.
        """
        wanted = range(self.n_shards) if shards is None else shards
        least = min(_LEAST_RUN, -(-len(wanted) // n_workers))
        runs: list[range] = []
        start = wanted.start
        while start < wanted.stop:
            length = max(least, -(-(wanted.stop - start) // (2 * n_workers)))
            stops = range(start + length - length // 4, start + length + length // 4 + 1)
            stop = min(wanted.stop, min(stops, key=lambda stop: (self._shared_tokens(stop, wanted.stop), stop)))
            runs.append(range(start, stop))
            start = stop
        return runs

    def _shared_tokens(self, shard: int, end: int) -> int:
        """Return the tokens, with padding, of the batch that reaches into `shard` from earlier ones; 0 if none does.

        From `end` on nothing counts as shared, so that the result does not depend on examples that came later.
        """
        group = self._first_group(shard)
        if not 0 <= group < shard < end:
            return 0
        examples = self.batches(group)[-1].examples
        return len(examples) * int(self._index.n_tokens[examples].max())


class GrowingSchedule(Schedule):
    """The schedule of a table to which parts are still added. It has the shards whose examples are all there.

    The shards that one more part completes are an interval, whenever it is looked at: every worker sees the same ones.

    Args:
        table: The examples; it is refreshed here.
        is_whole: Returns whether no part will be added.
        rows_per_shard: As for `Schedule`.
        batch_tokens: As for `Schedule`.
    """

    def __init__(
        self, table: ExampleTable, is_whole: Callable[[], bool], *, rows_per_shard: int, batch_tokens: int
    ) -> None:
        super().__init__(table.index(), rows_per_shard=rows_per_shard, batch_tokens=batch_tokens)
        self._table = table
        self._all_there = is_whole
        self._look()

    def _look(self) -> None:
        is_whole = self._all_there()  # first: then the parts that are there are all
        self._table.refresh()
        self._take(self._table.index(), is_whole=is_whole)

    def intervals(self) -> Iterator[range | None]:
        """Yield the shards that can be run, interval by interval, in order; None while others may come."""
        start = n_parts = 0
        while True:
            stops = (self._index.first_row[self._index.first_example[1:]] // self._height).tolist()
            is_whole = self.is_whole
            for stop in [*stops[n_parts:], *([self.n_shards] if is_whole else [])]:
                if stop > start:
                    yield range(start, stop)
                    start = stop
            if is_whole:
                return
            n_parts = len(stops)
            yield None
            self._look()
