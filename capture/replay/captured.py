"""Replay passes that a capture stores: `record` runs the model, and its taps read what follows from rows and edits."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from residua.capture.buffers.row_index import Indices
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.replay.engine import Replayer
from residua.capture.runtime.sharded import is_zero3
from residua.capture.taps.reading import Taps
from residua.store.examples.schedule import Batch


class CapturedReplay:
    """The replay passes of a capture: `record` runs the model, its taps read what follows.

    Args:
        replayer: The replayer.
        examples: From the number of an example in the new archive to its number in the replayed one.

    Attributes:
        changed: The sites that take stored rows, and those that are edited.
    """

    def __init__(self, replayer: Replayer, examples: Indices) -> None:
        self.changed = replayer.changed_sites
        self._replayer = replayer
        self._examples = examples
        replayer.recorded.refuse(examples.tolist(), "a capture of a replay")

    def prefetching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches of the new archive; the rows that go into the next one are read meanwhile."""
        return self._replayer.prefetching(batches, lambda batch: self._replayed(batch.examples))

    def _replayed(self, examples: Indices) -> PlanBatch:
        return self._replayer.batch(self._examples[examples].tolist())

    @contextmanager
    def reading(self, taps: Taps, examples: Sequence[int]) -> Iterator[None]:
        """Replay while the model runs on a batch inside; `taps` read every site after it was changed.

        Args:
            taps: The taps, not attached yet.
            examples: Numbers of the examples that run together, in the new archive.

        Raises:
            PlanError: An edit needs stored rows that do not exist.
        """
        # ZeRO-3 gathers weights module by module, and a process without a batch runs all modules along.
        skips = not is_zero3(self._replayer.core)
        with self._replayer.changing(self._replayed(np.asarray(examples)), skips=skips), taps.attached():
            yield
