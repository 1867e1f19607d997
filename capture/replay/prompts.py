"""The examples of a run, in memory.

A replay is a run whose examples and rows come from an archive; `residua.capture.replay.engine.Replayer` runs both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from residua.store.examples.memory import ExamplesInMemory
from residua.store.examples.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The examples of a run, and the batches in which they run: those of a capture of the same examples.

    Attributes:
        example_table: The examples; each of their positions is kept.
        batch_tokens: Most token positions of one batch, padding included.
        rows_per_shard: Rows of a shard, if the run were captured.
    """

    example_table: ExamplesInMemory
    batch_tokens: int
    rows_per_shard: int

    @property
    def place(self) -> str:
        """What messages call it."""
        return "this run"

    @property
    def n_rows(self) -> int:
        """Rows of all examples."""
        return self.example_table.index().total_rows

    @cached_property
    def batches(self) -> Sequence[Sequence[int]]:
        """Which examples run together, by their numbers; each one is in one batch."""
        schedule = Schedule(
            self.example_table.index(), rows_per_shard=self.rows_per_shard, batch_tokens=self.batch_tokens
        )
        return [batch.examples.tolist() for batch in schedule.work(())]
